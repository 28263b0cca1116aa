"""Re-activation by questions alone: the Square attack (Andriushchenko et al., ECCV 2020) with one perturbation for all
pictures. The attacker sees logits, not gradients, and pays for every picture that the network answers.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from sau.audit.reactivate import shifted
from sau.data.images import Images
from sau.seeds import generator
from sau.types import Universal

FIRST = 0.1  # share of the picture that the first squares cover
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # trials of 10,000 after which squares are half as large


def square(
    model: nn.Module, pictures: Images, eps: float, marks: Sequence[int], *, seed: int = 0
) -> Iterator[tuple[int, Universal]]:
    """(pictures scored so far, the best D so far [1, C, H, W]) each time that `marks` of them are reached.

    D begins as vertical stripes of -eps and +eps; each trial sets a square of it to -eps or +eps, channel by channel,
    scores all `pictures`, and keeps the change if their summed cross-entropy to their labels falls.

    Args:
        model: frozen, in eval mode.
        pictures: what D is judged by; their labels are where it shall lead.
        eps: radius of the ball in [0, 1] pixels.
        marks: numbers of scored pictures, rising; the last one is the attacker's budget.
        seed: of all draws.
    """
    draw, (channels, height, width) = generator(seed), pictures.pixels.shape[1:]
    place, trials, spent, left = pictures.pixels.device, max(1, marks[-1] // len(pictures)), 0, list(marks)
    best = (eps * _signs((1, channels, 1, width), draw)).expand(-1, -1, height, -1).clone()
    lowest = math.inf
    for trial in range(trials):
        tried = best.clone()
        if trial:  # the first one scores the stripes
            side = _side(trial / trials, height, width)
            top, left_edge = (int(torch.randint(n - side + 1, (), generator=draw)) for n in (height, width))
            tried[:, :, top : top + side, left_edge : left_edge + side] = eps * _signs((1, channels, 1, 1), draw)
        loss, spent = _loss(model, pictures, tried.to(place)), spent + len(pictures)
        if loss < lowest:
            lowest, best = loss, tried
        reached = len(left) if trial == trials - 1 else sum(mark <= spent for mark in left)
        if reached:  # several marks within one trial are one measurement
            del left[:reached]
            yield spent, best.to(place)


def _side(done: float, height: int, width: int) -> int:
    """Of the squares when this share of the budget is spent."""
    share = FIRST / 2 ** sum(done > trial / 10_000 for trial in HALVED)
    return min(height, width, max(1, round(math.sqrt(share * height * width))))


def _signs(shape: tuple[int, ...], draw: torch.Generator) -> Universal:
    return 2.0 * torch.randint(2, shape, generator=draw) - 1


@torch.no_grad()
def _loss(model: nn.Module, pictures: Images, delta: Universal) -> float:
    return float(F.cross_entropy(model(shifted(pictures, delta)), pictures.labels, reduction="sum"))
