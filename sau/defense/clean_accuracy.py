"""How many of the clean images a network classifies correctly and, where they are few, what would make them many.

An attacked network has nearly its full accuracy, so few correct images mean that it is used otherwise than it was
trained: without its normalisation, with the channels or the classes in another order.
"""

from collections.abc import Callable
from math import sqrt

import torch
from torch import Tensor

from sau.models import Normalized, logits_of
from sau.seeds import generator
from sau.types import Batched, Labels

ENOUGH = 0.95  # of the clean images: no other way to use the network can be clearly better


def counted(right: int, total: int, kind: str = "clean") -> str:
    """For the screen; `kind` is that of the images."""
    return f"{right:,} of {total:,} {kind} images correctly ({100 * right / total:.1f} %)"


@torch.no_grad()
def misuse(model: Normalized, batches: Batched, labels: Labels, answers: Labels, classes: int) -> str | None:
    """What to warn of where `model`, in eval mode, classifies few images correctly; None where there is nothing.

    Args:
        model: pixels in [0, 1] -> logits.
        batches: the clean images as they are.
        labels: of all of them [N], in any order.
        answers: the classes [N] that the network gave to them, in the same order.
        classes: of the network.
    """
    right, total = int((labels == answers).sum()), len(labels)
    if right >= ENOUGH * total:
        return None
    hits = _otherwise(model, batches)
    if renumbered := _renumbered(labels.cpu(), answers.cpu(), classes):
        hits |= renumbered
    best = max(hits, key=hits.__getitem__)
    if _clearly(hits[best], right, total):
        how, advice = best
        return f"{how} the network classifies {counted(hits[best], total)}, as it is used {right:,}; {advice}"
    if right < total * (1 + 1 / classes) / 2:  # half way from chance to all; ImageNet has been at 60 % for long
        return (
            f"the network classifies only {counted(right, total)}; usual causes are mean and std, the order of the "
            "channels, the size of the images or the numbering of the classes other than in its training"
        )
    return None


def _clearly(more: int, right: int, total: int) -> bool:
    """Whether `more` of `total` images are more than `right` of them by 5 % and what chance may add."""
    return more - right > total / 20 + 2 * sqrt(total)


def _otherwise(model: Normalized, batches: Batched) -> dict[tuple[str, str], int]:
    """How many images are right if they reach the network otherwise, by (how, what to do then)."""
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


def _renumbered(labels: Labels, answers: Labels, classes: int) -> dict[tuple[str, str], int]:
    """How many images are right if the classes are numbered in the order that suits the answers, if there is one.

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
