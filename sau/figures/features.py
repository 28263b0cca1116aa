"""Where clean and triggered pictures lie in a network's last features, before and after purification."""

from typing import Literal

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from sau.data.images import Images, evenly_spaced, to_float
from sau.defense.hooks import forward_hooks
from sau.errors import ConfigError
from sau.types import Pixels

NAMES = {"tsne": "t-SNE", "pca": "principal components"}


@torch.no_grad()
def last_features(model: nn.Module, x: Pixels, batch_size: int = 500) -> Tensor:
    """[B, F]: what the linear layer that runs last is given. ConfigError for a network in which none runs."""
    given: list[Tensor] = []
    kept: list[Tensor] = []
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    with forward_hooks((layer, lambda layer, inputs, output: given.append(inputs[0])) for layer in linear):
        for block in x.split(batch_size):
            model(block)
            if not given:
                raise ConfigError("no linear layer of the network runs, so there are no last features to draw")
            kept.append(given[-1].float().flatten(1).cpu())
            given.clear()
    return torch.cat(kept)


def features(
    before: nn.Module,
    after: nn.Module,
    test: Images,
    triggered: Images,
    method: Literal["tsne", "pca"] = "tsne",
    count: int = 600,
) -> Figure:
    """Two maps by scikit-learn, each of its own network: `count` clean pictures and a quarter as many triggered ones.

    Clean pictures of the label that most triggered ones want are blue, the others grey with their class written at
    their centre; triggered ones are crosses.
    """
    clean = test[evenly_spaced(len(test), count)]
    bad = triggered[evenly_spaced(len(triggered), max(1, count // 4))]
    x = to_float(torch.cat([clean.pixels, bad.pixels]))
    target = int(bad.labels.mode().values)
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.4), layout="constrained")
    for panel, (name, model) in zip(panels, {"backdoored": before, "purified": after}.items(), strict=True):
        points = _flat(last_features(model.eval(), x), method)
        wanted, ours, theirs = clean.labels == target, points[: len(clean)], points[len(clean) :]
        panel.scatter(*ours[~wanted].T, s=5, color="#bbbbbb", label="clean, other classes")
        panel.scatter(*ours[wanted].T, s=8, color="#0072b2", label=f"clean, class {target} (target)")
        panel.scatter(*theirs.T, s=14, color="#d55e00", marker="x", linewidths=0.8, label="triggered")
        for label in clean.labels[~wanted].unique().tolist():
            panel.annotate(str(label), ours[clean.labels == label].median(0).values.tolist(), fontsize=9, weight="bold")
        panel.set(xticks=[], yticks=[], title=name, xlabel=f"{NAMES[method]} of the last features (no unit)")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    return figure


def _flat(points: Tensor, method: str) -> Tensor:
    standing = points - points.mean(0)
    if method == "pca":
        return torch.from_numpy(PCA(2, random_state=0).fit_transform(standing.numpy()))
    perplexity = min(30, (len(points) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=0)
    return torch.from_numpy(tsne.fit_transform(standing.numpy()))
