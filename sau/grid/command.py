"""A whole comparison: attacks x defenses x seeds x ratios, from one file; docs/grid.md is its guide.

    sau grid configs/grid/NAME.yaml [flags]           run what is not finished yet
    sau grid status configs/grid/NAME.yaml [flags]    where it stands, from any terminal

Repeat the command after whatever stopped it: finished cells are verified and skipped, unfinished ones resumed, those
that failed tried again.
"""

import argparse
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from functools import partial
from pathlib import Path

from sau.config import Setting, values, written
from sau.data.sources import load
from sau.errors import ConfigError, first_line
from sau.files import acquire
from sau.grid.engines import Cell, Local, Outcome, RayEngine
from sau.grid.plan import GRID, Grid, cells, read, select
from sau.grid.store import Store, publish
from sau.loop import duration
from sau.record.folder import Record
from sau.settings import Parser

say = partial(print, flush=True)
OF_FILE = ("record_root", "retries", "cell_timeout")  # keys of the file that are flags as well


def needed(cells: Sequence[Cell], store: Store) -> list[Cell]:
    """The cells to run: those without a result, and the attacks whose weights their defenses need."""
    todo = {cell.digest for cell in cells if not (store.finished(cell) or cell.folder in store.kept)}
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


def run_cells(cells: Sequence[Cell], store: Store, engine: Local | RayEngine, retries: int) -> list[Cell]:
    """Run cells, attacks before their defenses, until each is finished or has failed at `retries` further tries, and
    stop the engine; returns those that failed."""
    waiting, running, tries = list(cells), dict[Future[Outcome], Cell](), Counter[str]()
    todo, ended = {cell.digest for cell in cells}, dict[str | None, bool]()

    def end(cell: Cell, text: str, finished: bool = False) -> None:
        ended[cell.digest] = finished
        say(f"[{len(ended)}/{len(cells)}] {'done' if finished else 'failed':7} {cell.label}: {text}")

    try:
        while waiting or running:
            for cell in [*waiting]:
                ready = cell.attack not in todo or ended.get(cell.attack)
                if ready is False:
                    end(cell, "its attack failed")
                elif ready and len(running) < engine.places:
                    running[engine.submit(cell)] = cell
                else:
                    continue
                waiting.remove(cell)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, error = running.pop(future), future.exception()  # a process, a worker or its machine is lost
                outcome = Outcome(f"worker lost: {first_line(error)}") if error else future.result()
                tries[cell.digest] += 1
                if store.finished(cell):
                    end(cell, _scores(cell, store), True)
                elif outcome.again and tries[cell.digest] <= retries:
                    say(f"retry   {cell.label}: {outcome.reason}; try {tries[cell.digest] + 1} of {retries + 1}")
                    waiting.insert(0, cell)
                else:
                    end(cell, f"{outcome.reason}; see {cell.log(store.root)}.err")
    finally:
        engine.stop()
    return [cell for cell in cells if not ended[cell.digest]]


def _scores(cell: Cell, store: Store) -> str:
    """ACC and ASR (after the defense, if it is one), and whether they are not those that were published."""
    summary, kept = Record(store.folder(cell)).summary(), store.kept.get(cell.folder, {})
    found = summary.get("after", summary)
    scores = [f"{name.upper()} {found[name]:.2f}" for name in ("acc", "asr") if found.get(name) is not None]
    text = f"{', '.join(scores)}; {duration(summary.get('seconds', 0.0))}"
    text += "" if summary.get("gate", {}).get("passed", True) else "; the attack did not take"
    if kept and any(kept.get(name) != summary.get(name) for name in ("acc", "asr", "racc")):
        text += "; warning: it differs from the published result, as on another processor"
    return text


def main(argv: Sequence[str]) -> int:
    """Run or look; exit status 1 if a cell failed. Flags beat the file."""
    flags = Parser(__doc__, prog="sau grid")
    add = flags.add_argument
    add("file", type=Path, help="the grid, like configs/grid/table1_cpu.yaml")
    for name in OF_FILE:
        add(f"--{name}", help=f"{GRID[name].about} [that of the file, or {written(GRID[name].default)}]")
    add("--dataset_path", help="folder of the data sets [that of the file, or ./data]")
    add("--published", action="append", metavar="FILE", help="finished cells (.jsonl), or none [those of the file]")
    add("--only", action="append", default=[], metavar="PATTERN", help="cells whose label or method fits")
    add("--dry_run", action="store_true", help="print the cells that would run, and run nothing")
    add("--publish", type=Path, metavar="FILE", help="add results of finished cells to a .jsonl file, run nothing")
    add("--engine", choices=("local", "ray"), default="local", help="what runs the cells [local]")
    add("--cores", type=int, help="cores to use, also of a Ray that is started here [all]")
    add("--memory_gb", type=float, help="local: GiB to use [nine tenths of the machine's]")
    add("--address", help="ray: a running cluster, `auto` for the one of this machine [start one here]")
    look = list(argv[:1]) == ["status"]
    given = flags.parse_args(argv[look:])
    settings = {name: Setting(getattr(given, name), f"--{name}") for name in OF_FILE if getattr(given, name)}
    grid = replace(read(given.file), **values(settings, GRID))
    every = cells([replace(block, dataset_path=given.dataset_path or block.dataset_path) for block in grid.blocks])
    every = select(every, given.only) if given.only else every
    kept = [Path(name) for name in given.published or grid.published if name != "none"]
    if given.published and (missing := [file for file in kept if not file.is_file()]):
        raise ConfigError(f"--published {missing[0]} is no file; name one that is there, or none")
    store = Store(Path(grid.record_root), kept)
    if look:
        say("\n".join(status(every, store)))
    elif given.publish:
        say(f"{publish(store, every, given.publish)} results of {len(every)} cells are in {given.publish}")
    elif given.dry_run:
        todo = needed(every, store)
        say("\n".join([*(f"would run {cell.label}" for cell in todo), f"{len(todo)} cells"]))
    else:
        return drive(given, grid, store, every)
    return 0


def drive(given: argparse.Namespace, grid: Grid, store: Store, every: list[Cell]) -> int:
    """Run the cells that are left; 1 if a cell is not finished then. Ctrl-C goes through, once they are stopped."""
    started = time.monotonic()
    acquire(store.root)
    store.verify(every)
    todo = needed(every, store)
    say(f"{len(every)} cells, {len(todo)} to run; {store.root}")
    if todo:
        cache = os.environ.get("SAU_CACHE") or store.root / ".grid" / "cache"  # of all cells, and of `load` here
        os.environ["SAU_CACHE"] = cache = os.path.abspath(os.path.expanduser(cache))
        how = {"root": store.root, "cache": cache, "timeout": grid.cell_timeout}
        if given.engine == "local":
            for dataset, place in dict.fromkeys(cell.data for cell in todo):
                load(dataset, place)  # refuses missing data, downloads and decodes once for all cells
            engine: Local | RayEngine = Local(todo, how, grid.memory_gb, given.cores, given.memory_gb)
        else:
            engine = RayEngine(todo, how, grid.memory_gb, given.cores, given.address)
        run_cells(todo, store, engine, grid.retries)
        say(f"took {duration(time.monotonic() - started)}")
    say("\n".join(status(every, store)))
    return int(any(store.state(cell) == "waiting" for cell in every))
