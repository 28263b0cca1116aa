"""The network that a caller gives to a defense: checked, copied, and given back as it came."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sau.errors import ConfigError, first_line, lacks_memory
from sau.models import check_initialised, match_memory_format, to_channels_last


def unwrap(model: Any) -> nn.Module:
    """The network itself, where torch.compile wrapped it; ConfigError for what cannot be purified."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"model is {type(model).__name__}, allowed is a network (nn.Module); load its weights into one"
        )
    check_initialised(model)
    parameters = list(model.parameters())
    if not parameters:
        raise ConfigError("the network has no weights (parameters), so that there is nothing to purify")
    if any(parameter.is_meta for parameter in parameters):
        raise ConfigError("the weights of the network lie on `meta` and have no values; load some into it first")
    if short := [p.dtype for p in parameters if p.is_floating_point() and p.itemsize < 4]:
        raise ConfigError(f"weights are {short[0]}, which loses small updates; give model.float()")
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where a network lies."""
    return next(model.parameters()).device


def compute_device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """`device`, or else that of `model`; ConfigError where torch cannot compute there."""
    if device is None:
        return device_of(model)
    try:
        place = torch.device(device)
        torch.zeros((), device=place).item()  # `meta` has no values
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigError(f"device is {str(device)!r}, which torch cannot use here: {first_line(error)}") from None
    return place


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, in eval mode, without gradients and compiled layers; ConfigError if torch cannot
    copy it."""
    try:
        mine = copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:
        if lacks_memory(error):
            raise
        raise ConfigError(
            f"the network cannot be copied ({first_line(error)}); call torch.nn.utils.prune.remove or "
            "remove_weight_norm on it, and remove locks, open files and kept activations from its attributes"
        ) from None
    mine = mine.to(device)
    mine.zero_grad()
    for module in list(mine.modules()):  # hooks, by which methods look into a network, do not run in compiled layers
        for name, layer in list(module._modules.items()):  # a layer may have several names
            if layer is not None and hasattr(layer, "_orig_mod"):
                setattr(module, name, layer._orig_mod)
    return to_channels_last(mine.eval())


def restore(mine: nn.Module, model: nn.Module, frozen: Iterable[nn.Parameter]) -> nn.Module:
    """`mine`, once a copy of `model`, with those weights frozen, and with that one's memory format and device."""
    for parameter in frozen:
        parameter.requires_grad_(False)
    mine.zero_grad()  # or the caller's optimiser would repeat the last step of the defense
    return match_memory_format(mine, model).to(device_of(model)).eval()
