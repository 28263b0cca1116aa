"""A whole comparison: attacks x defenses x seeds x ratios, from one file; docs/grid.md is its guide.

    sau grid configs/grid/NAME.yaml [flags]           run what is not finished yet
    sau grid status configs/grid/NAME.yaml [flags]    where it stands, from any terminal

Repeat the command after whatever stopped it: finished cells are verified and skipped, unfinished ones resumed.
"""

import argparse
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path

from sau.command.arguments import Parser
from sau.data.sources import source
from sau.errors import ConfigError, RecordError
from sau.formatting import duration
from sau.grid.engines import Engine, Local, RayEngine
from sau.grid.plan import Cell, cells, select
from sau.grid.publish import of_others, publish
from sau.grid.runner import Runner, needed
from sau.grid.spec import Grid, read
from sau.grid.status import status
from sau.grid.store import Store


def say(text: str) -> None:
    """Print a line at once, whoever reads it."""
    print(text, flush=True)


def parser() -> argparse.ArgumentParser:
    """The flags; those that the file says too beat it."""
    asked = Parser(__doc__, prog="sau grid")
    asked.add_argument("file", type=Path, help="the grid, like configs/grid/table1_cpu.yaml")
    asked.add_argument("--record_root", help="folder of the cells [what the file says, or ./record/grid]")
    asked.add_argument("--dataset_path", help="folder of the data sets [what the file says, or ./data]")
    asked.add_argument(
        "--published",
        action="append",
        metavar="FILE",
        help="summaries (.jsonl) that count as finished cells, or none [what the file says]",
    )
    asked.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="cells whose label or method fits"
    )
    asked.add_argument("--dry_run", action="store_true", help="print the cells that would run, and run nothing")
    asked.add_argument("--retry_failed", action="store_true", help="also run cells that failed in an earlier call")
    asked.add_argument("--retries", type=int, help="tries after a crash or a timeout [what the file says, or 1]")
    asked.add_argument("--cell_timeout", type=float, metavar="SECONDS", help="most time of a try [no limit]")
    asked.add_argument(
        "--publish", type=Path, metavar="FILE", help="add finished cells' summaries to a .jsonl file, run nothing"
    )
    asked.add_argument("--engine", choices=("local", "ray"), help="what runs the cells [local]")
    asked.add_argument("--cores", type=int, help="cores to use, also of a Ray that is started here [all]")
    asked.add_argument("--memory_gb", type=float, help="local: GiB to use [nine tenths of the machine's]")
    asked.add_argument("--address", help="ray: a running cluster, `auto` for the one of this machine [start one here]")
    return asked


def refuse_idle(asked: argparse.Namespace, look: bool) -> None:
    """Refuse, by a ConfigError, what would have no effect."""
    where = ("engine", "cores", "memory_gb", "address")
    runs = ("retry_failed", "retries", "cell_timeout", *where)
    for what, is_asked, idle in (
        ("status, which only looks", look, ("dry_run", "publish", *runs)),
        ("--publish, which runs nothing", asked.publish is not None, ("dry_run", *runs)),
    ):
        for name in idle:
            if is_asked and getattr(asked, name) is not None and getattr(asked, name) is not False:
                raise ConfigError(f"--{name} has no effect on {what}; leave it out")
    asked.engine = asked.engine or "local"
    started = asked.engine == "ray" and asked.address is None
    for name, acts, place in (
        ("cores", asked.engine == "local" or started, "with --engine local, and with a Ray that is started here"),
        ("memory_gb", asked.engine == "local", "with --engine local; a cluster knows its own"),
        ("address", asked.engine == "ray", "with --engine ray"),
    ):
        if getattr(asked, name) is not None and not acts:
            raise ConfigError(f"--{name} has an effect only {place}; leave it out")


