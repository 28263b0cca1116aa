"""What is on disk of a grid's cells: their folders, their failures, and the results that are kept of them."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import sau
from sau.errors import RecordError, one_line
from sau.files import existing, in_use, parse_json, read, write
from sau.record.folder import MANIFEST, SUMMARY, Record
from sau.record.summaries import load, save

_FOLDER = re.compile(r"(?P<label>.+)_(?P<mark>[0-9a-f]{10})(?P<seed>_s\d+)?")
_DECIMAL = r"\d+(?:\.\d*)?(?:e-\d+)?"


@dataclass(frozen=True)
class Cell:
    """One run: an attack, or a defense on an attack."""

    kind: str  # attack or defense
    name: str  # the method
    digest: str  # of all that determines the result, hexadecimal
    folder: str  # below the record root, unique to the digest
    flags: tuple[str, ...]  # of attack/NAME.py or defense/NAME.py, all but the record root
    attack: str | None  # digest of the attack's cell; None for an attack
    threads: int
    memory_gb: float
    gpus: float  # or a share of one
    data: tuple[str, str]  # the data set, and the folder of the data sets

    @property
    def label(self) -> str:
        """The folder without digests, for people."""
        return "/".join(without_digest(part) for part in self.folder.split("/"))


def without_digest(folder: str) -> str:
    """The name of a cell's folder without its digest, like badnet_r0.1_s0; other names stay as they are."""
    found = _FOLDER.fullmatch(folder)
    return found["label"] + (found["seed"] or "") if found else folder


def mark(folder: str) -> str:
    """The digits of the digest in the name of a cell's folder; empty for other names."""
    found = _FOLDER.fullmatch(folder)
    return found["mark"] if found else ""


def attack_named(folder: str) -> tuple[str, int | None, dict[str, Any] | None]:
    """Attack, seed and settings of `<attack>_s<seed>` or, as a grid has it, `<attack>_r<ratio>_<digest>_s<seed>`."""
    parts = re.fullmatch(rf"(.+?)(?:_r({_DECIMAL}))?_s(\d{{1,10}})", without_digest(folder))
    if parts is None:
        return folder, None, None
    return parts[1], int(parts[3]), {"pratio": float(parts[2])} if parts[2] else None


def defense_named(folder: str) -> tuple[str, dict[str, Any] | None]:
    """Defense and settings of a grid's `<defense>_c<share>_<digest>`; `_oracle` before the digest: test data chose."""
    parts = re.fullmatch(rf"(.+?)_c({_DECIMAL})(_oracle)?", without_digest(folder))
    if parts is None:
        return without_digest(folder), None
    return parts[1], {"ratio": float(parts[2]), "select": "oracle" if parts[3] else "defender"}


def find(root: str, name: str) -> Path:
    """A result folder: by its path, its name below `root`, or there as a grid's attack and seed, like badnet_s0.

    RecordError if there is none, or if several fit.
    """
    attack, seed, _ = attack_named(name)
    fitting = [path for path in sorted(Path(root).glob(f"{attack}_*_s{seed}")) if attack_named(path.name)[0] == attack]
    if Path(root, name).is_dir() or Path(name).is_dir() or not fitting:
        return existing(root, name)
    if len(fitting) > 1:
        raise RecordError(f"{root} has several {name}: {', '.join(path.name for path in fitting)}; name one of these")
    return fitting[0]


class State(NamedTuple):
    """Where a cell stands: finished, published (its result is kept, its weights are not), running, failed, blocked
    (its attack failed) or waiting; and the reason of a failure.
    """

    name: str
    reason: str = ""


