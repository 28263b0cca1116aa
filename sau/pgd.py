"""Projected gradient ascent (PGD) inside the set S of perturbations of an image."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from sau.config import check, param
from sau.errors import require
from sau.types import Change, Flags, PerImage, Pixels

Norm = Literal["L_inf", "L1", "L2", "Reg"]
Bounded = Literal["L_inf", "L2", "L1"]  # those that have a ball
Init = Literal["zero", "random", "max", "min", "shift"]
INIT_HELP = "first e: zero, max (+eps everywhere), min (-eps), random (uniform) or shift (uniform, one value an image)"
BUCKET = 32
SPARSE = 0.01  # share of the values that a step in the L1 norm moves (Tramer and Boneh 2019)
RADII = "above 0 and, in L_inf, below 1, for pixels are in [0, 1]: 8 / 255, not 8"


@dataclass(frozen=True, kw_only=True)
class Ball:
    """S = {e : |e| <= eps}, `eps` in [0, 1] pixels; `clip` keeps x + e in [0, 1], and the norm Reg has no ball."""

    norm: Norm
    eps: float
    clip: bool = False

    def start(self, x: Pixels, init: Init) -> Change:
        """A first e for every image (INIT_HELP; uniform is in [-eps, eps]), projected into S. (The released code of SAU
        draws `random` from [0, 1) before projecting, which puts most values at +eps.)"""
        if init in ("random", "shift"):
            values = x if init == "random" else x[:, :1, :1, :1]
            return self.into(x, torch.empty_like(values).uniform_(-self.eps, self.eps).expand_as(x).contiguous())
        return self.into(x, torch.full_like(x, {"zero": 0.0, "max": self.eps, "min": -self.eps}[init]))

    def into(self, x: Pixels, e: Change) -> Change:
        """e projected into S. What `clip` cuts moves values towards 0, so it stays in the ball."""
        e = project(e, self.norm, self.eps)
        return (x + e).clamp(0, 1) - x if self.clip else e

    def contains(self, e: Change) -> Flags:
        """Which of the e lie in the ball, up to rounding."""
        lost = 2**-23 * length(torch.ones_like(e[:1]), self.norm)  # what float32 may lose of every value of g - x
        return length(e, self.norm) <= self.eps * (1 + 1e-6) + lost


@dataclass(frozen=True, kw_only=True)
class Search:
    """How the risks are searched for (`sau.risk`): steepest ascent in S, with x + e in [0, 1]."""

    norm: Bounded = param("L_inf", "norm of the ball")
    eps: float = param(0.2, "radius of the ball, in [0, 1] pixels; in L_inf below 1")
    steps: int = param(20, "steps of each search", ge=1)
    step_size: float | None = param(None, "length of a step in that norm; None means 2.5 eps / steps")
    restarts: int = param(2, "searches from random places, for each risk", ge=1)

    def __post_init__(self) -> None:
        check(self, " of the risks' search")
        for name in ("eps", "step_size"):
            value = getattr(self, name)
            require(f"{name} of the risks' search", value, value is None or is_radius(value, self.norm), RADII)

    @property
    def ball(self) -> Ball:
        """S."""
        return Ball(norm=self.norm, eps=self.eps, clip=True)

    def ascend(self, objective: Callable[[Change], PerImage], x: Pixels, e: Change) -> Change:
        """e after one step."""
        size = 2.5 * self.eps / self.steps if self.step_size is None else self.step_size
        return pgd(objective, x, e, self.ball, steps=1, lr=size, direction=partial(steepest, norm=self.norm))


def pgd(
    objective: Callable[[Change], PerImage | None], x: Pixels, e: Change, ball: Ball, *, steps: int, lr: float,
    direction: Callable[[Change], Change] = torch.sign,
) -> Change:  # fmt: skip
    """Projected gradient ascent from `e`: e <- ball.into(x, e + lr * direction(gradient)), `steps` times.

    Args:
        objective: e [B, C, H, W] -> what to maximise, one value an image; None ends the ascent.
        x: images [B, C, H, W] in [0, 1].
        e: where it starts.
        ball: S.
        steps: how many.
        lr: length of a step.
        direction: of a step, from the gradient.
    """
    for _ in range(steps):
        d = e.detach().requires_grad_()
        if (values := objective(d)) is None:
            break
        (gradient,) = torch.autograd.grad(values.sum(), d)  # with respect to d alone: no weight gradients
        e = ball.into(x, d.detach() + lr * direction(gradient))
    return e.detach()


def steepest(gradient: Change, norm: Bounded) -> Change:
    """The direction of length 1 in `norm` that climbs most; in L1 shared by the largest 1 % of the values."""
    if norm == "L_inf":
        return gradient.sign()
    if norm == "L2":
        return gradient / length(gradient, "L2").clamp_min(1e-30).view(-1, 1, 1, 1)
    flat = gradient.flatten(1)
    k = max(1, int(SPARSE * flat.shape[1]))
    top = flat.abs().topk(k, 1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / k).view_as(gradient)


def is_radius(eps: float, norm: Norm) -> bool:
    """Whether `eps` is a radius, or a step, as `RADII` has it: an L_inf ball of 1 and more holds every image."""
    return eps > 0 and (norm != "L_inf" or eps < 1)


def project(e: Change, norm: Norm, eps: float) -> Change:
    """Each image's perturbation, brought into the ball of radius `eps` around 0: L_inf clips values, L1 and L2 shrink
    the whole perturbation to the radius, Reg leaves it."""
    if norm == "L_inf":
        return e.clamp(-eps, eps)
    if norm == "Reg":
        return e
    return e * (eps / length(e, norm).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)


def length(e: Change, norm: Norm) -> PerImage:
    """The norm of every image's perturbation."""
    order = {"L_inf": torch.inf, "L1": 1, "L2": 2}[norm]
    return torch.linalg.vector_norm(e.flatten(1), ord=order, dim=1)


def unsettled(settled: Flags) -> Tensor:
    """Places [M] of the images that are not settled, and of as many settled ones as fill whole buckets: every new batch
    size costs the convolutions a set-up, so searches use few of them."""
    size = -(-int((~settled).sum()) // BUCKET) * BUCKET
    return settled.to(torch.uint8).argsort(stable=True)[:size]
