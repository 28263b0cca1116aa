"""Pictures beside their triggered versions, and the grid that pictures are shown in."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from sau.data.images import Images, evenly_spaced, to_float
from sau.quality import magnified


def pictures(test: Images, triggered: Images, columns: int = 6) -> Figure:
    """Rows clean, triggered, difference magnified so that the largest one is white; columns are test pictures."""
    chosen = evenly_spaced(len(triggered), columns)
    after, before = to_float(triggered.pixels[chosen]), to_float(test.pixels[triggered.index[chosen]])
    title, difference = beside(after - before)
    truth, wanted = triggered.true_labels[chosen], triggered.labels[chosen]
    notes = [f"class {y}, wanted {t}" for y, t in zip(truth.tolist(), wanted.tolist(), strict=True)]
    return grid({"clean": before, "triggered": after, title: difference}, {"triggered": notes})


def beside(difference: Tensor) -> tuple[str, Tensor]:
    """A name for the row that shows a difference, and what it shows."""
    shown, gain = magnified(difference)
    return f"difference\nx{gain:.3g}", shown


def grid(rows: Mapping[str, Tensor], notes: Mapping[str, Sequence[str]]) -> Figure:
    """Named rows of pictures [columns, C, H, W] in [0, 1], with a line of text below those that have one."""
    columns = len(next(iter(rows.values())))
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.15 * columns + 0.5, 1.4 * len(rows)), squeeze=False, layout="constrained"
    )
    for line, (title, row) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, row, strict=True):
            colours = picture.expand(3, -1, -1) if len(picture) == 1 else picture
            axis.imshow(colours.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, fontsize=8)
        for axis, text in zip(line, notes.get(title, ()), strict=False):
            axis.set_xlabel(text, fontsize=7)
    return figure