class Store:
    """The record root of a grid and its files of kept results.

    Args:
        root: folder of the cells; `.grid` in it holds logs, failures and the cache.
        published: files of results, by the names of the cells' folders; the first one that has a cell counts.
    """

    def __init__(self, root: Path, published: Sequence[Path] = ()) -> None:
        self.root = root.absolute()
        self.own = self.root / ".grid"
        found = [load(file) for file in published if file.exists()]
        self.kept = {cell: summary for summaries in reversed(found) for cell, summary in summaries.items()}
        existing = next(place for place in (self.root, *self.root.parents) if place.exists())
        if not existing.is_dir():
            raise RecordError(f"{existing} is a file, not a folder; choose another --record_root")

    def folder(self, cell: Cell) -> Path:
        """The result folder of a cell."""
        return self.root / cell.folder

    def log(self, cell: Cell) -> Path:
        """Where the output of a cell goes; `.out` and `.err` are added."""
        return self.own / "logs" / cell.folder.replace("/", "__")

    @property
    def cache(self) -> str:
        """Folder of trained triggers and decoded images, which all cells share, also those on other machines."""
        return os.path.abspath(os.path.expanduser(os.environ.get("SAU_CACHE") or self.own / "cache"))

    def prepare(self, cells: Sequence[Cell]) -> list[str]:
        """Compare finished cells with their manifests and empty the damaged ones; returns a note for each.

        RecordError if another version of the library made cells here, or if nothing can be written.
        """
        version = self._read(self.own / "version.json").get("sau", sau.__version__)
        if version != sau.__version__:
            advice = f"this is {sau.__version__}; use that version, or choose another --record_root"
            raise RecordError(f"{self.root} was made by sau {version}, {advice}")
        write(self.own / "version.json", json.dumps({"sau": version}).encode())
        notes = []
        for cell in cells:
            damage = self.damage(cell)
            if damage and not in_use(self.folder(cell)):
                for file in self.folder(cell).iterdir():
                    if file.is_file():  # defenses in it are cells of their own
                        file.unlink(missing_ok=True)
                then = "its published result counts" if cell.folder in self.kept else "it is run again"
                notes.append(f"note: {damage}; {then}")
        return notes

    def damage(self, cell: Cell) -> str:
        """How the record of a finished cell differs from its manifest; empty if it does not."""
        try:
            if self.finished(cell):
                Record(self.folder(cell)).check()
        except RecordError as error:
            return str(error)
        return ""

    def finished(self, cell: Cell) -> bool:
        """Whether the cell's record lies here."""
        return os.path.isfile(f"{self.root}/{cell.folder}/{MANIFEST}")

    def states(self, cells: Sequence[Cell]) -> dict[str, State]:
        """Where every cell stands, by digest; attacks come before their defenses in `cells`."""
        found = dict[str, State]()
        for cell in cells:
            published, failure = cell.folder in self.kept, self.failure(cell)
            attack = found.get(cell.attack or "", State(""))
            if in_use(self.folder(cell)):
                state = State("running")
            elif self.finished(cell):
                state = State("finished")
            elif failure and not (published and cell.attack):  # weights of a published attack may still be needed
                state = State("failed", failure)
            elif published:
                state = State("published")
            elif attack.name == "failed":
                state = State("blocked", attack.reason)
            else:
                state = State("waiting")
            found[cell.digest] = state
        return found

    def _failed(self, cell: Cell) -> Path:
        return self.own / "failed" / cell.folder.replace("/", "__")

    def fail(self, cell: Cell, reason: str) -> None:
        """Remember that a cell failed for good, for all runners on this folder."""
        write(self._failed(cell), json.dumps({"reason": reason}).encode())

    def failure(self, cell: Cell) -> str:
        """Why the cell failed for good; empty if it did not."""
        found = self._read(self._failed(cell))
        return one_line(str(found.get("reason", "unknown"))) if found else ""

    def forgive(self, cell: Cell) -> None:
        """Forget that a cell failed."""
        self._failed(cell).unlink(missing_ok=True)

    def summary(self, cell: Cell) -> dict[str, Any]:
        """The cell's summary, from its record or else from the kept results; empty if there is none."""
        own = self._read(self.folder(cell) / SUMMARY) if self.finished(cell) else {}
        return own or self.kept.get(cell.folder, {})

    def _read(self, file: Path) -> dict[str, Any]:
        try:
            found = parse_json(read(file))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise RecordError(f"{file} is damaged ({error}); remove it, or choose another --record_root") from None
        return found if isinstance(found, dict) else {}


def publish(store: Store, cells: Sequence[Cell], target: Path) -> tuple[int, list[str]]:
    """Add the summaries of finished cells to the file `target`; returns how many cells have one, and notes.

    Each names the version of the library, which the digest of a cell does not. A damaged cell is not published.
    """
    earlier = load(target) if target.exists() else {}
    found: dict[str, Mapping[str, Any]] = {cell.folder: store.kept[cell.folder] for cell in cells
                                           if cell.folder in store.kept}  # fmt: skip
    notes = []
    for cell in cells:
        if damage := store.damage(cell):
            notes.append(f"note: {damage}; not published")
        elif store.finished(cell):
            found[cell.folder] = {**store.summary(cell), "sau": sau.__version__}
    if found:
        save(target, {**earlier, **found})
    return len(found), notes
