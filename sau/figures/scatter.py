"""ACC against ASR: a point a defense, and the attacked network as the reference."""

from collections.abc import Sequence
from statistics import fmean

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sau.report.cells import Section, TableCell
from sau.report.results import NONE

TICKS = (0, 1, 5, 10, 25, 50, 100)  # ASR in percent
GREY, BLUE = "#808080", "#0072b2"  # grey is read on light and dark pages


def scatter(section: Section) -> tuple[Figure, list[str]] | None:
    """A numbered point a defense, and their names in this order; None if none was run on an attack that took.

    Over several attacks the points are means, of the defenses that ran on all of them.
    """
    taken = [cell for cell in section.cells if cell.figures["asr"] and cell.figures["acc"] and not cell.dead]
    attacks = {cell.attack_name for cell in taken if cell.defense != NONE}
    groups: dict[str, list[TableCell]] = {}
    for cell in taken:
        if cell.attack_name in attacks:
            groups.setdefault(cell.name, []).append(cell)
    points = {name: (_mean(cells, "asr"), _mean(cells, "acc")) for name, cells in groups.items()
              if len(cells) == len(attacks)}  # fmt: skip
    before, names = points.pop(NONE, None), list(points)
    if not points:
        return None
    figure, axis = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    for number, (name, point) in enumerate(points.items(), 1):
        chosen = "none" if any(cell.oracle for cell in groups[name]) else BLUE
        axis.plot(*point, "o", markerfacecolor=chosen, markeredgecolor=BLUE, clip_on=False)
        axis.annotate(str(number), point, (5, -3), textcoords="offset points", color=GREY, fontsize=8)
    if before is not None:
        axis.plot(*before, "s", color="black", markeredgecolor=GREY, clip_on=False)
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axis.set(xlim=(0, 100), xlabel="ASR % (square-root scale), less is better", ylabel="ACC %")
    axis.set_title(f"mean over {len(attacks)} attacks" if len(attacks) > 1 else next(iter(attacks)), color=GREY)
    axis.set_xticks(TICKS, map(str, TICKS))
    axis.tick_params(colors=GREY)
    axis.grid(color=GREY, alpha=0.3)
    for label in (axis.xaxis.label, axis.yaxis.label):
        label.set_color(GREY)
    axis.spines[:].set_visible(False)
    return figure, names


def _mean(cells: Sequence[TableCell], name: str) -> float:
    return fmean(figure.mean for cell in cells if (figure := cell.figures[name]))
