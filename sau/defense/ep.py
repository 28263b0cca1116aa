"""EP, entropy-based pruning (Zheng, Tang, Li, Liu, "Pre-activation Distributions Expose Backdoor Neurons",
NeurIPS 2022).

It takes the attacker's training images; their labels choose nothing. On a mixture of clean and poisoned images a
backdoor channel has two narrow modes, so its histogram has a low entropy. For each batch norm, with one batch of n
images:

    t_ic = max over positions of the input of channel c for image i,     z_ic = (t_ic - mean_c) / std_c
    H_c = - sum_b p_cb ln p_cb,     p_cb = share of the z_ic in bin b

with bins of width `bin_width` from the layer's lowest z on, common to all of its channels. Channels are pruned where
H_c lies more than u standard deviations below the mean of the layer: -H stands out.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from sau.config import param
from sau.defense import pruning
from sau.errors import DataError
from sau.models.normalized import forward_hooks
from sau.types import Batched, Pixels


class EP(pruning.ChannelOutlierPruning):
    """Prune the channels with the lowest entropy on images of which some are poisoned."""

    name = "ep"
    data_use = "poisoned"

    batch_size: int = param(256, "images that the histograms are made of; drawn from those given", ge=2)
    bin_width: float = param(0.1, "width of a bin, in standard deviations of a channel", ge=0.001, aliases=("step",))
    augment: bool = param(True, "crop and flip the images as in training")

    def scores(self, model: nn.Module, batches: Batched) -> pruning.ByNorm:
        norms = pruning.batch_norms(model, self.name)
        maxima: dict[str, Tensor] = {}

        def add(name: str, norm: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            highest = inputs[0].unflatten(1, (-1, 1)).flatten(2).amax(2).double()  # [B, C], also of inputs [B, C]
            maxima[name] = torch.maximum(highest, maxima.get(name, highest))  # a layer may run more than once

        with forward_hooks((norm, partial(add, name)) for name, norm in norms.items()):
            model(first_images(batches, self.batch_size))
        z = {name: (t - t.mean(0)) / t.std(0).clamp_min(1e-12) for name, t in maxima.items()}  # constant ones are 0
        return {name: -entropy(each, self.bin_width) for name, each in z.items()}


def first_images(batches: Batched, count: int) -> Pixels:
    """The first `count` images, which the seed has shuffled; all of them if there are fewer."""
    drawn: list[Tensor] = []
    for x, *_ in batches:
        drawn.append(x)
        if sum(map(len, drawn)) >= count:
            break
    if len(x := torch.cat(drawn)[:count]) < 2:
        raise DataError("1 image is given, but a histogram of ep needs 2 and more; give a larger ratio")
    return x


def entropy(z: Tensor, width: float) -> Tensor:
    """H [C], in nats, of the histogram of each column of z [n, C], with bins of `width` from the lowest value of all.

    As in the benchmark only whole bins count, up to the highest value, and a value on an edge is in no bin (so the
    lowest is in none).
    """
    low, high = float(z.min()), float(z.max())
    edges = low + width * np.arange(int((high - low) / width) + 1)
    columns = z.t().cpu().numpy()
    counts = [np.histogram(column[~np.isin(column, edges)], edges)[0] for column in columns]
    return torch.special.entr(torch.tensor(np.array(counts) / len(z), device=z.device)).sum(1)
