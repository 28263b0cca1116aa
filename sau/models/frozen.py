"""A network that is searched through but not trained, on the weights of one that is."""

import copy

from torch import nn


def frozen(model: nn.Module) -> nn.Module:
    """`model` over again on the same weights and statistics in memory, without gradients of weights.

    Compiled code forms all gradients that there may be, asked for or not, and is compiled anew when `requires_grad`
    changes; so a search through a network that is being trained goes through this.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    theirs = (*model.parameters(), *model.buffers())
    for ours, other in zip((*twin.parameters(), *twin.buffers()), theirs, strict=True):
        ours.data = other.data
    return twin
