"""Attack success against what the attacker spent to bring a backdoor back, for every network side by side."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sau.audit.case import CONTROL, NONE
from sau.audit.runner import (
    ALONE,
    ANEW,
    BETWEEN,
    FRESH,
    RELEASED,
    TRIGGER,
    Audit,
    Key,
    coefficients,
    curves,
)
from sau.report.stats import MeanStd

PANELS: dict[Key, tuple[str, str]] = {
    ("relearn", RELEASED): ("re-learning, augmented once", "poisoned images"),
    ("relearn", FRESH): ("re-learning, augmented anew", "poisoned images"),
    ("path", BETWEEN): ("path from the attacked weights", "share of the way"),
    ("path", ANEW): ("path, batch norm estimated anew", "share of the way"),
    ("white", TRIGGER): ("white box, trigger + D", "radius of D"),
    ("white", ALONE): ("white box, D alone", "radius of D"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#8c564b", "#6a3d9a")
MARKS = "osv^DPX*h"
COLUMNS = 4


def audit(audits: Sequence[Audit]) -> Figure:
    """A panel for each part that was audited: means over audits and seeds, bars of one standard deviation.

    The steps on the horizontal axes stand side by side whatever lies between them. The attacked network is black,
    networks that never had a backdoor are grey and dashed.
    """
    found, left = curves(audits), coefficients(audits)
    shown = [key for key in PANELS if key in found]
    count = len(shown) + bool(left)
    rows, columns = -(-count // COLUMNS), min(COLUMNS, max(1, count))
    size = (0.6 + 3.2 * columns, 0.8 + 2.7 * max(1, rows))
    figure, grid = plt.subplots(max(1, rows), columns, figsize=size, squeeze=False, layout="constrained")
    panels = list(grid.flat)
    styles = _styles(list(dict.fromkeys([*(name for key in shown for name in found[key]), *left])))
    for panel, key in zip(panels, shown, strict=False):
        _curves(panel, found[key], styles)
        title, spent = PANELS[key]
        panel.set(title=title, xlabel=spent, ylim=(-3, 103))
        if panel in grid[:, 0]:
            panel.set_ylabel("ASR (%)")
    if left:
        _bars(panels[len(shown)], left, styles)
    for panel in panels[count:]:
        panel.set_axis_off()
    legends = [panel.get_legend_handles_labels() for panel in reversed(panels[: len(shown)])]
    # of each network the line of the first panel, for not all draw one
    handles = {text: line for legend in legends for line, text in zip(*legend, strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    return figure


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and mark of each network."""
    others = [name for name in names if name not in (NONE, CONTROL)]
    looks = dict(zip(others, zip(cycle(COLOURS), cycle("-"), cycle(MARKS), strict=False), strict=False))
    looks |= {NONE: ("black", "-", "."), CONTROL: ("#888888", "--", ".")}
    return {name: dict(zip(("color", "linestyle", "marker"), looks[name], strict=True)) for name in names}


def _curves(panel: Axes, lines: Mapping[str, Mapping[Any, MeanStd]], styles: Mapping[str, dict[str, Any]]) -> None:
    steps = list(dict.fromkeys(x for line in lines.values() for x in line))
    for name, line in lines.items():
        places, means = [steps.index(x) for x in line], [value.mean for value in line.values()]
        spreads = [value.std or 0.0 for value in line.values()]
        panel.errorbar(places, means, spreads, label=name, markersize=4, linewidth=1.2, elinewidth=0.7, **styles[name])
    texts = [f"{x:,}" if isinstance(x, int) else str(x) for x in steps]
    panel.set_xticks(range(len(steps)), texts, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _bars(panel: Axes, left: Mapping[str, Mapping[str, MeanStd | None]], styles: Mapping[str, dict[str, Any]]) -> None:
    """BEC of each network, where it is defined."""
    values = {name: some["bec"] for name, some in left.items()}
    known = {name: value for name, value in values.items() if value is not None}
    colours = [styles[name]["color"] for name in known]
    panel.barh(list(known), [value.mean for value in known.values()], color=colours)
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.7)
    panel.set(title="existence coefficient", xlabel="BEC (attacked 1, control 0)")
    panel.spines[["top", "right"]].set_visible(False)
