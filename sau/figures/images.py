"""Images: clean beside triggered, adversarial examples, and maps of the last features before and after a defense."""

from collections.abc import Mapping, Sequence
from typing import Literal

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from sau.data.images import Images, evenly_spaced, to_float
from sau.defense.hooks import forward_hooks
from sau.errors import ConfigError, DataError
from sau.evaluate import predict
from sau.pgd import Search
from sau.quality import magnified
from sau.risk import measure
from sau.types import Pixels


def images(test: Images, triggered: Images, columns: int = 6) -> Figure:
    """Rows: clean, triggered, difference magnified so that its largest value is white. Columns: test images."""
    chosen = evenly_spaced(len(triggered), columns)
    after, before = to_float(triggered.pixels[chosen]), to_float(test.pixels[triggered.index[chosen]])
    difference, gain = magnified(after - before)
    true, wanted = triggered.true_labels[chosen].tolist(), triggered.labels[chosen].tolist()
    notes = [f"class {y}, wanted {t}" for y, t in zip(true, wanted, strict=True)]
    rows = {"clean": before, "triggered": after, f"difference\nx{gain:.3g}": difference}
    return _grid(rows, {"triggered": notes})


def examples(
    model: nn.Module,
    reference: nn.Module,
    test: Images,
    triggered: Images,
    search: Search,
    columns: int = 5,
    seed: int = 0,
) -> Figure:
    """Clean, triggered, a shared adversarial example (type I), a non-shared one (II or III), and both differences.

    Below each image stand the predictions of the backdoored network h_b and of the purified one, h. Columns are test
    images that both classify correctly and that have both kinds of examples, up to `columns`.

    Raises DataError if no image has both kinds, as with a model that equals the reference.
    """
    clean = test[triggered.index]
    x, y = to_float(clean.pixels), clean.labels
    found = measure(model, reference, clean, triggered, search, seed=seed)
    right = (predict(model, x) == y) & (predict(reference, x) == y)
    chosen = (right & found.share & (found.kind >= 2)).nonzero()[:columns, 0]
    if len(chosen) == 0:
        raise DataError(
            f"none of {len(y)} images has both a shared and a non-shared adversarial example; use more images or "
            "another network"
        )
    shared, other = found.witness[chosen], found.example[chosen]
    difference, gain = magnified(torch.cat([shared, other]))
    rows = {
        "clean": x[chosen],
        "triggered": to_float(triggered.pixels[chosen]),
        "shared (I)": x[chosen] + shared,
        f"(I): difference\nx{gain:.3g}": difference[: len(chosen)],
        "not shared\n(II or III)": x[chosen] + other,
        f"(II or III):\ndifference\nx{gain:.3g}": difference[len(chosen) :],
    }
    notes = {}
    for name, row in rows.items():
        if "difference" not in name:
            pairs = zip(predict(reference, row).tolist(), predict(model, row).tolist(), strict=True)
            notes[name] = [f"$h_b$: {b}  $h$: {a}" for b, a in pairs]
    return _grid(rows, notes)


def _grid(rows: Mapping[str, Tensor], notes: Mapping[str, Sequence[str]]) -> Figure:
    """Named rows of images [columns, C, H, W] in [0, 1], with a line of text below those that have one."""
    columns = len(next(iter(rows.values())))
    size = (1.15 * columns + 0.5, 1.4 * len(rows))
    figure, axes = plt.subplots(len(rows), columns, figsize=size, squeeze=False, layout="constrained")
    for line, (title, row) in zip(axes, rows.items(), strict=True):
        for axis, image, text in zip(line, row, notes.get(title, [""] * columns), strict=True):
            rgb = image.expand(3, -1, -1) if len(image) == 1 else image
            axis.imshow(rgb.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.set_xlabel(text, fontsize=7)
            axis.spines[:].set_visible(False)
        line[0].set_ylabel(title, fontsize=8)
    return figure


@torch.no_grad()
def last_features(model: nn.Module, x: Pixels, batch_size: int = 500) -> Tensor:
    """[B, F]: the input of the linear layer that runs last. ConfigError if none runs."""
    inputs: list[Tensor] = []
    kept: list[Tensor] = []
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with forward_hooks((layer, lambda layer, given, output: inputs.append(given[0])) for layer in linear):
        for batch in x.split(batch_size):
            model(batch)
            if not inputs:
                raise ConfigError("no linear layer of the network runs, so there are no last features to draw")
            kept.append(inputs[-1].float().flatten(1).cpu())
            inputs.clear()
    return torch.cat(kept)


def features(
    before: nn.Module,
    after: nn.Module,
    test: Images,
    triggered: Images,
    method: Literal["tsne", "pca"] = "tsne",
    count: int = 600,
) -> Figure:
    """Maps of the last features of two networks: `count` clean images and a quarter as many triggered ones.

    Clean images of the target label are blue, others grey with their class at the centre; triggered ones are crosses.
    """
    clean = test[evenly_spaced(len(test), count)]
    bad = triggered[evenly_spaced(len(triggered), max(1, count // 4))]
    x, n = to_float(torch.cat([clean.pixels, bad.pixels])), len(clean)
    target = int(bad.labels.mode().values)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    for panel, (title, model) in zip(panels, {"backdoored": before, "purified": after}.items(), strict=True):
        points, wanted = _to_plane(last_features(model.eval(), x), method), clean.labels == target
        panel.scatter(*points[:n][~wanted].T, s=5, color="#bbbbbb", label="clean, other classes")
        panel.scatter(*points[:n][wanted].T, s=8, color="#0072b2", label=f"clean, class {target} (target)")
        panel.scatter(*points[n:].T, s=14, color="#d55e00", marker="x", linewidths=0.8, label="triggered")
        for label in clean.labels[~wanted].unique().tolist():
            centre = points[:n][clean.labels == label].median(0).values.tolist()
            panel.annotate(str(label), centre, fontsize=9, weight="bold")
        name = {"tsne": "t-SNE", "pca": "principal components"}[method]
        panel.set(xticks=[], yticks=[], title=title, xlabel=f"{name} of the last features (no unit)")
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def _to_plane(points: Tensor, method: str) -> Tensor:
    centred = (points - points.mean(0)).numpy()
    if method == "pca":
        return torch.from_numpy(PCA(2, random_state=0).fit_transform(centred))
    perplexity = min(30, (len(points) - 1) / 3)
    return torch.from_numpy(TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(centred))
