"""The network that a caller hands to a defense: checked, copied, and handed back as it came."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sau.errors import ConfigError, TrainingError, first_line, lacks_memory
from sau.models import check_initialised, is_finite, match_memory_format, to_channels_last
from sau.types import Pixels


def plain(model: Any) -> nn.Module:
    """The network itself, where torch.compile wrapped it; ConfigError for what cannot be purified."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {type(model).__name__}, allowed is a network; load weights into one first")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("model is a ScriptModule, allowed is a network in Python; load its weights into one first")
    check_initialised(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigError("the weights of the network lie on `meta` and have no values; load some into it first")
    kinds = [parameter.dtype for parameter in model.parameters()]
    if not kinds:
        raise ConfigError("the network has no weights (parameters), so that there is nothing to purify")
    if whole := [kind for kind in kinds if not (kind.is_floating_point or kind.is_complex)]:
        raise ConfigError(f"weights are {whole[0]}, which nothing can train; make them buffers (register_buffer)")
    if short := [kind for kind in kinds if kind.is_floating_point and kind.itemsize < 4]:
        raise ConfigError(
            f"weights are {short[0]}, which loses small updates; give model.float(), and turn what comes back into "
            f"{short[0]}"
        )
    return model


def home(model: nn.Module) -> torch.device:
    """Where a network lies."""
    return next(model.parameters()).device


def place_for(model: nn.Module, device: torch.device | str | None) -> torch.device:
    """Where to compute: on `device`, or else where `model` lies; ConfigError where torch cannot."""
    if device is None:
        return home(model)
    try:
        place = torch.device(device)
        torch.zeros((), device=place).item()  # `meta` has no values
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ConfigError(f"device is {str(device)!r}, which torch cannot use here: {first_line(error)}") from None
    return place


def copied(model: nn.Module, place: torch.device) -> nn.Module:
    """A copy of `model` on `place`, in eval mode and without gradients; ConfigError where there can be none."""
    try:
        mine = copy.deepcopy(model)
    except TypeError as error:  # of a lock, an open file, a process
        raise ConfigError(f"the network cannot be copied ({first_line(error)}); take that out of it first") from None
    except RuntimeError as error:
        if lacks_memory(error):
            raise
        raise ConfigError(
            f"the network cannot be copied ({first_line(error)}): it keeps tensors that were computed; call "
            "torch.nn.utils.prune.remove or remove_weight_norm on it, or, if it keeps activations, run it once under "
            "torch.no_grad()"
        ) from None
    mine = mine.to(place)
    mine.zero_grad()
    for module in list(mine.modules()):  # hooks, by which methods look into a network, do not run in compiled layers
        for name, layer in list(module._modules.items()):  # by every name that it has
            if layer is not None and hasattr(layer, "_orig_mod"):
                setattr(module, name, layer._orig_mod)
    return to_channels_last(mine.eval())


def handed_back(mine: nn.Module, model: nn.Module, frozen: Iterable[nn.Parameter]) -> nn.Module:
    """`mine`, once a copy of `model`, with those weights frozen, and lying in memory and on a device as that does."""
    for parameter in frozen:
        parameter.requires_grad_(False)
    mine.zero_grad()  # or the caller's first step would make the last one of the defense again, frozen or not
    return match_memory_format(mine, model).to(home(model)).eval()


def check_weights(model: nn.Module) -> None:
    """TrainingError if a weight is not finite, or a buffer unsound."""
    kept = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and not is_finite(tensor):
            raise TrainingError(f"{name} of the network holds NaN or infinity")


@torch.no_grad()
def check_own(model: nn.Module, x: Pixels) -> None:
    """ConfigError if `model` answers `x` by other weights than its own, which nothing that is done to it would change:
    a function that was set as `forward` of a network is that of the copy, too, and goes on using the first one's."""
    answer, before = model(x), [parameter.clone() for parameter in model.parameters()]
    try:
        for parameter in model.parameters():
            parameter.mul_(1.01).add_(0.01)
        same = torch.equal(model(x), answer)
    finally:
        for parameter, kept in zip(model.parameters(), before, strict=True):
            parameter.copy_(kept)
    if same and answer.isfinite().all() and answer.any():  # one that is dead answers 0, whatever its weights
        raise ConfigError(
            "what the network answers does not depend on its weights; if a function was set as its forward, which then "
            "is not the copy's own, define forward in a class"
        )
