"""The network that a caller gives to a defense: checked before and after, copied, and given back as it came."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.images import check_counts
from sau.defense.inputs import unaugmented
from sau.errors import ConfigError, TrainingError
from sau.loop import Session
from sau.models import Normalized, match_memory_format, to_channels_last
from sau.models.normalized import check_initialised, check_labels, check_logits, is_finite, logits_of
from sau.types import Batched, Pixels

HARM = 0.1  # of the clean images
SHUFFLED = 20  # images that chance does not sort by class


def unwrap(model: Any) -> nn.Module:
    """The network itself, where torch.compile wrapped it; ConfigError for what cannot be purified."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(
            f"model is {type(model).__name__}, allowed is a network (nn.Module); load its weights into one"
        )
    check_initialised(model)
    if not (parameters := list(model.parameters())):
        raise ConfigError("the network has no weights (parameters), so that there is nothing to purify")
    if short := [p.dtype for p in parameters if p.is_floating_point() and p.itemsize < 4]:
        raise ConfigError(f"weights are {short[0]}, which loses small updates; give model.float()")
    return model


def device_of(model: nn.Module) -> torch.device:
    """Where a network lies."""
    return next(model.parameters()).device


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, in eval mode, without gradients and compiled layers."""
    mine = copy.deepcopy(model).to(device)
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


def check_weights(model: nn.Module) -> None:
    """TrainingError if a weight, or a buffer that is saved, is not finite."""
    kept = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and not is_finite(tensor):
            raise TrainingError(f"{name} of the network holds NaN or infinity")


def follows_images(model: nn.Module, x: Pixels) -> bool:
    """Whether the logits of `model` have a gradient to its images `x`."""
    with torch.enable_grad():
        z = model(x := x[:8].detach().requires_grad_())
        return z.requires_grad and torch.autograd.grad(z.sum(), x, allow_unused=True)[0] is not None


def _check_gradients(method: Any, model: nn.Module, x: Pixels) -> None:
    """ConfigError if the logits are probabilities, or do not follow the weights or images that `method` moves."""
    with torch.enable_grad():
        check_logits(z := model(x))
    if not z.requires_grad or (method.gradients == "images" and not follows_images(model, x)):
        advice = "take no_grad, detach or numpy out of its forward, or try clp, bnp or ep"
        raise ConfigError(f"the logits have no gradient to the {method.gradients}, as {method.name} needs; {advice}")


@torch.no_grad()
def check_before(method: Any, model: Normalized, batches: Batched, session: Session) -> tuple[float, int]:
    """Say the share of clean images, not augmented, that `model` classifies correctly, and warn of what stands out.

    Returns that share and the number of images. Raises TrainingError for weights that are not finite, DataError for
    labels of no class, ConfigError for logits that have no gradient where `method` needs one.
    """
    check_weights(model)
    answers, labels, classes = list[Tensor](), list[Tensor](), 0
    for x, y, *_ in unaugmented(batches):
        logits = logits_of(model, x)
        if not labels and method.gradients != "none":
            _check_gradients(method, model, x[:8])
        classes = logits.shape[1]
        check_labels(y, classes)
        answers.append(logits.argmax(1))
        labels.append(y.clone())  # a loader may fill the same tensor again
    every = torch.cat(labels)  # there is at least one
    right, total, kind = int((torch.cat(answers) == every).sum()), len(every), method.data_use.replace("none", "clean")
    session.say(f"the network classifies {right:,} of {total:,} {kind} images correctly ({100 * right / total:.1f} %)")
    counts, runs = every.bincount(minlength=classes), 1 + int((every.diff() != 0).sum())
    present = int(counts.count_nonzero())
    looks = method.data_use != "none"
    if looks and 1 < present and runs <= present and len(batches) > 1 and total >= max(SHUFFLED, 2 * present):
        session.say("warning: the loader gives the images class by class; give one that shuffles, as methods expect")
    if wrong := misuse(right, total, classes):
        session.say(f"warning: {wrong}")
    if looks and not session.data_checked:
        for note in check_counts(counts, method.data_use):
            session.say(f"note: {note}")
    return right / total, total


@torch.no_grad()
def check_after(method: Any, model: nn.Module, batches: Batched, before: float, session: Session) -> None:
    """TrainingError if a weight is not finite. Warns if many clean images that were classified correctly `before` no
    longer are, as after a jump of the loss in the last rounds: the one harm that a defender sees."""
    check_weights(model.eval())
    if method.data_use == "poisoned":  # without its backdoor a network errs on the attacker's images
        return
    flags = torch.cat([model(x).argmax(1) == y for x, y, *_ in unaugmented(batches)])
    after = float(flags.double().mean())
    if before - after > HARM:
        now = f"warning: the network classifies {100 * after:.0f} % of the clean images correctly"
        advice = "a smaller --lr, fewer --epochs or other settings"
        session.say(f"{now}, before it was {100 * before:.0f} %, so it is harmed; try {advice}")


def misuse(right: int, total: int, classes: int) -> str | None:
    """What to warn of where `right` of `total` clean images are classified correctly; None where there is nothing.

    An attacked network has nearly its full accuracy, so one with little is not used as it was trained.
    """
    if right >= total * (1 + 1 / classes) / 2:  # half way from chance to all; ImageNet has been at 60 % for long
        return None
    return (
        f"the network classifies only {right:,} of {total:,} clean images correctly; usual causes are mean and std, "
        "the order of the channels, the size of the images or the numbering of the classes other than in its training"
    )
