"""The set S of perturbations of a picture: where a search starts in it and how it stays inside."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sau.types import Change, Flags, PerImage, Pixels

Norm = Literal["L_inf", "L1", "L2", "Reg"]
Bounded = Literal["L_inf", "L2", "L1"]  # those that have a ball
Init = Literal["zero", "random", "max", "min"]
BUCKET = 32
RADII = "above 0 and, in L_inf, below 1, for pixels are in [0, 1]: 8 / 255, not 8"


@dataclass(frozen=True, kw_only=True)
class Ball:
    """S = {e : |e| <= eps}, with `clip` only those e with x + e in [0, 1].

    Args:
        norm: L_inf, L1 or L2; Reg means no ball.
        eps: its radius, in [0, 1] pixels.
        clip: whether x + e stays a picture.
    """

    norm: Norm
    eps: float
    clip: bool = False

    def start(self, x: Pixels, init: Init) -> Change:
        """A first e for every picture: 0, +eps or -eps everywhere, or uniform in [-eps, eps], then brought into S.

        The released code draws `random` from [0, 1) before projecting, which puts most entries at +eps; this one does
        not.
        """
        match init:
            case "zero":
                e = torch.zeros_like(x)
            case "random":
                e = torch.empty_like(x).uniform_(-self.eps, self.eps)
            case "max":
                e = torch.full_like(x, self.eps)
            case "min":
                e = torch.full_like(x, -self.eps)
        return self.into(x, e)

    def into(self, x: Pixels, e: Change) -> Change:
        """e brought back into S. What `clip` cuts moves values towards 0, so it stays in the ball."""
        e = project(e, self.norm, self.eps)
        return (x + e).clamp(0, 1) - x if self.clip else e

    def contains(self, e: Change) -> Flags:
        """Which of the e lie in the ball, up to rounding."""
        lost = 2**-23 * length(torch.ones_like(e[:1]), self.norm)  # what float32 may lose of every value of g - x
        return length(e, self.norm) <= self.eps * (1 + 1e-6) + lost


def is_radius(eps: float, norm: Norm) -> bool:
    """Whether `eps` is a radius, or a step, as `RADII` has it: an L_inf ball of 1 and more holds every image."""
    return eps > 0 and (norm != "L_inf" or eps < 1)


def project(e: Change, norm: Norm, eps: float) -> Change:
    """Bring every picture's perturbation back into the ball of radius `eps` around 0.

    L_inf clips entries; L1 and L2 shrink the whole perturbation to the radius where it is longer; Reg leaves it free.
    """
    if norm == "L_inf":
        return e.clamp(-eps, eps)
    if norm == "Reg":
        return e
    return e * (eps / length(e, norm).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)


def length(e: Change, norm: Norm) -> PerImage:
    """The norm of every picture's perturbation."""
    order = {"L_inf": torch.inf, "L1": 1, "L2": 2}[norm]
    return torch.linalg.vector_norm(e.flatten(1), ord=order, dim=1)


def unsettled(settled: Flags) -> Tensor:
    """Places [M] of the pictures that are not settled, and of as many settled ones as fill whole buckets.

    Every new batch size costs the convolutions a set-up, so searches use few of them.
    """
    size = -(-int((~settled).sum()) // BUCKET) * BUCKET
    return settled.to(torch.uint8).argsort(stable=True)[:size]
