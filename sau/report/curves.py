"""Curves of a cell: scores, losses and risks against epochs, means over seeds, as points of small drawings."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sau.files import number
from sau.report import parse
from sau.report.read import NONE, Run
from sau.report.table import Cell

WIDTH, HEIGHT, LEFT, BOTTOM, MOST = 640, 340, 68, 52, 60  # of a drawing in its own units; points of a curve
SCORES = {"acc": "ACC", "asr": "ASR", "racc": "R-ACC"}
RISKS = {"r_cl": "R_cl", "r_bd": "R_bd", "r_share": "R_share", "r_adv": "R_adv"}
TYPES = {"type1": "Type I", "type2": "Type II", "type3": "Type III"}
Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Line:
    """One curve.

    Args:
        label: its name.
        path: SVG path in whole units, each point from the one before: pages hold thousands of them.
        dots: the same points as a path of dots, for a curve that has few; else empty.
        last: value at the end, for readers who do not see the drawing.
    """

    label: str
    path: str
    dots: str
    last: float


@dataclass(frozen=True)
class Chart:
    """One drawing.

    Args:
        title: of the whole.
        unit: of its vertical axis.
        across: of its horizontal axis.
        lines: the curves.
        ticks: (vertical coordinate, text) of the vertical axis; empty for one of 0 to 100, `PERCENT_TICKS`.
        ends: texts at the left and the right end of the horizontal axis.
    """

    title: str
    unit: str
    across: str
    lines: list[Line]
    ticks: list[tuple[int, str]]
    ends: tuple[str, str]


def charts(cell: Cell) -> list[Chart]:
    """The drawings of a cell; none for runs without rows. Type I, II, III are shares only where risks were tracked."""
    runs = [run for run in cell.good if run.rows]
    across = "epoch" if cell.defense == NONE else "round"
    losses = {name: name.replace("_", " ") for run in runs for row in run.rows for name in row if name.endswith("loss")}
    tracked = any(name in row for name in RISKS for run in runs for row in run.rows)
    found = [
        _chart("Scores", "% of test pictures", across, runs, SCORES, top=100.0),
        _chart("Risks", "% of clean pictures", across, runs, RISKS, top=100.0),
        _chart("Adversarial examples by type", "%", across, runs, TYPES if tracked else {}, top=100.0),
        _chart("Loss", "nats", across, runs, losses),
    ]
    return [chart for chart in found if chart]


def _chart(
    title: str, unit: str, across: str, runs: Sequence[Run], names: dict[str, str], top: float | None = None
) -> Chart | None:
    curves = {label: _mean([_points(run, name) for run in runs]) for name, label in names.items()}
    curves = {label: points for label, points in curves.items() if points}
    if not curves:
        return None
    xs, ys = ([point[axis] for points in curves.values() for point in points] for axis in (0, 1))
    low, high = (0.0, top) if top is not None else (min(0.0, *ys), max(*ys, 0.0))
    high = high if high > low else 1.0
    left, right = min(xs), max(max(xs), min(xs) + 1)

    def place(point: tuple[float, float]) -> tuple[int, int]:
        x = LEFT + (point[0] - left) / (right - left) * (WIDTH - LEFT - 12)
        return round(x), _height((point[1] - low) / (high - low))

    lines = []
    for label, points in curves.items():
        spots = [place(point) for point in points]
        steps = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(spots, spots[1:], strict=False)]
        start = f"M{spots[0][0]} {spots[0][1]}"
        dots = start + "h0" + "".join(f"m{x} {y}h0" for x, y in steps) if len(spots) <= 12 else ""
        path = start + ("l" + " ".join(f"{x} {y}" for x, y in steps) if steps else "h0")
        lines.append(Line(label, path, dots, points[-1][1]))
    ticks = [(_height(part / 4), f"{low + (high - low) * part / 4:.3g}") for part in range(5)] if top is None else []
    return Chart(title, unit, across, lines, ticks, (f"{left:g}", f"{right:g}"))


def _height(share: float) -> int:
    return round((HEIGHT - BOTTOM) - share * (HEIGHT - BOTTOM - 16))


PERCENT_TICKS = [(_height(part / 4), str(25 * part)) for part in range(5)]


def _points(run: Run, name: str) -> Points:
    """(epoch, value), stages one after the other; scores and risks of a defense begin with those before it, at 0."""
    before = run.figures.get(f"before_{name}") if name in parse.PERCENT else _risk_before(run, name)
    points = [] if before is None else [(0.0, before)]
    past, stage, last = 0.0, 0.0, 0.0
    for row in run.rows:
        if (now := row.get("stage", 0.0)) != stage:
            past, stage = past + last, now
        last = row["epoch"]
        if name in row:
            points.append((past + last, row[name]))
    return points if len(points) > (before is not None) else []


def _risk_before(run: Run, name: str) -> float | None:
    value = parse.mapping(parse.mapping(run.summary.get("risk")).get("before")).get(name)
    return float(value) if number(value) else None


def _mean(curves: list[Points]) -> Points:
    """Mean over the runs that have the curve, where all of them have a value; thinned, both ends kept."""
    at: dict[float, list[float]] = defaultdict(list)
    having = [curve for curve in curves if curve]
    for curve in having:
        for x, y in curve:
            at[x].append(y)
    points = [(x, statistics.mean(ys)) for x, ys in sorted(at.items()) if len(ys) == len(having)]
    last = len(points) - 1
    return points if last < MOST else [points[round(place * last / (MOST - 1))] for place in range(MOST)]
