"""The order of cells: attacks before their defenses, retries, other runners; and a line for each cell that ends."""

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from sau.errors import RecordError, first_line
from sau.files import in_use
from sau.grid.engines import Job, Local, Outcome, RayEngine
from sau.grid.store import Cell, Store
from sau.util import duration

POLL = 0.1  # seconds between two looks at what runs
ELSEWHERE = 2.0  # seconds until a cell that another runner has is looked at again
_FULL = ("no room for ", os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT))  # as `files.write` and the system say it


def needed(cells: Sequence[Cell], store: Store, retry_failed: bool = False) -> list[Cell]:
    """The cells to run: neither finished nor failed before, and the attacks whose weights their defenses need."""
    states = store.states(cells)
    wanted = {"running", "waiting", *(("failed", "blocked") if retry_failed else ())}
    todo = {cell.digest for cell in cells if states[cell.digest].name in wanted and cell.folder not in store.kept}
    attacks = {cell.attack for cell in cells if cell.digest in todo}
    todo |= {cell.digest for cell in cells if cell.digest in attacks and not store.finished(cell)}
    return [cell for cell in cells if cell.digest in todo]


def status(cells: Sequence[Cell], store: Store) -> list[str]:
    """Counts, what runs, what failed and why, and what is left to do, from the disk alone."""
    states = store.states(cells)
    names = ("finished", "published", "running", "waiting", "failed", "blocked")
    counts = Counter(state.name for state in states.values())
    lines = [f"{len(cells)} cells: " + ", ".join(f"{counts[name]} {name}" for name in names if counts[name])]
    for cell in cells:
        state = states[cell.digest]
        if state.name == "running":
            lines.append(f"running {cell.label}")
        elif state.name == "failed":
            lines.append(f"failed  {cell.label}: {state.reason}; see {store.log(cell)}.err")
    left = len(needed(cells, store))
    return [*lines, f"left: {left} cells"] if left else lines


class Runner:
    """Runs cells on an engine until all are finished or failed for good.

    Args:
        cells: to run, attacks before their defenses; see `needed`. Earlier failures of theirs are forgotten.
        store: where they lie.
        engine: what runs them.
        retries: tries after the first one.
        timeout: seconds of a try; None means no limit.
        say: prints a line.
    """

    def __init__(
        self, cells: Sequence[Cell], store: Store, engine: Local | RayEngine, *, retries: int, timeout: float | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.cells, self.store, self.engine, self.say = cells, store, engine, say
        self.retries, self.timeout = retries, timeout
        self.waiting = list(cells)
        self.running: dict[Future[Outcome], Cell] = {}
        self.ended: dict[str, bool] = {}  # by digest: whether the cell is finished
        self.tries: Counter[str] = Counter()
        self.later: dict[str, float] = {}  # by digest: not to be looked at before

    def run(self) -> list[Cell]:
        """Run everything; returns the cells that failed or were blocked. The engine is stopped at the end.

        RecordError if the disk is full: all cells would fail of it, and none of them is to blame.
        """
        try:
            self.engine.check([self._job(cell) for cell in self.cells])
            for cell in self.cells:
                self.store.forgive(cell)
            while self.waiting or self.running:
                self._submit()
                for future in [future for future in self.running if future.done()]:
                    self._ended(self.running.pop(future), self._outcome(future))
                time.sleep(POLL)
        finally:
            self.engine.stop()
        return [cell for cell in self.cells if not self.ended[cell.digest]]

    def _submit(self) -> None:
        """Start what can be started, and leave the rest waiting."""
        todo = {cell.digest for cell in self.cells}
        waiting, self.waiting = self.waiting, []
        for number, cell in enumerate(waiting):
            ready = cell.attack not in todo or self.ended.get(cell.attack)
            if self.ended.get(cell.attack or "") is False:
                self._end(cell, False, "blocked", "its attack failed")
            elif not ready or self.later.get(cell.digest, 0.0) > time.monotonic():
                self.waiting.append(cell)
            elif self.store.finished(cell):  # by another runner
                self._end(cell, True, "done", f"elsewhere: {scores(self.store.summary(cell))}")
            elif reason := self.store.failure(cell):  # of another runner, after all its tries
                self._end(cell, False, "failed", f"elsewhere: {reason}")
            elif in_use(self.store.folder(cell)):
                self._wait(cell, "another process runs it")
            elif self.engine.room(job := self._job(cell)):
                self.running[self.engine.submit(job)] = cell
            else:
                self.waiting += waiting[number:]
                return

    def _job(self, cell: Cell) -> Job:
        command = (cell.kind, cell.name, f"--record_root={self.store.root}", *cell.flags)
        needs = (cell.threads, cell.memory_gb, cell.gpus, self.timeout)
        folder, log = str(self.store.folder(cell)), str(self.store.log(cell))
        return Job(cell.label, command, folder, log, self.store.cache, *needs)

    def _wait(self, cell: Cell, reason: str) -> None:
        if cell.digest not in self.later:
            self.say(f"waits   {cell.label}: {reason}")
        self.later[cell.digest] = time.monotonic() + ELSEWHERE
        self.waiting.append(cell)

    def _outcome(self, future: Future[Outcome]) -> Outcome:
        try:
            return future.result()
        except self.engine.lost as error:
            return Outcome("failed", f"worker lost: {first_line(error)}")

    def _ended(self, cell: Cell, outcome: Outcome) -> None:
        if self.store.finished(cell):  # however its process ended after that
            return self._done(cell)
        if outcome.status == "locked":
            return self._wait(cell, outcome.reason)
        reason = outcome.reason or "it ended without a result"
        if any(words in reason for words in _FULL):
            raise RecordError(f"the disk is full ({cell.label}: {reason}); free some space and repeat the command")
        self.tries[cell.digest] += 1
        if outcome.again and self.tries[cell.digest] <= self.retries:
            self.say(f"again   {cell.label}: {reason}; try {self.tries[cell.digest] + 1} of {self.retries + 1}")
            self.waiting.insert(0, cell)
        else:
            self.store.fail(cell, reason)
            self._end(cell, False, "failed", f"{reason}; see {self.store.log(cell)}.err")

    def _done(self, cell: Cell) -> None:
        summary, kept = self.store.summary(cell), self.store.kept.get(cell.folder, {})
        self._end(cell, True, "done", f"{scores(summary)}; {duration(summary.get('seconds', 0.0))}")
        if kept and any(kept.get(name) != summary.get(name) for name in ("acc", "asr", "racc", "after")):
            self.say(f"warning: {cell.label} differs from its published result; this machine computes other bits")

    def _end(self, cell: Cell, finished: bool, word: str, text: str) -> None:
        self.ended[cell.digest] = finished
        self.say(f"[{len(self.ended)}/{len(self.cells)}] {word:7} {cell.label}: {text}")


def scores(summary: Mapping[str, Any]) -> str:
    """ACC and ASR of a summary, those after the defense if it is one."""
    found = summary.get("after", summary)
    return ", ".join(f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr") if found.get(name) is not None)
