"""The order of cells: attacks before their defenses, retries, and a line for each cell that ends."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from sau.errors import first_line
from sau.grid.engines import Job, Local, Outcome, RayEngine
from sau.grid.store import Cell, Store
from sau.util import duration


def needed(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """The cells to run: those without a result, and the attacks whose weights their defenses need."""
    todo = {cell.digest for cell in cells if not store.finished(cell) and cell.folder not in store.kept}
    attacks = {cell.attack for cell in cells if cell.digest in todo}
    todo |= {cell.digest for cell in cells if cell.digest in attacks and not store.finished(cell)}
    return [cell for cell in cells if cell.digest in todo]


def status(cells: Sequence[Cell], store: Store) -> list[str]:
    """Counts, what runs, and what is left to do, from the disk alone."""
    states = [store.state(cell) for cell in cells]
    names = ("finished", "published", "running", "waiting")
    lines = [f"{len(cells)} cells: " + ", ".join(f"{states.count(name)} {name}" for name in names if name in states)]
    lines += [f"running {cell.label}" for cell, state in zip(cells, states, strict=True) if state == "running"]
    left = len(needed(cells, store))
    return [*lines, f"left: {left} cells"] if left else lines


class Runner:
    """Runs cells on an engine until all are finished or failed.

    Args:
        cells: to run, attacks before their defenses; see `needed`.
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

    def run(self) -> list[Cell]:
        """Run everything; returns the cells that did not finish. The engine is stopped at the end."""
        try:
            while self.waiting or self.running:
                self._submit()
                for future in wait(self.running, return_when=FIRST_COMPLETED).done:
                    self._check(self.running.pop(future), future)
        finally:
            self.engine.stop()
        return [cell for cell in self.cells if not self.ended[cell.digest]]

    def _submit(self) -> None:
        """Start what can be started; the rest stays waiting."""
        todo = {cell.digest for cell in self.cells}
        for cell in [*self.waiting]:
            ready = cell.attack not in todo or self.ended.get(cell.attack)
            if ready is False:
                self._end(cell, False, "its attack failed")
            elif ready and len(self.running) < self.engine.places:
                self.running[self.engine.submit(self._job(cell))] = cell
            else:
                continue
            self.waiting.remove(cell)

    def _job(self, cell: Cell) -> Job:
        command = (cell.kind, cell.name, f"--record_root={self.store.root}", *cell.flags)
        log, needs = str(self.store.log(cell)), (cell.threads, cell.memory_gb, cell.gpus, self.timeout)
        return Job(cell.label, command, log, self.store.cache, *needs)

    def _check(self, cell: Cell, future: Future[Outcome]) -> None:
        """What became of a cell whose process has ended, by the record that it left."""
        try:
            outcome = future.result()
        except self.engine.lost as error:
            outcome = Outcome(f"worker lost: {first_line(error)}")
        if self.store.finished(cell):
            return self._done(cell)
        self.tries[cell.digest] += 1
        if outcome.again and self.tries[cell.digest] <= self.retries:
            self.say(f"again   {cell.label}: {outcome.reason}; try {self.tries[cell.digest] + 1} of {self.retries + 1}")
            self.waiting.insert(0, cell)
        else:
            self._end(cell, False, f"{outcome.reason}; see {self.store.log(cell)}.err")

    def _done(self, cell: Cell) -> None:
        summary, kept = self.store.summary(cell), self.store.kept.get(cell.folder, {})
        self._end(cell, True, f"{scores(summary)}; {duration(summary.get('seconds', 0.0))}")
        if kept and any(kept.get(name) != summary.get(name) for name in ("acc", "asr", "racc", "after")):
            self.say(f"warning: {cell.label} differs from its published result; this machine computes other bits")

    def _end(self, cell: Cell, finished: bool, text: str) -> None:
        self.ended[cell.digest] = finished
        self.say(f"[{len(self.ended)}/{len(self.cells)}] {'done' if finished else 'failed':7} {cell.label}: {text}")


def scores(summary: Mapping[str, Any]) -> str:
    """ACC and ASR of a summary, those after the defense if it is one."""
    found = summary.get("after", summary)
    return ", ".join(f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr") if found.get(name) is not None)
