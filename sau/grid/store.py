"""What is on disk of a grid's cells: their folders, and the results that are kept of them."""

import json
import re
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import sau
from sau.errors import MALFORMED, RecordError
from sau.files import existing, in_use, read, write
from sau.grid.engines import Cell
from sau.record.folder import Record

_FOLDER = re.compile(r"(.+?)(?:_[rc](\d+(?:\.\d*)?(?:e-\d+)?))?(?:_oracle)?(?:_[0-9a-f]{10})?(?:_s(\d{1,10}))?")


class Name(NamedTuple):
    """What the name of a folder says, as a grid writes it: `badnet_r0.1_DIGEST_s0`, `clp_c0.05_oracle_DIGEST`."""

    method: str  # the whole name where it says nothing else
    amount: float | None  # poisoning ratio of an attack, clean share of a defense
    seed: int | None


def parse_name(folder: str) -> Name:
    """What the name of a result folder says; seeds stand in those of attacks alone."""
    found = _FOLDER.fullmatch(folder)
    method, amount, seed = found.groups() if found else (folder, None, None)
    return Name(method, float(amount) if amount else None, int(seed) if seed else None)


def find(root: str | Path, name: str) -> Path:
    """A result folder: by its path, its name below `root`, or there a grid's by what people call it: badnet_s0, sau.
    RecordError if there is none, or if several fit."""
    parts = [(path, parse_name(path.name)) for path in sorted(Path(root).glob("*"))]
    fitting = [path for path, of in parts if name == (of.method if of.seed is None else f"{of.method}_s{of.seed}")]
    if Path(root, name).is_dir() or not fitting:
        return existing(root, name)
    if len(fitting) > 1:
        raise RecordError(f"{root} has several {name}: {', '.join(path.name for path in fitting)}; name one of these")
    return fitting[0]


class Store:
    """The record root of a grid, whose `.grid` holds logs and the cache, and its files of kept results: of several that
    have a cell the first counts."""

    def __init__(self, root: Path, published: Sequence[Path] = ()) -> None:
        self.root = root.absolute()
        self.kept = ChainMap(*(load(file) for file in published if file.exists()))

    def folder(self, cell: Cell) -> Path:
        return self.root / cell.folder

    def finished(self, cell: Cell) -> bool:
        return Record(self.folder(cell)).finished

    def state(self, cell: Cell) -> str:
        """Where a cell stands: running, finished, published (its result is kept, its weights are not) or waiting."""
        if in_use(self.folder(cell)):
            return "running"
        return "finished" if self.finished(cell) else "published" if cell.folder in self.kept else "waiting"

    def verify(self, cells: Sequence[Cell]) -> None:
        """Compare every finished cell with its manifest; RecordError names the first that differs."""
        for cell in filter(self.finished, cells):
            Record(self.folder(cell)).check()


def publish(store: Store, cells: Sequence[Cell], target: Path) -> int:
    """Add the summaries of finished cells, each with the version of the library, which its digest does not name, to the
    file `target`; returns how many cells have one. RecordError for a damaged cell."""
    store.verify(cells)
    earlier = load(target) if target.exists() else {}
    found = {cell.folder: store.kept[cell.folder] for cell in cells if cell.folder in store.kept}
    for cell in filter(store.finished, cells):
        found[cell.folder] = {**Record(store.folder(cell)).summary(), "sau": sau.__version__}
    if found:
        save(target, {**earlier, **found})
    return len(found)


# The summaries of many result folders in one file: a JSON object a line, sorted by folder. `cell` is the folder, like
# badnet_r0.1_fbb5bbdd0a_s0/defense/sau_c0.05_0a4c2f6d1e; the rest is its `summary.json` without the intervals of its
# scores, which follow from the counts.


def load(file: Path) -> dict[str, dict[str, Any]]:
    """The summaries by folder; RecordError names the line that is not one."""
    summaries: dict[str, dict[str, Any]] = {}
    try:
        lines = read(file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
            cell = content.pop("cell")
            if not isinstance(cell, str) or Path(cell).is_absolute() or cell in summaries:
                raise ValueError(f"cell is {str(cell)[:80]!r}, allowed is the name of a folder, once")
        except MALFORMED as error:
            raise RecordError(f"{file}, line {number} is no summary ({error}); delete the line") from None
        summaries[cell] = content
    return summaries


def save(file: Path, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the summaries of folders, replacing the file."""
    lines = [json.dumps({"cell": cell, **_short(summaries[cell])}) for cell in sorted(summaries)]
    write(file, "".join(f"{line}\n" for line in lines).encode())


def _short(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Without the intervals of these scores, or of those before and after a defense."""
    kept = {name: value for name, value in scores.items() if not name.endswith("_interval")}
    return kept | {part: _short(kept[part]) for part in ("before", "after") if part in kept}
