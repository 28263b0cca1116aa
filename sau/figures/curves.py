"""What a run measured, against its epochs or rounds."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sau.errors import RecordError
from sau.formatting import marked
from sau.record.folder import METRICS, Record
from sau.report import parse

Style = tuple[str, str, str]  # name, colour, line

SHARES: dict[str, Style] = {
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
PERCENT = "test pictures (%)"


def curves(record: Record) -> Figure:
    """Left the losses, right ACC, ASR and R-ACC where they were measured."""
    rows, summary = history(record)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    for name in dict.fromkeys(name for row in rows for name in row if name == "loss" or name.endswith("_loss")):
        points = [(row["epoch"], row[name]) for row in rows if name in row]
        left.plot(*zip(*points, strict=True), label=name.replace("_", " "))
    _label(left, record, "mean loss (nats)")
    before = {name: summary["before"][name] for name in SHARES} if "before" in summary else {}
    _lines(right, rows, before, SHARES)
    _label(right, record, PERCENT, ylim=(-3, 103))
    return figure


def risks(records: Sequence[Record]) -> Figure:
    """R_adv, R_share, R_bd and ACC against rounds, a panel for each defense that ran with --track_risk."""
    figure, panels = _panels(records)
    for panel, record in zip(panels, records, strict=True):
        rows, summary = _tracked(record)
        before = {**summary["risk"]["before"], "acc": summary["before"]["acc"]}
        _lines(panel, rows, before, RISKS)
        search = summary["risk"]["search"]
        _label(panel, record, PERCENT, ylim=(-3, 103), title=f"{_named(record, summary)} ({_ball(search)})")
    _one_legend(figure, panels)
    return figure


def types(records: Sequence[Record]) -> Figure:
    """Shares of the three types among the adversarial examples of the purified network, stacked, against rounds."""
    figure, panels = _panels(records)
    for panel, record in zip(panels, records, strict=True):
        rows, summary = _tracked(record)
        rows = [{"epoch": 0, **summary["risk"]["before"]}, *(row for row in rows if "type1" in row)]
        heights = [[row[name] for row in rows] for name in TYPES]
        colours = [colour for _, colour, _ in TYPES.values()]
        bands = panel.stackplot([row["epoch"] for row in rows], heights, colors=colours, alpha=0.75)
        for band, (name, _, hatch) in zip(bands, TYPES.values(), strict=True):
            band.set(hatch=hatch, edgecolor="white", label=name)
        _label(panel, record, PERCENT, ylim=(0, 100), title=_named(record, summary))
    _one_legend(figure, panels)
    return figure


def _named(record: Record, summary: Mapping[str, Any]) -> str:
    return marked(record.path.name, summary.get("selection"))


def history(record: Record) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of `metrics.jsonl`, those of a method's last stage where it has several, and `summary.json`."""
    return parse.last_stage(parse.rows(record.path / METRICS)), record.summary()


def _tracked(record: Record) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows, summary = history(record)
    if "risk" not in summary:
        raise RecordError(f"{record.path} has no risks; run the defense with --track_risk")
    return rows, summary


def _panels(records: Sequence[Record]) -> tuple[Figure, list[Any]]:
    figure, panels = plt.subplots(
        1, len(records), figsize=(0.6 + 3.0 * len(records), 2.9), sharey=True, squeeze=False, layout="constrained"
    )
    return figure, list(panels[0])


def _lines(panel: Any, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any], styles: dict[str, Style]) -> None:
    for name, (label, colour, line) in styles.items():
        points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        if before.get(name) is not None:
            points.insert(0, (0, before[name]))
        if points:
            panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour, label=label)


def _label(panel: Any, record: Record, ylabel: str, **more: Any) -> None:
    panel.set(xlabel="round" if record.path.parent.name == "defense" else "epoch", ylabel=ylabel, **more)
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.spines[["top", "right"]].set_visible(False)
    if panel.get_lines() and "title" not in more:
        panel.legend(frameon=False, fontsize=8)


def _one_legend(figure: Figure, panels: Sequence[Any]) -> None:
    for panel in panels[1:]:
        panel.set_ylabel("")
    handles = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels())}  # noqa: B905
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)


def _ball(search: Mapping[str, Any]) -> str:
    norm = {"L_inf": r"$L_\infty$", "L2": "$L_2$", "L1": "$L_1$"}[search["norm"]]
    return f"{norm} radius {search['eps']:g}, {search['steps']} steps"
