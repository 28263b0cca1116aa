"""What is known of cells from the disk alone: which are finished, running or failed, and what is published of them."""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import sau
from sau.errors import RecordError, one_line
from sau.files import parse_json, read, write
from sau.grid.cells import Job
from sau.grid.plan import Cell
from sau.record.folder import CHECKPOINT, MANIFEST, SUMMARY, Record
from sau.record.lock import in_use
from sau.record.summaries import load

VERSION = "sau"  # key of the library's version, in a root's version.json and in published summaries


def version(said: Mapping[str, Any]) -> str:
    """The version of the library that a file names, in a line; this one where it names none, as older ones do."""
    return one_line(str(said.get(VERSION, sau.__version__)))[:40]


@dataclass(frozen=True)
class State:
    """Where a cell stands.

    Args:
        name: finished, published (its summary is kept, its weights are not), running, failed, blocked (its attack
            failed) or waiting.
        reason: of a failure, also of a published attack whose weights are needed.
    """

    name: str
    reason: str = ""

    @property
    def over(self) -> bool:
        """Whether the result is there."""
        return self.name in ("finished", "published")


@dataclass
class Store:
    """The record root of a grid and its files of published summaries.

    Args:
        root: folder of the cells; `.grid` in it holds logs and failures.
        published: files of summaries, by the names of the cells' folders; the first one that has a cell counts.
    """

    root: Path
    published: tuple[Path, ...] = ()
    own: Path = field(init=False)

    def __post_init__(self) -> None:
        self.root = self.root.absolute()
        self.own = self.root / ".grid"
        there = next(place for place in (self.root, *self.root.parents) if place.exists())
        if not there.is_dir():
            raise RecordError(f"{there} is a file, not a folder; choose another --record_root")

    @cached_property
    def kept(self) -> dict[str, dict[str, Any]]:
        """The published summaries by folder; a file that is not there yet has none."""
        found = [load(file) for file in self.published if file.exists()]
        return {cell: summary for summaries in reversed(found) for cell, summary in summaries.items()}

    def folder(self, cell: Cell) -> Path:
        """Where the cell's record lies."""
        return self.root / cell.folder

    def job(self, cell: Cell, timeout: float | None) -> Job:
        """The cell as an engine gets it."""
        flags = (f"--record_root={self.root}", *cell.flags)
        folder, log = self.folder(cell), self.own / "logs" / _key(cell)
        return Job(cell.kind, cell.name, flags, str(folder), str(log), cell.threads, timeout, self.cache)

    @property
    def cache(self) -> str:
        """Folder of what takes minutes to train: it is for all cells, and they may run on other machines."""
        return os.path.abspath(os.path.expanduser(os.environ.get("SAU_CACHE") or self.own / "cache"))

    def prepare(self, cells: Sequence[Cell]) -> list[str]:
        """Make the folder ready; returns what there is to say.

        Finished cells are compared with their manifests; a damaged one is made anew, unless its summary is published.
        RecordError if another version made cells here, if a published summary is none, or if nothing can be written.
        """
        if other := self.other_version():
            raise RecordError(other)
        write(self.own / "version.json", json.dumps({VERSION: sau.__version__}).encode())
        notes = []
        for cell in cells:
            over = self.over(cell)
            if over == "published" and not {"acc", "after"} & self.summary(cell).keys():
                raise RecordError(f"the published summary of {cell.folder} holds no scores; remove it")
            damage = self.damage(cell) if over == "finished" else ""
            if damage and not self.running(cell):
                self._open(Record(self.folder(cell)))
                kept = self.over(cell) == "published"
                notes.append(f"note: {damage}; {'its published summary counts' if kept else 'it is made again'}")
        return notes

    @property
    def version(self) -> str:
        """The version of the library that makes the cells here; this one where none is made yet."""
        return version(self._read(self.own / "version.json", "choose another --record_root"))

    def other_version(self) -> str:
        """What to say where another version made the cells; empty where it did not."""
        advice = f"this is {sau.__version__}; go on with that version, or choose another --record_root"
        return f"{self.root} was made by sau {self.version}, {advice}" if self.version != sau.__version__ else ""

    def damage(self, cell: Cell) -> str:
        """How the record of a finished cell differs from its manifest; empty if it does not."""
        try:
            Record(self.folder(cell)).verify()
        except RecordError as error:
            return str(error)
        return ""

    def _open(self, record: Record) -> None:
        """Let a damaged record be made anew: unfinished it is, and where it does not say whose it is, it is emptied."""
        with suppress(RecordError):
            record.check()
        for file in [record.path / MANIFEST] if record.config else record.path.iterdir():
            if file.is_file():  # what lies below stays, for defenses are cells of their own
                file.unlink(missing_ok=True)

    def over(self, cell: Cell) -> str:
        """finished, published, or nothing."""
        if os.path.isfile(f"{self.root}/{cell.folder}/{MANIFEST}"):
            return "finished"
        return "published" if cell.folder in self.kept else ""

    def states(self, cells: Sequence[Cell]) -> dict[str, State]:
        """Where every cell stands, by digest; attacks come before their defenses in `cells`."""
        failed = self._names("failed")
        found, dead = dict[str, State](), dict[str, str]()  # dead: attacks that failed, a published one included
        for cell in cells:
            over, key, reason = self.over(cell), _key(cell), ""
            running = self.running(cell)
            if not running and over != "finished" and key in failed:
                reason = dead[cell.digest] = self.reason(cell)
            if running:
                found[cell.digest] = State("running")
            elif over:
                found[cell.digest] = State(over, "" if cell.attack else reason)
            elif reason:
                found[cell.digest] = State("failed", reason)
            elif cell.attack in dead:
                found[cell.digest] = State("blocked", f"its attack failed: {dead[cell.attack]}")
            else:
                found[cell.digest] = State("waiting")
        return found

    def fail(self, cell: Cell, reason: str, tries: int) -> None:
        """Remember that a cell failed for good."""
        write(self.own / "failed" / _key(cell), json.dumps({"reason": reason, "tries": tries}).encode())

    def failed(self, cell: Cell) -> int:
        """When the cell failed for good, as a number that only differs or does not; 0 if it did not."""
        return _touched(self.own / "failed" / _key(cell))

    def reason(self, cell: Cell) -> str:
        """Why the cell failed for good."""
        return one_line(str(self._read(self.own / "failed" / _key(cell)).get("reason", "unknown")))

    def forgive(self, cell: Cell) -> None:
        """Forget that a cell failed."""
        (self.own / "failed" / _key(cell)).unlink(missing_ok=True)

    def summary(self, cell: Cell) -> dict[str, Any]:
        """The cell's summary, from its record or from the published ones; empty if there is none."""
        finished = self.over(cell) == "finished"  # the figures of an unfinished one are none
        own = self._read(self.root / cell.folder / SUMMARY) if finished else {}
        return own or self.summary_published(cell)

    def summary_published(self, cell: Cell) -> dict[str, Any]:
        """The cell's published summary; empty if there is none."""
        return self.kept.get(cell.folder, {})

    def errors(self, cell: Cell) -> Path:
        """What the cell's tries printed as errors."""
        return self.own / "logs" / f"{_key(cell)}.err"

    def progress(self, cell: Cell) -> int:
        """Grows whenever the cell's checkpoint, or before it that of a trigger like its own, moves on; else 0."""
        triggers = Path(self.cache, "triggers").glob(f"{cell.name}-*/{CHECKPOINT}")
        return _touched(self.folder(cell) / CHECKPOINT) or max(map(_touched, triggers), default=0)

    def running(self, cell: Cell) -> bool:
        """Whether a process runs the cell now."""
        return in_use(self.folder(cell))

    def _names(self, part: str) -> set[str]:
        folder = self.own / part
        return set(os.listdir(folder)) if folder.is_dir() else set()

    def _read(self, file: Path, advice: str = "remove it") -> dict[str, Any]:
        try:
            found = parse_json(read(file))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{file} is damaged ({error}); {advice}") from None
        return found if isinstance(found, dict) else {}


def _key(cell: Cell) -> str:
    return cell.folder.replace("/", "__")


def _touched(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_mtime_ns
    return 0
