"""Losses, scores and risks of a run against its epochs or rounds, and ACC against ASR over many runs."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sau.errors import RecordError
from sau.record.folder import Record
from sau.report.cells import Section, TableCell
from sau.report.results import NONE, read_metrics
from sau.util import marked

Style = tuple[str, str, str]  # label, colour, line style or hatch

SCORES: dict[str, Style] = {
    "acc": ("ACC", "#0072b2", "-"),
    "asr": ("ASR", "#d55e00", "--"),
    "racc": ("R-ACC", "#009e73", "-."),
}
RISKS: dict[str, Style] = {
    "acc": ("ACC", "#0072b2", "-"),
    "r_adv": ("$R_{adv}$", "#000000", "-"),
    "r_share": ("$R_{share}$", "#cc79a7", "--"),
    "r_share_sau": ("$R_{share}$, SAU's search", "#e69f00", "-."),
    "r_bd": ("$R_{bd}$", "#d55e00", ":"),
}
TYPES: dict[str, Style] = {
    "type1": ("I: both alike", "#d55e00", "///"),
    "type2": ("II: only the purified", "#56b4e9", "..."),
    "type3": ("III: both, differently", "#009e73", "\\\\\\"),
}
NORMS = {"L_inf": r"$L_\infty$", "L2": "$L_2$", "L1": "$L_1$"}
PERCENT = "test images (%)"
TICKS = (0, 1, 5, 10, 25, 50, 100)  # ASR in percent
GREY, BLUE = "#808080", "#0072b2"  # grey is read on light and dark pages


def curves(record: Record) -> Figure:
    """Losses on the left; ACC, ASR and R-ACC where they were measured on the right."""
    rows, summary = read_metrics(record.path), record.summary()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    for name in dict.fromkeys(name for row in rows for name in row if name == "loss" or name.endswith("_loss")):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        left.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    _plot(right, rows, summary.get("before", {}), SCORES)
    for panel, label in ((left, "mean loss (nats)"), (right, PERCENT)):
        _label(panel, record, label)
        if panel.get_lines():
            panel.legend(frameon=False, fontsize=8)
    right.set_ylim(-3, 103)
    return figure


def risks(records: Sequence[Record]) -> Figure:
    """R_adv, R_share, R_bd and ACC against rounds, a panel for each defense that ran with --track_risk."""
    figure, panels = _panels(records)
    for panel, record in zip(panels, records, strict=True):
        summary = _with_risk(record)
        before, search = summary["risk"]["before"], summary["risk"]["search"]
        _plot(panel, read_metrics(record.path), {**before, "acc": summary["before"]["acc"]}, RISKS)
        ball = f"{NORMS[search['norm']]} radius {search['eps']:g}, {search['steps']} steps"
        panel.set(ylim=(-3, 103), title=f"{marked(record.path.name, summary.get('selection'))} ({ball})")
    _legend(figure, panels)
    return figure


def types(records: Sequence[Record]) -> Figure:
    """Shares of the three types of adversarial examples of the purified network, stacked, against rounds."""
    figure, panels = _panels(records)
    for panel, record in zip(panels, records, strict=True):
        summary = _with_risk(record)
        rows = [{"epoch": 0, **summary["risk"]["before"]}, *(r for r in read_metrics(record.path) if "type1" in r)]
        bands = panel.stackplot([row["epoch"] for row in rows], [[row[name] for row in rows] for name in TYPES])
        for band, (label, colour, hatch) in zip(bands, TYPES.values(), strict=True):
            band.set(facecolor=colour, alpha=0.75, hatch=hatch, edgecolor="white", label=label)
        panel.set(ylim=(0, 100), title=marked(record.path.name, summary.get("selection")))
    _legend(figure, panels)
    return figure


def _with_risk(record: Record) -> dict[str, Any]:
    summary = record.summary()
    if "risk" not in summary:
        raise RecordError(f"{record.path} has no risks; run the defense with --track_risk")
    return summary


def _panels(records: Sequence[Record]) -> tuple[Figure, list[Axes]]:
    size = (0.6 + 3.0 * len(records), 2.9)
    figure, panels = plt.subplots(1, len(records), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for panel, record in zip(panels[0], records, strict=True):
        _label(panel, record, PERCENT if panel is panels[0][0] else "")
    return figure, list(panels[0])


def _plot(panel: Axes, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any], styles: dict[str, Style]) -> None:
    """A line a figure; `before` is its value in epoch 0."""
    for name, (label, colour, line) in styles.items():
        points = [(row["epoch"], row[name]) for row in ({"epoch": 0, **before}, *rows) if row.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour, label=label)


def _label(panel: Any, record: Record, ylabel: str) -> None:
    panel.set(xlabel="round" if record.path.parent.name == "defense" else "epoch", ylabel=ylabel)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend with the lines of every panel."""
    found = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for pair in found for handle, label in zip(*pair, strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


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
    points = {name: (_mean_over(cells, "asr"), _mean_over(cells, "acc")) for name, cells in groups.items()
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


def _mean_over(cells: Sequence[TableCell], name: str) -> float:
    return fmean(figure.mean for cell in cells if (figure := cell.figures[name]))
