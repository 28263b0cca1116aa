"""A whole comparison: attacks x defenses x seeds x ratios, from one file; docs/grid.md is its guide.

    sau grid configs/grid/NAME.yaml [flags]           run what is not finished yet
    sau grid status configs/grid/NAME.yaml [flags]    where it stands, from any terminal

Repeat the command after whatever stopped it: finished cells are verified and skipped, unfinished ones resumed, those
that failed tried again.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sau.data.sources import load
from sau.errors import ConfigError, first_line
from sau.files import acquire
from sau.grid.engines import Job, Local, Outcome, RayEngine
from sau.grid.plan import cells, select
from sau.grid.spec import Grid, read
from sau.grid.store import Cell, Store, publish
from sau.tools import Parser
from sau.util import duration

say = partial(print, flush=True)


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
            self.say(f"retry   {cell.label}: {outcome.reason}; try {self.tries[cell.digest] + 1} of {self.retries + 1}")
            self.waiting.insert(0, cell)
        else:
            self._end(cell, False, f"{outcome.reason}; see {self.store.log(cell)}.err")

    def _done(self, cell: Cell) -> None:
        summary, kept = self.store.summary(cell), self.store.kept.get(cell.folder, {})
        self._end(cell, True, f"{scores(summary)}; {duration(summary.get('seconds', 0.0))}")
        if kept and any(kept.get(name) != summary.get(name) for name in ("acc", "asr", "racc", "after")):
            self.say(f"warning: {cell.label} differs from its published result; as on another processor")

    def _end(self, cell: Cell, finished: bool, text: str) -> None:
        self.ended[cell.digest] = finished
        self.say(f"[{len(self.ended)}/{len(self.cells)}] {'done' if finished else 'failed':7} {cell.label}: {text}")


def scores(summary: Mapping[str, Any]) -> str:
    """ACC and ASR of a summary, those after the defense if it is one."""
    found = summary.get("after", summary)
    return ", ".join(f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr") if found.get(name) is not None)


def parser() -> argparse.ArgumentParser:
    """The flags; those that the file has, too, beat it."""
    flags = Parser(__doc__, prog="sau grid")
    add = flags.add_argument
    add("file", type=Path, help="the grid, like configs/grid/table1_cpu.yaml")
    add("--record_root", help="folder of the cells [that of the file, or ./record/grid]")
    add("--dataset_path", help="folder of the data sets [that of the file, or ./data]")
    add(
        "--published", action="append", metavar="FILE",
        help="results (.jsonl) that count as finished cells, or none [those of the file]",
    )  # fmt: skip
    add("--only", action="append", default=[], metavar="PATTERN", help="cells whose label or method fits")
    add("--dry_run", action="store_true", help="print the cells that would run, and run nothing")
    add("--retries", type=int, help="tries after a crash or a timeout [that of the file, or 1]")
    add("--cell_timeout", type=float, metavar="SECONDS", help="most time of a try [no limit]")
    add("--publish", type=Path, metavar="FILE", help="add results of finished cells to a .jsonl file, run nothing")
    add("--engine", choices=("local", "ray"), help="what runs the cells [local]")
    add("--cores", type=int, help="cores to use, also of a Ray that is started here [all]")
    add("--memory_gb", type=float, help="local: GiB to use [nine tenths of the machine's]")
    add("--address", help="ray: a running cluster, `auto` for the one of this machine [start one here]")
    return flags


def run(given: argparse.Namespace, look: bool) -> int:
    """Do what the flags ask; the exit status."""
    check(given)
    grid = read(given.file)
    keys = [key for key in ("record_root", "retries", "cell_timeout") if getattr(given, key) is not None]
    grid = replace(grid, **{key: getattr(given, key) for key in keys})
    place = {"dataset_path": given.dataset_path} if given.dataset_path else {}
    every = cells([replace(block, **place) for block in grid.blocks])
    every = select(every, given.only) if given.only else every
    names = given.published or grid.published
    store = Store(Path(grid.record_root), () if names == ["none"] else [Path(name).absolute() for name in names])
    if look:
        say("\n".join(status(every, store)))
        return 0
    if given.publish:
        say(f"{publish(store, every, given.publish)} results of {len(every)} cells are in {given.publish}")
        return 0
    if given.dry_run:
        todo = needed(every, store)
        say("\n".join([*(f"would run {cell.label}" for cell in todo), f"{len(todo)} cells"]))
        return 0
    return drive(given, grid, store, every)


def check(given: argparse.Namespace) -> None:
    """Refuse, by a ConfigError, values out of range and files that are not there."""
    for name in ("cores", "memory_gb", "cell_timeout"):
        value = getattr(given, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} is {value:g}, allowed is above 0")
    for name in given.published or ():
        if name != "none" and not Path(name).is_file():
            raise ConfigError(f"--published {name} is no file; name one that is there, or none")


def drive(given: argparse.Namespace, grid: Grid, store: Store, every: list[Cell]) -> int:
    """Run the cells that are left; 1 if a cell is not finished then. Ctrl-C goes through, after they were stopped."""
    started = time.monotonic()
    acquire(store.root)
    store.verify(every)
    todo = needed(every, store)
    say(f"{len(every)} cells, {len(todo)} to run; {store.root}")
    if todo:
        local = given.engine != "ray"
        for dataset, place in dict.fromkeys(cell.data for cell in todo) if local else ():
            load(dataset, place)  # refuses missing data, downloads and decodes once for all cells
        engine = Local(todo, given.cores, given.memory_gb) if local else RayEngine(todo, given.address, given.cores)
        Runner(todo, store, engine, retries=grid.retries, timeout=grid.cell_timeout, say=say).run()
        say(f"took {duration(time.monotonic() - started)}")
    say("\n".join(status(every, store)))
    return int(any(store.state(cell) == "waiting" for cell in every))


def main(argv: Sequence[str]) -> int:
    """Run or look; exit status 1 if a cell failed."""
    look = list(argv[:1]) == ["status"]
    return run(parser().parse_args(argv[look:]), look)
