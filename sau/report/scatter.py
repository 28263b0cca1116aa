"""ACC against ASR as a picture: one point a defense, the attacked network beside them as the reference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from sau.report.read import NONE
from sau.report.table import Cell, Section

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 330, 40, 12, 12, 46  # in the units of the drawing
LETTER, LINE = 6.4, 12.0  # about how wide a letter and how high a line of its text is
ASR_TICKS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0)
ACC_STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """A defense in the drawing.

    Args:
        name: the defense.
        acc: percent.
        asr: percent.
        x: of its centre.
        y: of its centre.
        kind: `before` for the attacked network, `oracle` where test data chose something, else `defense`.
        text: (x, y) of the left end of its name; None where there is no room for it.
    """

    name: str
    acc: float
    asr: float
    x: float
    y: float
    kind: str
    text: tuple[float, float] | None


@dataclass(frozen=True)
class Scatter:
    """A drawing.

    Args:
        title: the attack, or over how many the points are means.
        points: the defenses, and the attacked network first.
        across: (x, ASR) of the horizontal ticks, on a square-root scale.
        up: (y, ACC) of the vertical ticks.
    """

    title: str
    points: list[Point]
    across: list[tuple[float, str]]
    up: list[tuple[float, str]]


def scatters(section: Section) -> list[Scatter]:
    """A drawing of each attack that took and has a defense; before them, of several, one of the means over all of them
    of the defenses that ran on all of them."""
    attacks: dict[str, list[Cell]] = {}
    for cell in section.cells:
        if cell.figures["asr"] and cell.figures["acc"] and not cell.dead:
            attacks.setdefault(cell.attack_name, []).append(cell)
    attacks = {name: cells for name, cells in attacks.items() if any(cell.defense != NONE for cell in cells)}
    each = [_scatter(name, [[cell] for cell in cells]) for name, cells in attacks.items()]
    if len(attacks) < 2:
        return each
    groups: dict[str, list[Cell]] = {}
    for cells in attacks.values():
        for cell in cells:
            groups.setdefault(cell.name, []).append(cell)
    everywhere = [cells for cells in groups.values() if len(cells) == len(attacks)]
    if all(cells[0].defense == NONE for cells in everywhere):
        return each
    return [_scatter(f"mean over {len(attacks)} attacks", everywhere), *each]


def _scatter(title: str, groups: Sequence[Sequence[Cell]]) -> Scatter:
    means = {cells[0].name: (_mean(cells, "acc"), _mean(cells, "asr"), cells) for cells in groups}
    accs = [acc for acc, _, _ in means.values()]
    step = next(step for step in ACC_STEPS if (max(accs) - min(accs)) / step <= 5)
    low, high = (float(math.floor(min(accs) / step) * step), float(math.ceil(max(accs) / step) * step))
    high = high if high > low else low + step

    def x_of(asr: float) -> float:
        return LEFT + math.sqrt(asr / 100) * (WIDTH - LEFT - RIGHT)

    def y_of(acc: float) -> float:
        return HEIGHT - BOTTOM - (acc - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    taken: list[Box] = [_around(x_of(asr), y_of(acc)) for acc, asr, _ in means.values()]
    points = []
    for name, (acc, asr, cells) in sorted(means.items(), key=lambda item: item[1][2][0].defense != NONE):
        kind = "before" if cells[0].defense == NONE else "oracle" if any(cell.oracle for cell in cells) else "defense"
        shown = "before" if kind == "before" else name
        x, y = x_of(asr), y_of(acc)
        points.append(Point(shown, acc, asr, round(x, 1), round(y, 1), kind, _place(shown, x, y, taken)))
    count = round((high - low) / step)
    up = [(round(y_of(low + i * step), 1), f"{low + i * step:g}") for i in range(count + 1)]
    return Scatter(title, points, [(round(x_of(tick), 1), f"{tick:g}") for tick in ASR_TICKS], up)


def _mean(cells: Sequence[Cell], name: str) -> float:
    return fmean(spread.mean for cell in cells if (spread := cell.figures[name]))


def _around(x: float, y: float) -> Box:
    return x - 4, y - 4, x + 4, y + 4


def _place(text: str, x: float, y: float, taken: list[Box]) -> tuple[float, float] | None:
    """Where a name overlaps nothing, near its point; it is then taken."""
    wide = LETTER * len(text)
    sides = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
    for far in (7, 13, 20):
        for right, down in sides:
            left, middle = (
                x + right * far - (wide if right < 0 else wide / 2 if right == 0 else 0),
                y + down * (far + 1),
            )
            box = left, middle - LINE / 2, left + wide, middle + LINE / 2
            inside = box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                return round(left, 1), round(middle + 4, 1)
    return None


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
