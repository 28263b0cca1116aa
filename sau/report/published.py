"""The published figures, whose only home is `published.json` beside this file, and ours beside them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from sau.report.parse import PERCENT
from sau.report.read import NONE
from sau.report.table import Cell, Section

Row = list[float | None]


@cache
def published() -> dict[str, Any]:
    """`about`; `names` of the attacks; `setting` that a run must have to be compared; `tables` by defense."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
    return found


def mean(rows: Sequence[Row]) -> Row:
    """Column by column; None where some row has none."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [statistics.mean(column) if len(column) == len(rows) else None for column in columns]


def alike(defense: str, oracle: bool) -> bool:
    """Whether a published table of a defense was chosen as ours was: by the test sets (`oracle`) or without them.

    False where nothing is published.
    """
    table = published()["tables"].get(defense)
    return table is not None and (table["selection"] == "oracle") == oracle


@dataclass(frozen=True)
class Pair:
    """A published cell and ours.

    Args:
        attack: name of the attack, as the pages write it.
        defense: name of the defense, or `none`.
        theirs: acc, asr, racc, der as published, percent; None where not given.
        cell: ours.
        ours: our means, as `theirs`.
    """

    attack: str
    defense: str
    theirs: Row
    cell: Cell
    ours: Row

    @property
    def differences(self) -> Row:
        """Ours - theirs, in points."""
        pairs = zip(self.ours, self.theirs, strict=True)
        return [None if a is None or b is None else a - b for a, b in pairs]


def compare(section: Section) -> list[Pair]:
    """Every cell of ours with the published one of the same setting; empty if the section is of another data set or
    network.

    A setting that a run does not record is taken to be the published one.
    """
    wanted = published()["setting"]
    said = {"dataset": section.dataset, "name": section.network.get("name", wanted["name"])}
    if any(wanted[key] != value for key, value in said.items()):
        return []
    pairs = []
    for defense, table in published()["tables"].items():
        for attack, theirs in table["rows"].items():
            for cell in section.cells:
                if (cell.attack, cell.defense) == (attack, defense) and _fits(cell, wanted):
                    pairs.append(Pair(published()["names"][attack], defense, theirs, cell, _means(cell)))
    return sorted(pairs, key=lambda pair: (pair.attack, pair.defense != NONE))


def _fits(cell: Cell, wanted: dict[str, Any]) -> bool:
    settings = cell.runs[0].attack_settings or {}
    return all(settings.get(key, value) == value for key, value in wanted.items())


def _means(cell: Cell) -> Row:
    return [spread.mean if (spread := cell.figures[name]) else None for name in PERCENT]
