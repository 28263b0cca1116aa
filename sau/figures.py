"""Figures of a record, drawn with matplotlib: curves, risks, images, features; and ACC against ASR over many runs.

They need the extra `report`. Colours are Okabe and Ito's, which readers with any colour vision tell apart; line styles
repeat what colours say.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from sau.data.batches import to_float
from sau.data.images import Images, evenly_spaced
from sau.errors import DataError, RecordError
from sau.evaluate import last_features, predict
from sau.files import write
from sau.quality import magnified
from sau.record.folder import Record
from sau.report.cells import Section
from sau.report.results import NONE, marked, read_metrics
from sau.risk import Search, measure

Style = tuple[str, str | None, str]  # label, colour, line style or hatch
Rows = Sequence[Mapping[str, float]]  # of `metrics.jsonl`

BLACK, GREY = "#000000", "#808080"  # grey on light and dark pages
COLOURS = BLUE, RED, GREEN, PURPLE, ORANGE, SKY, BROWN = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b"
)  # fmt: skip
SCORES: dict[str, Style] = {"acc": ("ACC", BLUE, "-"), "asr": ("ASR", RED, "--"), "racc": ("R-ACC", GREEN, "-.")}
RISKS: dict[str, Style] = {
    "acc": SCORES["acc"],
    "r_adv": ("$R_{adv}$", BLACK, "-"),
    "r_share": ("$R_{share}$", PURPLE, "--"),
    "r_share_sau": ("$R_{share}$, SAU's search", ORANGE, "-."),
    "r_bd": ("$R_{bd}$", RED, ":"),
}
TYPES: dict[str, Style] = {
    "type1": ("I: both alike", RED, "///"),
    "type2": ("II: only the purified", SKY, "..."),
    "type3": ("III: both, differently", GREEN, "\\\\\\"),
}
NORMS = {"L_inf": r"$L_\infty$", "L2": "$L_2$", "L1": "$L_1$"}
PERCENT = "test images (%)"
MAPS = {"tsne": "t-SNE", "pca": "principal components"}
TICKS = (0, 1, 5, 10, 25, 50, 100)  # ASR in percent


def panels(rows: int, columns: int, size: tuple[float, float], **how: Any) -> tuple[Figure, list[Any]]:
    """A figure of `size` inches and its panels, row by row, open at the top and on the right."""
    figure = plt.figure(figsize=size, layout="constrained")
    found = list(figure.subplots(rows, columns, squeeze=False, **how).flat)
    for panel in found:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, found


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, close the figure, and return the two paths."""
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        write(path, _drawn(figure, path.suffix[1:]))  # replaces a link instead of following it
    plt.close(figure)
    return paths


def data_url(figure: Figure, kind: str) -> str:
    """The figure as the URL of an image, png or svg, without a background, for a page; the figure is closed."""
    content = base64.b64encode(_drawn(figure, kind, transparent=True)).decode()
    plt.close(figure)
    return f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{content}"


def _drawn(figure: Figure, kind: str, **how: bool) -> bytes:
    buffer, metadata = io.BytesIO(), {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata, **how)
    return buffer.getvalue()


