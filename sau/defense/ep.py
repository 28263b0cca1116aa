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

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from sau.config import param
from sau.defense import pruning
from sau.errors import DataError
from sau.types import Batched, Pixels


@dataclass(frozen=True, kw_only=True)
class EP(pruning.ChannelOutlierPruning):
    """Prune the channels with the lowest entropy on images of which some are poisoned."""

    name: ClassVar[str] = "ep"
    data_use = "poisoned"

    batch_size: int = param(256, "images that the histograms are made of; drawn from those given", ge=2)
    bin_width: float = param(0.1, "width of a bin, in standard deviations of a channel", ge=0.001, aliases=("step",))
    augment: bool = param(True, "crop and flip the images as in training")

    def scores(self, model: nn.Module, batches: Batched) -> pruning.Scores:
        norms = pruning.batch_norms(model, self.name)
        maxima: dict[str, Tensor] = {}

        def add(name: str, inputs: Tensor) -> None:
            highest = inputs.unflatten(1, (-1, 1)).flatten(2).amax(2)  # [B, C], also of inputs [B, C]
            maxima[name] = torch.maximum(highest, maxima.get(name, highest))  # a layer may run more than once

        pruning.collect_norm_inputs(model, norms, self._draw(batches), add)
        return {name: -entropy(standardised(t.double()), self.bin_width) for name, t in maxima.items()}

    def _draw(self, batches: Batched) -> Pixels:
        """The first `batch_size` images, which the seed has shuffled; all of them if there are fewer."""
        drawn: list[Tensor] = []
        for x, *_ in batches:
            drawn.append(x)
            if sum(map(len, drawn)) >= self.batch_size:
                break
        x = torch.cat(drawn)[: self.batch_size]
        if len(x) < 2:
            raise DataError("1 image is given, but a histogram of ep needs 2 and more; give a larger ratio")
        return x


def standardised(t: Tensor) -> Tensor:
    """The columns of t [n, C] with mean 0 and standard deviation 1 (n - 1 in the denominator); constant ones are 0."""
    return (t - t.mean(0)) / t.std(0).clamp_min(1e-12)


def entropy(z: Tensor, width: float) -> Tensor:
    """H [C], in nats, of the histogram of each column of z [n, C], with bins of `width` from the lowest value of all.

    As in the benchmark only whole bins count, up to the highest value, and a value on an edge is in no bin (so the
    lowest is in none).
    """
    low, high = float(z.min()), float(z.max())
    bins = int((high - low) / width)
    edges = low + width * torch.arange(bins + 1, dtype=z.dtype, device=z.device)
    columns = z.t().contiguous()
    bin_after = torch.bucketize(columns, edges)  # edges[b - 1] < z <= edges[b]
    inside = (bin_after == torch.bucketize(columns, edges, right=True)) & (bin_after >= 1) & (bin_after <= bins)
    counts = columns.new_zeros(len(columns), bins + 2).scatter_add_(1, bin_after, inside.to(z.dtype))
    return torch.special.entr(counts / len(z)).sum(1)
