"""Weights that are driven away from where the attacker left them, on the sphere of their first length."""

import torch
from torch import Tensor

from sau.types import Scalar


class FixedNormWeight:
    """One weight tensor W, where it was (W0), and the sphere |W| = |W0| that it is projected onto.

    Args:
        weight: W, still at W0.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.origin = weight, weight.detach().clone()
        self.radius = torch.linalg.vector_norm(self.origin)

    def distance(self) -> Scalar:
        """|W - W0|, with the gradient 0 at W0."""
        return torch.linalg.vector_norm(self.weight - self.origin)

    def overlap(self) -> Scalar:
        """<W, W0>; on the sphere it is |W0|^2 - |W - W0|^2 / 2."""
        return (self.weight * self.origin).sum()

    @torch.no_grad()
    def project(self) -> None:
        """W <- W |W0| / |W|; a W of zeros stays."""
        self.weight.mul_(self.radius / torch.linalg.vector_norm(self.weight).clamp_min(1e-12))


def uniform(like: Tensor, bound: float) -> Tensor:
    """Values from U(-bound, bound) in the shape of a tensor; the same ones whatever device it is on."""
    return torch.empty(like.shape).uniform_(-bound, bound).to(like)