def add_legend(figure: Figure, columns: int = 3) -> None:
    """One legend below, with every label of the panels once."""
    pairs = [pair for panel in figure.axes for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    if handles := {label: handle for handle, label in pairs}:
        place: Any = "outside lower center"
        figure.legend(handles.values(), handles.keys(), loc=place, ncols=columns, frameon=False, fontsize=8)


def curves(record: Record) -> Figure:
    """Losses on the left; ACC, ASR and R-ACC where they were measured on the right."""
    summary = record.summary()
    before, after = summary.get("before", {}), summary.get("after", {})
    rows = read_metrics(record.path) or [{"epoch": 1, **after}]  # a defense without rounds has no rows
    figure, (left, right) = panels(1, 2, (7.2, 2.7))
    losses = dict.fromkeys(name for row in rows for name in row if name == "loss" or name.endswith("_loss"))
    _plot(left, rows, {}, {name: (name.replace("_", " "), None, "-") for name in losses})
    _plot(right, rows, before, SCORES)
    right.set_ylim(-3, 103)
    for panel, label in ((left, "mean loss (nats)"), (right, PERCENT)):
        _label(panel, record, label)
        if panel.get_lines():
            panel.legend(frameon=False, fontsize=8)
    return figure


def risks(records: Sequence[Record]) -> Figure:
    """R_adv, R_share, R_bd and ACC against rounds, a panel for each defense that ran with --track_risk."""
    figure, shown = _tracked(records)
    for panel, rows, summary in shown:
        before, search = summary["risk"]["before"], summary["risk"]["search"]
        _plot(panel, rows, {**before, "acc": summary["before"]["acc"]}, RISKS)
        ball = f"{NORMS[search['norm']]} radius {search['eps']:g}, {search['steps']} steps"
        panel.set(ylim=(-3, 103), title=f"{panel.get_title()} ({ball})")
    add_legend(figure)
    return figure


def types(records: Sequence[Record]) -> Figure:
    """Shares of the three types of adversarial examples of the purified network, stacked, against rounds."""
    figure, shown = _tracked(records)
    for panel, rows, summary in shown:
        rows = [{"epoch": 0, **summary["risk"]["before"]}, *(row for row in rows if "type1" in row)]
        bands = panel.stackplot([row["epoch"] for row in rows], [[row[name] for row in rows] for name in TYPES])
        for band, (label, colour, hatch) in zip(bands, TYPES.values(), strict=True):
            band.set(facecolor=colour, alpha=0.75, hatch=hatch, edgecolor="white", label=label)
        panel.set_ylim(0, 100)
    add_legend(figure)
    return figure


def _tracked(records: Sequence[Record]) -> tuple[Figure, list[tuple[Axes, Rows, dict[str, Any]]]]:
    """For each defense a panel, its metrics and its summary; RecordError for one that did not track risks."""
    figure, every = panels(1, len(records), (0.6 + 3.0 * len(records), 2.9), sharey=True)
    found: list[tuple[Axes, Rows, dict[str, Any]]] = []
    for panel, record in zip(every, records, strict=True):
        if "risk" not in (summary := record.summary()):
            raise RecordError(f"{record.path} has no risks; run the defense with --track_risk")
        _label(panel, record, PERCENT if panel is every[0] else "")
        panel.set_title(marked(record.path.name, summary.get("selection")))
        found.append((panel, read_metrics(record.path), summary))
    return figure, found


def _plot(panel: Axes, rows: Sequence[Mapping[str, Any]], before: Mapping[str, Any], styles: dict[str, Style]) -> None:
    """A line a figure; `before` is its value in epoch 0."""
    for name, (label, colour, line) in styles.items():
        points = [(row["epoch"], row[name]) for row in ({"epoch": 0, **before}, *rows) if row.get(name) is not None]
        if points:
            panel.plot(*zip(*points, strict=True), line, marker="o", markersize=3, color=colour, label=label)


def _label(panel: Any, record: Record, ylabel: str) -> None:
    panel.set(xlabel="round" if record.path.parent.name == "defense" else "epoch", ylabel=ylabel)
    panel.xaxis.get_major_locator().set_params(integer=True)


def scatter(section: Section) -> tuple[Figure, list[str]] | None:
    """A numbered point a defense, and their names in this order; None if none was run on an attack that took.

    Over several attacks the points are means, of the defenses that ran on all of them.
    """
    cells = [(cell, asr.mean, acc.mean) for cell in section.cells
             if not cell.dead and (asr := cell.figures["asr"]) and (acc := cell.figures["acc"])]  # fmt: skip
    attacks = {cell.attack_name for cell, _, _ in cells if cell.defense != NONE}
    groups: dict[str, list[list[float]]] = {}
    for cell, *point in cells:
        if cell.attack_name in attacks:
            groups.setdefault(cell.name, []).append(point)
    points = {name: np.mean(each, 0) for name, each in groups.items() if len(each) == len(attacks)}
    before, names = points.pop(NONE, None), list(points)
    if not points:
        return None
    figure, (axis,) = panels(1, 1, (4.6, 3.8))
    for number, (name, point) in enumerate(points.items(), 1):
        chosen = "none" if name.endswith("(oracle)") else BLUE
        axis.plot(*point, "o", markerfacecolor=chosen, markeredgecolor=BLUE, clip_on=False)
        axis.annotate(str(number), point, (5, -3), textcoords="offset points", color=GREY, fontsize=8)
    if before is not None:
        axis.plot(*before, "s", color="black", markeredgecolor=GREY, clip_on=False)
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    title = f"mean over {len(attacks)} attacks" if len(attacks) > 1 else next(iter(attacks))
    axis.set(xlim=(0, 100), xlabel="ASR % (square-root scale), less is better", ylabel="ACC %", title=title)
    for text in (axis.title, axis.xaxis.label, axis.yaxis.label):
        text.set_color(GREY)
    axis.set_xticks(TICKS, map(str, TICKS))
    axis.tick_params(colors=GREY)
    axis.grid(color=GREY, alpha=0.3)
    axis.spines[:].set_visible(False)
    return figure, names


def images(test: Images, triggered: Images, columns: int = 6) -> Figure:
    """Rows: clean, triggered, difference magnified so that its largest value is white. Columns: test images."""
    shown = triggered[evenly_spaced(len(triggered), columns)]
    after, before = to_float(shown.pixels), to_float(test.pixels[shown.index])
    difference, gain = magnified(after - before)
    pairs = zip(shown.true_labels.tolist(), shown.labels.tolist(), strict=True)
    rows = {"clean": before, "triggered": after, f"difference\nx{gain:.3g}": difference}
    return _grid(rows, {"triggered": [f"class {true}, wanted {wanted}" for true, wanted in pairs]})


def examples(
    model: nn.Module, reference: nn.Module, test: Images, triggered: Images, search: Search, columns: int = 5
) -> Figure:
    """Clean, triggered, a shared adversarial example (type I), a non-shared one (II or III), and both differences.

    Below each image stand the predictions of the backdoored network h_b and of the purified one, h. Columns are test
    images that both classify correctly and that have both kinds of examples, up to `columns`.

    Raises DataError if no image has both kinds, as with a model that equals the reference.
    """
    clean = test[triggered.index]
    x, y = to_float(clean.pixels), clean.labels
    found = measure(model, reference, clean, triggered, search)
    right = (predict(model, x) == y) & (predict(reference, x) == y)
    chosen = (right & found.share & (found.kind >= 2)).nonzero()[:columns, 0]
    if len(chosen) == 0:
        raise DataError(f"none of {len(y)} images has shared and other adversarial examples; use more images")
    shared, other = found.witness[chosen], found.example[chosen]
    difference, gain = magnified(torch.cat([shared, other]))
    rows = {
        "clean": x[chosen], "triggered": to_float(triggered.pixels[chosen]), "shared (I)": x[chosen] + shared,
        f"(I): difference\nx{gain:.3g}": difference[: len(chosen)],
        "not shared\n(II or III)": x[chosen] + other,
        f"(II or III):\ndifference\nx{gain:.3g}": difference[len(chosen) :],
    }  # fmt: skip
    notes = {}
    for name in [name for name in rows if "difference" not in name]:
        pairs = zip(predict(reference, rows[name]).tolist(), predict(model, rows[name]).tolist(), strict=True)
        notes[name] = [f"$h_b$: {b}  $h$: {a}" for b, a in pairs]
    return _grid(rows, notes)


def _grid(rows: Mapping[str, Tensor], notes: Mapping[str, Sequence[str]]) -> Figure:
    """Named rows of images [columns, C, H, W] in [0, 1], with a line of text below those that have one."""
    columns = len(next(iter(rows.values())))
    figure, axes = panels(len(rows), columns, (1.15 * columns + 0.5, 1.4 * len(rows)))
    for number, (title, row) in enumerate(rows.items()):
        line = axes[number * columns :][:columns]
        for axis, image, text in zip(line, row, notes.get(title, [""] * columns), strict=True):
            axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).cpu().numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=7)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, fontsize=8)
    return figure


