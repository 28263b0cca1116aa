"""The order of cells: attacks before their defenses, retries, other runners, and a line for each cell that ends."""

import errno
import heapq
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sau.errors import RecordError
from sau.formatting import duration
from sau.grid.cells import Outcome
from sau.grid.engines import Engine
from sau.grid.plan import Cell
from sau.grid.publish import differs
from sau.grid.store import Store

POLL = 0.1  # seconds between two looks at what runs
ELSEWHERE = 2.0  # seconds until a cell that another runner has is looked at again
_FULL = ("no room for ", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # as `files.write` and the system say it


def needed(cells: Sequence[Cell], store: Store, retry_failed: bool) -> list[Cell]:
    """The cells to run: neither finished nor failed before, and the attacks whose weights their defenses need."""
    states = store.states(cells)
    skipped = ("failed", "blocked") if not retry_failed else ()
    todo = {cell.digest for cell in cells if not store.over(cell) and states[cell.digest].name not in skipped}
    wanted = {cell.attack for cell in cells if cell.digest in todo and cell.attack}
    todo |= {cell.digest for cell in cells if cell.digest in wanted and store.over(cell) != "finished"}
    return [cell for cell in cells if cell.digest in todo]


class Runner:
    """Runs cells on an engine until all are finished or failed for good.

    Args:
        cells: to run, attacks before their defenses; see `needed`.
        store: where they lie.
        engine: what runs them.
        retries: tries after the first one.
        timeout: seconds of a try; None means no limit.
        say: prints a line.
    """

    def __init__(
        self, cells: Sequence[Cell], store: Store, engine: Engine, *, retries: int, timeout: float | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.cells, self.store, self.engine, self.say = cells, store, engine, say
        self.retries, self.timeout = retries, timeout
        self.order = {cell.digest: number for number, cell in enumerate(cells)}
        self.ready: list[tuple[float, int]] = []  # (not before, number of the cell)
        self.behind: dict[str, list[Cell]] = defaultdict(list)  # attack -> its defenses
        self.tries: Counter[str] = Counter()
        self.waits: set[str] = set()  # cells that had to wait, which is said once
        self.progress: dict[str, int] = {}  # of a cell when its try began
        self.running: dict[str, Cell] = {}
        self.failed = {cell.digest: store.failed(cell) for cell in cells}  # before this runner, which tries them again
        self.ended, self.failures = 0, list[tuple[Cell, str]]()
        for cell in cells:
            if cell.attack in self.order:
                self.behind[cell.attack].append(cell)
            else:
                self._line_up(cell)

    def run(self) -> list[tuple[Cell, str]]:
        """Run everything; returns the cells that failed, each with its reason. The engine is stopped at the end.

        RecordError if the disk is full: all cells would fail of it, and none of them is to blame.
        """
        try:
            self.engine.check(self.cells)
            while self.ready or self.running:
                self._submit()
                for cell, outcome in self.engine.poll():
                    del self.running[cell.digest]
                    self._ended(cell, outcome)
                time.sleep(POLL)
        finally:
            self.engine.stop()
        return self.failures

    def _line_up(self, cell: Cell, wait: float = 0.0) -> None:
        heapq.heappush(self.ready, (time.monotonic() + wait if wait else 0.0, self.order[cell.digest]))

    def _submit(self) -> None:
        while self.ready and self.ready[0][0] <= time.monotonic():
            cell = self.cells[self.ready[0][1]]
            if self.store.over(cell) == "finished":  # by another runner
                heapq.heappop(self.ready)
                self._done(cell, "elsewhere: ")
            elif self.store.failed(cell) not in (0, self.failed[cell.digest]):  # by another runner, after all its tries
                heapq.heappop(self.ready)
                self._failed(cell, f"elsewhere: {self.store.reason(cell)}")
            elif self.store.running(cell):
                heapq.heappop(self.ready)
                self._line_up(cell, ELSEWHERE)
            elif self.engine.room(cell):
                heapq.heappop(self.ready)
                self.running[cell.digest] = cell
                self.progress[cell.digest] = self.store.progress(cell)
                self.engine.submit(cell, self.store.job(cell, self.timeout))
            else:
                return

    def _ended(self, cell: Cell, outcome: Outcome) -> None:
        if outcome.status == "later":
            if outcome.reason and cell.digest not in self.waits:
                self.waits.add(cell.digest)
                self.say(f"waits   {cell.label}: {outcome.reason}")
            self._line_up(cell, ELSEWHERE)
        elif self.store.over(cell) == "finished":  # however its process ended after that
            self._done(cell)
        else:
            reason = outcome.reason or "it ended without a result"
            if any(words in reason for words in _FULL):
                what = f"the disk is full ({cell.label}: {reason.split(';')[0]})"
                raise RecordError(f"{what}; free some space and repeat the command to go on")
            if outcome.again and self.store.progress(cell) > self.progress[cell.digest]:
                self.say(f"again   {cell.label}: {reason}; it goes on")  # like a job whose time ended: no try is spent
                return self._line_up(cell)
            self.tries[cell.digest] += 1
            if outcome.again and self.tries[cell.digest] <= self.retries:
                self.say(f"again   {cell.label}: {reason}; try {self.tries[cell.digest] + 1} of {self.retries + 1}")
                self._line_up(cell)
            else:
                self.store.fail(cell, reason, self.tries[cell.digest])
                self._failed(cell, reason)

    def _done(self, cell: Cell, where: str = "") -> None:
        self.store.forgive(cell)
        summary = self.store.summary(cell)
        self._line("done", cell, f"{where}{scores(summary)}; {duration(summary.get('seconds', 0.0))}")
        if cell.attack is None and differs(self.store, cell):
            self.say(f"warning: {cell.label} differs from its published summary; this machine computes other bits")
        for defense in self.behind.pop(cell.digest, []):
            self._line_up(defense)

    def _failed(self, cell: Cell, reason: str) -> None:
        self.failures.append((cell, reason))
        self._line("failed", cell, f"{reason}; see {self.store.errors(cell)}")
        for defense in self.behind.pop(cell.digest, []):
            self.failures.append((defense, "its attack failed"))
            self._line("blocked", defense, "its attack failed")

    def _line(self, word: str, cell: Cell, text: str) -> None:
        self.ended += 1
        self.say(f"[{self.ended}/{len(self.cells)}] {word:7} {cell.label}: {text}")


def scores(summary: Mapping[str, Any]) -> str:
    """ACC and ASR of a summary, those after the defense if it is one."""
    found = summary.get("after", summary)
    parts = [f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr") if found.get(name) is not None]
    return ", ".join(parts)
