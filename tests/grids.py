"""A small grid, and an engine that does as it is told."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sau.grid.cells import Job, Outcome
from sau.grid.plan import Cell
from sau.grid.store import Store
from sau.record.folder import Record
from sau.record.lock import acquire, release

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


def finish(store: Store, cell: Cell, **summary: Any) -> None:
    """Leave a record as a finished cell does."""
    record = Record(store.folder(cell))
    record.begin({}, {"cell": cell.digest}, overwrite=False)
    record.finish({"acc": 90.0, "asr": 1.0, "seconds": 4.0, "peak_memory_mb": 100.0, **summary})


@contextmanager
def used(store: Store, *cells: Cell) -> Iterator[None]:
    """Lock the folders of cells, as processes that run them do."""
    for cell in cells:
        acquire(store.folder(cell))
    yield
    for cell in cells:
        release(store.folder(cell))


class Scripted:
    """An engine on which the tries of a cell, by its label, end as they are told; others finish."""

    def __init__(self, store: Store, script: dict[str, list[Outcome]] | None = None, room: int = 2) -> None:
        self.store, self.script, self.slots = store, script or {}, room
        self.running: list[Cell] = []
        self.order: list[str] = []
        self.stopped = False

    def check(self, cells: Sequence[Cell]) -> None:
        pass

    def room(self, cell: Cell) -> bool:
        return len(self.running) < self.slots

    def submit(self, cell: Cell, job: Job) -> None:
        assert not any(other.digest == cell.digest for other in self.running)
        self.running.append(cell)
        self.order.append(cell.label)

    def poll(self) -> list[tuple[Cell, Outcome]]:
        done = []
        for cell in self.running:
            told = self.script.get(cell.label)
            outcome = told.pop(0) if told else Outcome("done")
            if outcome.status == "done":
                finish(self.store, cell)
            done.append((cell, outcome))
        self.running = []
        return done

    def stop(self) -> None:
        self.stopped = True