def features(
    before: nn.Module, after: nn.Module, test: Images, triggered: Images, method: Literal["tsne", "pca"] = "tsne",
    count: int = 600,
) -> Figure:  # fmt: skip
    """Maps of the last features of two networks: `count` clean images and a quarter as many triggered ones.

    Clean images of the target label are blue, others grey with their class at the centre; triggered ones are crosses.
    """
    clean, n = test[evenly_spaced(len(test), count)], min(count, len(test))
    bad = triggered[evenly_spaced(len(triggered), max(1, count // 4))]
    x, target = to_float(torch.cat([clean.pixels, bad.pixels])), int(bad.labels.mode().values)
    wanted = clean.labels == target
    figure, shown = panels(1, 2, (7.2, 3.4))
    plane: PCA | TSNE = PCA(2, random_state=0)
    if method == "tsne":
        plane = TSNE(2, perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0)
    for panel, (title, model) in zip(shown, {"backdoored": before, "purified": after}.items(), strict=True):
        found = last_features(model, x)
        points = torch.from_numpy(plane.fit_transform((found - found.mean(0)).numpy()))
        panel.scatter(*points[:n][~wanted].T, s=5, color="#bbbbbb", label="clean, other classes")
        panel.scatter(*points[:n][wanted].T, s=8, color=BLUE, label=f"clean, class {target} (target)")
        panel.scatter(*points[n:].T, s=14, color=RED, marker="x", linewidths=0.8, label="triggered")
        for label in clean.labels[~wanted].unique().tolist():
            centre = points[:n][clean.labels == label].median(0).values.tolist()
            panel.annotate(str(label), centre, fontsize=9, weight="bold")
        panel.set(xticks=[], yticks=[], title=title, xlabel=f"{MAPS[method]} of the last features (no unit)")
    add_legend(figure)
    return figure
