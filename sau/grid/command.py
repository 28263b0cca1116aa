"""A whole comparison: attacks x defenses x seeds x ratios, from one file; docs/grid.md is its guide.

    sau grid configs/grid/NAME.yaml [flags]           run what is not finished yet
    sau grid status configs/grid/NAME.yaml [flags]    where it stands, from any terminal

Repeat the command after whatever stopped it: finished cells are verified and skipped, unfinished ones resumed, those
that failed tried again.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sau.data.sources import source
from sau.errors import ConfigError
from sau.files import acquire
from sau.grid.engines import Local, RayEngine
from sau.grid.plan import cells, select
from sau.grid.runner import Runner, needed, status
from sau.grid.spec import Grid, read
from sau.grid.store import Cell, Store, publish
from sau.tools import Parser
from sau.util import duration

say = partial(print, flush=True)


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
            source(dataset).find(Path(place))  # refuses missing data, and downloads once for all cells
        engine = Local(todo, given.cores, given.memory_gb) if local else RayEngine(todo, given.address, given.cores)
        Runner(todo, store, engine, retries=grid.retries, timeout=grid.cell_timeout, say=say).run()
        say(f"took {duration(time.monotonic() - started)}")
    say("\n".join(status(every, store)))
    return int(any(store.state(cell) == "waiting" for cell in every))


def main(argv: Sequence[str]) -> int:
    """Run or look; exit status 1 if a cell failed."""
    look = list(argv[:1]) == ["status"]
    return run(parser().parse_args(argv[look:]), look)
