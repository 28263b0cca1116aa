"""A network that is searched through but not trained, on the weights of one that is."""

import copy
from typing import Any

from torch import nn


def searched(model: Any) -> dict[str, Any]:
    """What the state of a step needs to search through `model`, which it also trains: nothing unless it is compiled.

    The search then goes through a twin, on CUDA graphs if those were asked for. `model` itself is compiled without
    them, for what it has answered must outlive the search, and the memory of a graph is used again by the next pass.
    """
    if not getattr(model, "compiled", None):
        return {}
    twin = frozen(model.eval())
    model.compiled = "default"
    return {"frozen": twin.forward}


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
