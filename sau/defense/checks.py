"""What `purify` checks of the network and of the clean images before and after a defense runs.

An attacked network has nearly its full accuracy. So where it classifies few clean images correctly, it is not used as
it was trained: without its normalisation, with the channels or the classes in another order.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau.data.images import check_counts
from sau.defense.inputs import unaugmented
from sau.defense.verdict import follows_images
from sau.errors import ConfigError, TrainingError
from sau.loop import Session
from sau.models import Normalized, check_labels, check_logits, is_finite, logits_of
from sau.optim import Training
from sau.types import Batched, Labels
from sau.util import generator

ENOUGH = 0.95  # of the clean images: no other way to use the network can be clearly better
HARM = 0.1  # of the clean images
SHUFFLED = 20  # images that chance does not sort by class


@torch.no_grad()
def check_before(method: Any, model: Normalized, batches: Batched, session: Session) -> float:
    """Says and returns the share of clean images, not augmented, that `model` classifies correctly, and warns of what
    stands out in the network, the loader and the images.

    Raises TrainingError for weights that are not finite, DataError for labels of no class, ConfigError for logits that
    have no gradient where `method` needs one.
    """
    check_weights(model)
    plain, _ = unaugmented(batches)
    answers, labels, classes, warn = list[Tensor](), list[Tensor](), 0, list[str]()
    for x, y, *_ in plain:
        logits = logits_of(model, x)
        if not labels:
            _check_gradients(method, model, x[:8])
        classes = logits.shape[1]
        check_labels(y, classes)
        answers.append(logits.argmax(1))
        labels.append(y.clone())  # a loader may fill the same tensor again
    every, answer = torch.cat(labels), torch.cat(answers)  # there is at least one
    right, total, looks = int((answer == every).sum()), len(every), method.data_use != "none"
    session.say(f"the network classifies {_counted(right, total, method.data_use)}")
    if method.gradients != "none" and len(labels) < len(batches):
        warn.append(f"the loader gives {len(labels)} batches, but says {len(batches)}, by which rates fall")
    if mixed := sum(isinstance(layer, _BatchNorm) and layer.running_var is None for layer in model.modules()):
        warn.append(f"{mixed} batch norms keep no running statistics, so predictions depend on the rest of the batch")
    counts, runs = every.bincount(minlength=classes), 1 + int((every.diff() != 0).sum())
    present = int(counts.count_nonzero())
    if looks and 1 < present and runs <= present and len(batches) > 1 and total >= max(SHUFFLED, 2 * present):
        warn.append("the loader gives the images class by class; give one that shuffles, as methods expect")
    if wrong := misuse(model, plain, every, answer, classes):
        warn.append(wrong)
    for text in warn:
        session.say(f"warning: {text}")
    if looks and not session.data_checked:
        for note in check_counts(counts, method.data_use):
            session.say(f"note: {note}")
    return right / total


def check_weights(model: nn.Module) -> None:
    """TrainingError if a weight, or a buffer that is saved, is not finite."""
    kept = model.state_dict()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in kept and not is_finite(tensor):
            raise TrainingError(f"{name} of the network holds NaN or infinity")


def _check_gradients(method: Any, model: nn.Module, x: Tensor) -> None:
    """ConfigError if the logits are probabilities, or do not follow the weights or images that `method` moves."""
    before = [parameter.clone() for parameter in model.parameters()]
    z = model(x)
    for parameter in model.parameters():
        parameter.mul_(1.01).add_(0.01)
    same = torch.equal(model(x), z)
    for parameter, kept in zip(model.parameters(), before, strict=True):
        parameter.copy_(kept)
    if same and z.isfinite().all() and z.any():  # a dead network has the logits 0, whatever its weights
        raise ConfigError(
            "the logits do not depend on the weights of the network; if a function was set as its forward, define "
            "forward in a class instead, or copies go on using the first one's weights"
        )
    if method.gradients == "none":
        return
    with torch.enable_grad():
        z = model(x)
    check_logits(z)
    what = "" if z.requires_grad else "weights"
    if not what and method.gradients == "images" and not follows_images(model, x):
        what = "images"
    if what:
        advice = "take no_grad, detach or numpy out of its forward, or try clp, bnp or ep"
        raise ConfigError(f"the logits have no gradient to the {what}, as {method.name} needs; {advice}")


@torch.no_grad()
def check_after(method: Any, model: nn.Module, batches: Batched, before: float, session: Session) -> None:
    """TrainingError if a weight is not finite. Warns if many clean images that were classified correctly `before` no
    longer are, as after a jump of the loss in the last rounds: the one harm that a defender sees."""
    check_weights(model.eval())
    if method.data_use == "poisoned":  # without its backdoor a network errs on the attacker's images
        return
    right = total = 0
    for x, y, *_ in unaugmented(batches)[0]:
        right, total = right + int((model(x).argmax(1) == y).sum()), total + len(y)
    after = right / total
    if before - after > HARM:
        advice = "a smaller --lr or fewer --epochs" if isinstance(method, Training) else "other settings"
        if getattr(method, "lr_scheduler", "") in (None, "constant"):
            advice = f"--lr_scheduler CosineAnnealingLR, {advice}"
        now = f"warning: the network classifies {100 * after:.0f} % of the clean images correctly"
        session.say(f"{now}, before it was {100 * before:.0f} %, so it is harmed; try {advice}")


def misuse(model: Normalized, batches: Batched, labels: Labels, answers: Labels, classes: int) -> str | None:
    """What to warn of where `model`, in eval mode, classifies few images correctly; None where there is nothing.

    Args:
        model: pixels in [0, 1] -> logits.
        batches: the clean images, not augmented.
        labels: of all of them [N], in any order.
        answers: the classes [N] that the network gave to them, in the same order.
        classes: of the network.
    """
    right, total = int((labels == answers).sum()), len(labels)
    if right >= ENOUGH * total:
        return None
    hits = _other_inputs(model, batches) | _other_numbering(labels.cpu(), answers.cpu(), classes)
    best = max(hits, key=hits.__getitem__)
    if _clearly(hits[best], right, total):
        how, advice = best
        return f"{how} the network classifies {_counted(hits[best], total)}, as it is used {right:,}; {advice}"
    if right < total * (1 + 1 / classes) / 2:  # half way from chance to all; ImageNet has been at 60 % for long
        return (
            f"the network classifies only {_counted(right, total)}; usual causes are mean and std, the order of the "
            "channels, the size of the images or the numbering of the classes other than in its training"
        )
    return None


def _counted(right: int, total: int, kind: str = "clean") -> str:
    kind = kind.replace("none", "clean")
    return f"{right:,} of {total:,} {kind} images correctly ({100 * right / total:.1f} %)"


def _clearly(more: int, right: int, total: int) -> bool:
    """Whether `more` of `total` images are more than `right` of them by 5 % and what chance may add."""
    return more - right > total / 20 + 2 * sqrt(total)


@torch.no_grad()
def _other_inputs(model: Normalized, batches: Batched) -> dict[tuple[str, str], int]:
    """How many images are correct if they reach the network otherwise, by (how, what to do then)."""
    ways: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
        ("with the channels in reverse order", "was it trained on BGR images?"): lambda x: x.flip(1),
        (
            "with pixels 255 times as large",
            "does it expect pixels from 0 to 255, or were they divided by 255 twice?",
        ): lambda x: 255 * x,
    }
    if model.mean is None or model.std is None:
        advice = "does it expect other images than in [0, 1]? Give Normalized(model, mean, std), or --mean and --std"
        ways["with images normalised by their own mean and std", advice] = _standardised
    else:
        mean, std = model.mean, model.std
        advice = "does it expect images in [0, 1]? Give these, and leave mean and std out"
        ways["without mean and std", advice] = lambda x: x * std + mean  # `model` undoes that
    hits = dict.fromkeys(ways, 0)
    for x, y, *_ in batches:
        for way, change in ways.items():
            hits[way] += int((logits_of(model, change(x)).argmax(1) == y).sum())
    return hits


def _standardised(x: Tensor) -> Tensor:
    std, mean = torch.std_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / std.clamp_min(1 / 255)


def _other_numbering(labels: Labels, answers: Labels, classes: int) -> dict[tuple[str, str], int]:
    """How many images are correct if the classes are numbered in the order that suits the answers, if there is one.

    It is found on one half of the images and judged on the other, for of few images in many classes some order always
    suits most.
    """
    mixed = torch.randperm(len(labels), generator=generator(0))
    half, rest = mixed[::2], mixed[1::2]
    order = torch.arange(classes)
    pairs, counts = (labels[half] * classes + answers[half]).unique(return_counts=True)
    to = dict[int, int]()
    for pair in pairs[counts.argsort(descending=True)].tolist():
        label, answer = divmod(pair, classes)
        if label not in to and answer not in to.values():
            order[label] = to[label] = answer
    right, hits = (int((given[rest] == answers[rest]).sum()) for given in (labels, order[labels]))
    if 2 * hits < len(rest) or not _clearly(hits, right, len(rest)):
        return {}
    label = next(label for label in labels.tolist() if order[label] != label)
    advice = f"label {label} is class {int(order[label])} of the network: number the classes as in its training"
    if classes > 10:
        advice += " (were their names sorted as text, 1, 10, 2?)"
    return {("with the classes in another order", advice): int((order[labels] == answers).sum())}