def run(asked: argparse.Namespace, look: bool) -> int:
    """Do what was asked; the exit status."""
    started = time.monotonic()
    for name in ("cores", "memory_gb", "cell_timeout"):
        value = getattr(asked, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"--{name} is {value:g}, allowed is above 0")
    refuse_idle(asked, look)
    grid, blocks = read(asked.file)
    if asked.dataset_path:
        blocks = [dataclasses.replace(block, dataset_path=asked.dataset_path) for block in blocks]
    said = ("record_root", "retries", "cell_timeout")
    grid = dataclasses.replace(grid, **{n: getattr(asked, n) for n in said if getattr(asked, n) is not None})
    every = cells(blocks)
    store = Store(Path(grid.record_root), published(asked, grid))
    if asked.only:
        every = select(every, asked.only)
    other = store.other_version()
    if look:
        print("\n".join([f"note: {other}"] * bool(other) + of_others(store, every) + status(every, store)))
        return 0
    if asked.publish:
        if asked.publish.is_dir():
            raise ConfigError(f"--publish {asked.publish} is a folder; name a file, like {asked.publish}.jsonl")
        count, notes = publish(store, every, asked.publish)
        say("\n".join([*notes, f"{count} summaries of {len(every)} cells are in {asked.publish}"]))
        return 0
    if other:
        raise RecordError(other)
    if asked.dry_run:
        return dry_run(needed(every, store, asked.retry_failed), asked)
    for note in store.prepare(every) + of_others(store, every):
        say(note)
    todo = needed(every, store, asked.retry_failed)
    if asked.engine == "local" and todo:
        find_data(todo)
    say(f"{len(every)} cells, {len(todo)} to run (planned in {time.monotonic() - started:.1f} s); {store.root}")
    return drive(asked, grid, store, every, todo) if todo else report(every, store)


def published(asked: argparse.Namespace, grid: Grid) -> tuple[Path, ...]:
    """The files of summaries that count as finished cells; those that the grid names need not be there yet."""
    if asked.published == ["none"]:
        return ()
    for place in asked.published or ():
        if not Path(place).is_file():
            raise ConfigError(f"--published {place} is no file; name one that is there, or none")
    return tuple(Path(place).absolute() for place in asked.published or grid.published)


def find_data(todo: list[Cell]) -> None:
    """Refuse, by a DataError, what every one of these cells would fail of; what can be downloaded is, once for all."""
    for dataset, place in dict.fromkeys(cell.data for cell in todo):
        source(dataset).find(Path(place))


def dry_run(todo: list[Cell], asked: argparse.Namespace) -> int:
    """Print what would run, and whether this machine could hold it where the cells run here."""
    if asked.address is None and todo:
        try:
            Local(asked.cores, asked.memory_gb).check(todo)
        except ConfigError as error:  # the plan may be for another machine
            say(f"note: {error}")
    for cell in todo:
        say(f"would run {cell.label}")
    say(f"{len(todo)} cells")
    return 0


def drive(asked: argparse.Namespace, grid: Grid, store: Store, every: list[Cell], todo: list[Cell]) -> int:
    """Run the cells that are left; Ctrl-C goes through, after all of them were stopped."""
    started = time.monotonic()
    local = asked.engine == "local"
    where: Engine = Local(asked.cores, asked.memory_gb) if local else RayEngine(asked.address, asked.cores)
    runner = Runner(todo, store, where, retries=grid.retries, timeout=grid.cell_timeout, say=say)
    runner.run()
    say(f"took {duration(time.monotonic() - started)}")
    return report(every, store)


def report(every: list[Cell], store: Store) -> int:
    """Say where the grid stands; 1 if a cell has failed."""
    print("\n".join(status(every, store)), flush=True)
    return int(not all(state.over for state in store.states(every).values()))


def main(argv: Sequence[str]) -> int:
    """Run or look; exit status 1 if a cell failed, or as `run_command` says."""
    look = argv[:1] == ["status"]
    asked = parser().parse_args(argv[look:])
    return run(asked, look)
