"""What is known of cells from the disk alone: which are finished, running or failed, and what they cost."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import sau
from sau.errors import RecordError
from sau.files import write
from sau.grid.cells import Job
from sau.grid.plan import Cell
from sau.record.folder import MANIFEST, SUMMARY, Record
from sau.record.lock import Holder, holder

SAMPLE = 20  # like cells whose cost is looked at


@dataclass(frozen=True)
class State:
    """Where a cell stands.

    Args:
        name: finished, published (its summary is kept, its weights are not), running, failed, blocked (its attack
            failed) or waiting.
        reason: of a failure.
        who: runs it.
    """

    name: str
    reason: str = ""
    who: Holder | None = None

    @property
    def over(self) -> bool:
        """Whether the result is there."""
        return self.name in ("finished", "published")


@dataclass(frozen=True)
class Cost:
    """What like cells took, as means; None where none is recorded."""

    seconds: float | None
    memory_mb: float | None
    disk_bytes: float | None


@dataclass
class Store:
    """The record root of a grid and its folders of published summaries.

    Args:
        root: folder of the cells; `.grid` in it holds locks, logs and failures.
        published: folders with the same names that hold summaries; the first one that has a cell counts.
    """

    root: Path
    published: tuple[Path, ...] = ()
    own: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.root.absolute()
        self.own = self.root / ".grid"

    def folder(self, cell: Cell) -> Path:
        """Where the cell's record lies."""
        return self.root / cell.folder

    def job(self, cell: Cell, timeout: float | None) -> Job:
        """The cell as an engine gets it."""
        flags = (f"--record_root={self.root}", *cell.flags)
        folder, lock, log = self.folder(cell), self.own / "locks" / _key(cell), self.own / "logs" / _key(cell)
        return Job(cell.kind, cell.name, flags, str(folder), str(lock), str(log), cell.threads, timeout)

    def prepare(self, cells: Sequence[Cell]) -> list[str]:
        """Make the folder ready; returns what there is to say.

        Finished cells are compared with their manifests; a damaged one is opened again, so that it is made anew.
        RecordError if another version made cells here, if a published summary is none, or if nothing can be written.
        """
        stamp = self.own / "version.json"
        made = self._read(stamp).get("sau", sau.__version__)
        if made != sau.__version__:
            raise RecordError(
                f"{self.root} was made by sau {made}, this is {sau.__version__}; go on with that version, "
                "or choose another --record_root"
            )
        write(stamp, json.dumps({"sau": sau.__version__}).encode())
        notes = []
        for cell in cells:
            over = self.over(cell)
            if over == "published" and not {"acc", "after"} & self.summary(cell).keys():
                raise RecordError(f"the published summary of {cell.folder} holds no scores; remove it")
            if over != "finished":
                continue
            record = Record(self.folder(cell))
            try:
                record.verify()
            except RecordError as error:
                if self.holder(cell) is None:
                    (record.path / MANIFEST).unlink()
                    notes.append(f"note: {error}; it is made again")
        return notes

    def over(self, cell: Cell) -> str:
        """finished, published, or nothing."""
        if os.path.isfile(f"{self.root}/{cell.folder}/{MANIFEST}"):
            return "finished"
        return "published" if any(os.path.isfile(f"{at}/{cell.folder}/{SUMMARY}") for at in self.published) else ""

    def states(self, cells: Sequence[Cell]) -> dict[str, State]:
        """Where every cell stands, by digest; attacks come before their defenses in `cells`."""
        locked, failed = self._names("locks"), self._names("failed")
        found: dict[str, State] = {}
        for cell in cells:
            over, key = self.over(cell), _key(cell)
            who = self.holder(cell) if key in locked else None
            if who is not None:
                found[cell.digest] = State("running", who=who)
            elif over:
                found[cell.digest] = State(over)
            elif key in failed:
                found[cell.digest] = State("failed", self._read(self.own / "failed" / key).get("reason", "unknown"))
            elif cell.attack and found[cell.attack].name == "failed":
                found[cell.digest] = State("blocked", f"its attack failed: {found[cell.attack].reason}")
            else:
                found[cell.digest] = State("waiting")
        return found

    def fail(self, cell: Cell, reason: str, tries: int) -> None:
        """Remember that a cell failed for good."""
        write(self.own / "failed" / _key(cell), json.dumps({"reason": reason, "tries": tries}).encode())

    def forgive(self, cell: Cell) -> None:
        """Forget that a cell failed."""
        (self.own / "failed" / _key(cell)).unlink(missing_ok=True)

    def summary(self, cell: Cell) -> dict[str, Any]:
        """The cell's summary, from its record or from the published ones; empty if there is none."""
        return self._first(cell, (self.root, *self.published))

    def _first(self, cell: Cell, roots: Sequence[Path]) -> dict[str, Any]:
        return next(filter(None, (self._read(root / cell.folder / SUMMARY) for root in roots)), {})

    def differs(self, cell: Cell) -> bool:
        """Whether a finished cell's scores are not those that were published of it."""
        published = self._first(cell, self.published)
        own = self.summary(cell) if published else {}
        return any(published.get(name) != own.get(name) for name in ("acc", "asr", "racc"))

    def costs(self, cells: Iterable[Cell]) -> dict[tuple[str, ...], Cost]:
        """What finished cells cost, by what they are like."""
        seen: dict[tuple[str, ...], list[tuple[Any, Any, int | None]]] = defaultdict(list)
        for cell in cells:
            state = self.over(cell) if len(seen[cell.like]) < SAMPLE else ""
            if state:
                summary = self.summary(cell)
                disk = (
                    sum(file.stat().st_size for file in self.folder(cell).glob("*.*")) if state == "finished" else None
                )
                seen[cell.like].append((summary.get("seconds"), summary.get("peak_memory_mb"), disk))
        return {
            like: Cost(*(_mean(column) for column in zip(*rows, strict=True))) for like, rows in seen.items() if rows
        }

    def publish(self, cells: Sequence[Cell], target: Path) -> int:
        """Copy the summaries of finished cells to the same names below `target`; returns how many."""
        count = 0
        for cell in cells:
            if self.over(cell):
                write(target / cell.folder / SUMMARY, (json.dumps(self.summary(cell), indent=2) + "\n").encode())
                count += 1
        return count

    def holder(self, cell: Cell) -> Holder | None:
        """Who runs the cell now, or None."""
        return holder(self.own / "locks" / _key(cell))

    def _names(self, part: str) -> set[str]:
        folder = self.own / part
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            found = json.loads(file.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{file} is damaged ({error}); remove it") from None
        return found if isinstance(found, dict) else {}


def _key(cell: Cell) -> str:
    return cell.folder.replace("/", "__")


def _mean(column: Iterable[Any]) -> float | None:
    values = [value for value in column if value is not None]
    return fmean(values) if values else None
