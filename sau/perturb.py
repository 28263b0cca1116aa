"""The set of perturbations around a picture: where a search starts in it and how it stays inside."""

from typing import Literal

import torch

from sau.types import PerImage, Pixels

Norm = Literal["L_inf", "L1", "L2", "Reg"]
Init = Literal["zero", "random", "max", "min"]


def start(x: Pixels, init: Init, norm: Norm, eps: float) -> Pixels:
    """A first perturbation for every picture: 0, +eps or -eps everywhere, or uniform in [-eps, eps], then projected.

    The released code draws `random` from [0, 1) before projecting, which puts most entries at +eps; this one does not.
    """
    match init:
        case "zero":
            delta = torch.zeros_like(x)
        case "random":
            delta = torch.empty_like(x).uniform_(-eps, eps)
        case "max":
            delta = torch.full_like(x, eps)
        case "min":
            delta = torch.full_like(x, -eps)
    return project(delta, norm, eps)


def project(delta: Pixels, norm: Norm, eps: float) -> Pixels:
    """Bring every picture's perturbation back into the ball of radius `eps` around 0.

    L_inf clips entries; L1 and L2 shrink the whole perturbation to the radius where it is longer; Reg leaves it free.
    """
    if norm == "L_inf":
        return delta.clamp(-eps, eps)
    if norm == "Reg":
        return delta
    return delta * (eps / length(delta, norm).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)


def length(delta: Pixels, norm: Literal["L_inf", "L1", "L2"]) -> PerImage:
    """The norm of every picture's perturbation."""
    order = {"L_inf": torch.inf, "L1": 1, "L2": 2}[norm]
    return torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1)


def into_pixels(x: Pixels, delta: Pixels) -> Pixels:
    """The perturbation cut so that x + delta lies in [0, 1]."""
    return (x + delta).clamp(0, 1) - x
