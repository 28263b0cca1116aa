"""A small grid, and an engine whose cells end as they are told."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sau.grid.engines import Cell, Local, Outcome
from sau.grid.plan import cells, read
from sau.grid.store import Store
from sau.record.folder import Record

SMALL = """
dataset: digits
attacks: [badnet, prototype]
defenses: [ft, clp]
ratios: [0.1]
clean_shares: [0.1]
overrides:
  attack: {width: 2, epochs: 1}
  ft: {epochs: 1}
"""


def plan(file: Path, text: str = SMALL) -> list[Cell]:
    """The cells of a grid file with that text."""
    file.write_text(text)
    return cells(read(file).blocks)


def finish(store: Store, cell: Cell, **summary: Any) -> None:
    """Leave a record as a finished cell does."""
    record = Record(store.folder(cell))
    record.begin({}, {"cell": cell.digest}, overwrite=False)
    record.finish({"acc": 90.0, "asr": 1.0, "seconds": 4.0, "peak_memory_mb": 100.0, **summary})


class Scripted(Local):
    """An engine on which the tries of a cell, by its label, end as in `script`; others finish."""

    def __init__(self, store: Store, script: dict[str, list[Outcome | OSError]]) -> None:
        self.store, self.script = store, script
        self.order: list[str] = []
        self.places, self.stopped = 1, False

    def submit(self, cell: Cell) -> Future[Outcome]:
        self.order.append(cell.label)
        left, future = self.script.get(cell.label), Future[Outcome]()
        outcome = left.pop(0) if left else Outcome("finished")
        if isinstance(outcome, OSError):
            future.set_exception(outcome)
            return future
        if outcome.reason == "finished":
            finish(self.store, cell)
        future.set_result(outcome)
        return future

    def stop(self) -> None:
        self.stopped = True
