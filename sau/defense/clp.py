"""CLP, Channel Lipschitzness Pruning (Zheng, Tang, Li, Liu, ECCV 2022). Needs no images.

A channel that a small trigger can switch on has a large Lipschitz constant. For channel c of a batch norm that is fed
by a convolution with filter W_c, an upper bound of it is

    sigma_c = ||W_c||_2 * |gamma_c| / sqrt(var_c + eps)

where W_c is reshaped to (input channels) x (k * k), ||.||_2 is its largest singular value, gamma the batch norm's
scale, var its running variance. Channels whose sigma stands out in their layer are pruned.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import first_batch
from sau.defense import pruning
from sau.errors import ConfigError
from sau.types import Batched, Pixels

Pairs = dict[str, nn.Conv2d]  # for each batch norm, by its name, the convolution that feeds it


class CLP(pruning.ChannelOutlierPruning):
    """Prune the channels with the largest Lipschitz constants."""

    name = "clp"
    data_use = "none"

    batch_size: int = param(256, "batch size of the accuracy check; no effect on the result")
    pairing: Literal["traced", "order"] = param(
        "traced",
        "convolution of a batch norm: the one traced to it, or (order) the last before it, as in the benchmark",
    )

    def scores(self, model: nn.Module, batches: Batched) -> pruning.ByNorm:
        norms = pruning.batch_norms(model, self.name, running=True)
        if self.pairing == "order":
            pairs = ordered(model, norms)
        else:
            pairs = traced(model, norms, torch.zeros_like(first_batch(batches)[0][:1]))
        if not pairs:
            raise ConfigError("no batch norm of the network is fed by a convolution, as clp needs; try anp, ft or sau")
        return {name: lipschitz(conv, norms[name]) for name, conv in pairs.items()}


def lipschitz(conv: nn.Conv2d, norm: nn.BatchNorm2d | nn.SyncBatchNorm) -> Tensor:
    """sigma [C] of the convolution and the batch norm after it, in float64."""
    filters = conv.weight.detach().double().flatten(2)  # [C, inputs a group, k * k]
    spectral = torch.linalg.matrix_norm(filters, ord=2)
    return spectral * norm.weight.detach().double().abs() / (norm.get_buffer("running_var").double() + norm.eps).sqrt()


def traced(model: nn.Module, norms: pruning.Norms, x: Pixels) -> Pairs:
    """The batch norms that take the very output of one convolution, and nothing else, while `x` passes through."""
    calls, pairs = pruning.trace(model, x, nn.Conv2d, *pruning.NORMS), Pairs()
    for name, norm in norms.items():
        feeders = {feeder for layer, feeder in calls if layer is norm}
        if len(feeders) == 1 and isinstance(conv := feeders.pop(), nn.Conv2d):
            pairs[name] = conv
    return pairs


def ordered(model: nn.Module, norms: pruning.Norms) -> Pairs:
    """Each batch norm with the last convolution before it in the order of `model.modules()`, where channels agree."""
    pairs: Pairs = {}
    last: nn.Conv2d | None = None
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            last = module
        elif name in norms and last is not None and last.out_channels == norms[name].num_features:
            pairs[name] = last
    return pairs
