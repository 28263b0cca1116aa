"""ACC against ASR as a scatter plot: one point a defense, and the attacked network as the reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sau.report.cells import Section, TableCell
from sau.report.results import NONE

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 330, 40, 12, 12, 46  # in the units of the SVG
ASR_TICKS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0)
ACC_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class Point:
    """A defense.

    Args:
        name: the defense.
        acc: percent.
        asr: percent.
        x: of its centre.
        y: of its centre.
        kind: `before` for the attacked network, `oracle` if test data chose something, else `defense`.
    """

    name: str
    acc: float
    asr: float
    x: float
    y: float
    kind: str


@dataclass(frozen=True)
class Scatter:
    """One plot.

    Args:
        title: the attack, or the number of attacks that the points are means over.
        points: the attacked network first.
        asr_ticks: (x, label), on a square-root scale.
        acc_ticks: (y, label).
    """

    title: str
    points: list[Point]
    asr_ticks: list[tuple[float, str]]
    acc_ticks: list[tuple[float, str]]


def scatters(section: Section) -> list[Scatter]:
    """A plot of each attack that took and has a defense; of several attacks first the mean of defenses run on all."""
    attacks: dict[str, list[TableCell]] = {}
    for cell in section.cells:
        if cell.figures["asr"] and cell.figures["acc"] and not cell.dead:
            attacks.setdefault(cell.attack_name, []).append(cell)
    attacks = {name: cells for name, cells in attacks.items() if any(cell.defense != NONE for cell in cells)}
    plots = [_scatter(name, [[cell] for cell in cells]) for name, cells in attacks.items()]
    groups: dict[str, list[TableCell]] = {}
    for cell in (cell for cells in attacks.values() for cell in cells):
        groups.setdefault(cell.name, []).append(cell)
    everywhere = [cells for cells in groups.values() if len(cells) == len(attacks)]
    if len(attacks) > 1 and any(cells[0].defense != NONE for cells in everywhere):
        plots.insert(0, _scatter(f"mean over {len(attacks)} attacks", everywhere))
    return plots


def _scatter(title: str, groups: Sequence[Sequence[TableCell]]) -> Scatter:
    groups = sorted(groups, key=lambda cells: cells[0].defense != NONE)
    accs = [_mean(cells, "acc") for cells in groups]
    step = next(step for step in ACC_STEPS if (max(accs) - min(accs)) / step <= 5)
    low = float(math.floor(min(accs) / step) * step)
    count = max(1, round(math.ceil(max(accs) / step) - low / step))

    def y_of(acc: float) -> float:
        return HEIGHT - BOTTOM - (acc - low) / (count * step) * (HEIGHT - BOTTOM - TOP)

    points = []
    for cells, acc in zip(groups, accs, strict=True):
        kind = "before" if cells[0].defense == NONE else "oracle" if any(cell.oracle for cell in cells) else "defense"
        name, asr = "before" if kind == "before" else cells[0].name, _mean(cells, "asr")
        points.append(Point(name, acc, asr, round(_x(asr), 1), round(y_of(acc), 1), kind))
    acc_ticks = [(round(y_of(low + i * step), 1), f"{low + i * step:g}") for i in range(count + 1)]
    return Scatter(title, points, [(round(_x(tick), 1), f"{tick:g}") for tick in ASR_TICKS], acc_ticks)


def _x(asr: float) -> float:
    return LEFT + math.sqrt(asr / 100) * (WIDTH - LEFT - RIGHT)


def _mean(cells: Sequence[TableCell], name: str) -> float:
    return fmean(figure.mean for cell in cells if (figure := cell.figures[name]))
