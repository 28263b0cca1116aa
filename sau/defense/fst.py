"""FST, Feature Shift Tuning (Min, Qin, Shen, Cheng, NeurIPS 2023): a classifier that turns away from the backdoored one
takes the features with it.

    min  CE(f(x), y) + alpha * <W, W0>      subject to |W| = |W0|,

where W is the weight of the classifier, drawn anew at the start, W0 the backdoored one, and all weights of the network
are trained. On the sphere <W, W0> = |W0|^2 - |W - W0|^2 / 2, so this maximises the squared distance; with a the angle
between W and W0, the pull along the sphere is alpha |W0| sin(a).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import first_batch
from sau.defense.base import TrainingDefense
from sau.evaluate import batch_accuracy
from sau.models.normalized import classifier
from sau.types import Batched, Labels, Pixels, Scalar


class FixedNormWeight:
    """A weight tensor W, where it was (W0), and the sphere |W| = |W0| that it is projected onto."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.origin = weight, weight.detach().clone()  # W0 is the attacker's, also when resumed
        self.radius = torch.linalg.vector_norm(self.origin)

    def distance(self) -> Scalar:
        """|W - W0|, with the gradient 0 at W0."""
        return torch.linalg.vector_norm(self.weight - self.origin)

    def overlap(self) -> Scalar:
        """<W, W0>."""
        return (self.weight * self.origin).sum()

    @torch.no_grad()
    def project(self) -> None:
        """W <- W |W0| / |W|; a W of zeros stays."""
        self.weight.mul_(self.radius / torch.linalg.vector_norm(self.weight).clamp_min(1e-12))


def uniform(like: Tensor, bound: float) -> Tensor:
    """Values from U(-bound, bound) in the shape of a tensor; the same ones whatever device it is on."""
    return torch.empty(like.shape).uniform_(-bound, bound).to(like)


class FST(TrainingDefense):
    """Fine-tune from a new classifier that is kept turned away from the backdoored one."""

    name = "fst"
    watched = "clean_loss"
    graph_safe = True
    compiles = True

    epochs: int = 10
    batch_size: int = 128
    wd: float = 0.0
    augment: bool = True
    alpha: float = param(0.2, "weight of <W, W0>; with 0 the classifier is only drawn anew", ge=0)
    reset_bias: bool = param(True, "draw the classifier's bias anew too")

    @torch.no_grad()
    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        """Weight and bias from U(-1, 1) / sqrt(inputs), as new linear layers have them; `step` puts |W| right."""
        last = classifier(model, first_batch(batches)[0][:1], self.name)
        sphere, bound = FixedNormWeight(last.weight), 1 / math.sqrt(last.in_features)
        last.weight.copy_(uniform(last.weight, bound))
        if self.reset_bias and last.bias is not None:
            last.bias.copy_(uniform(last.bias, bound))
        return {**super().prepare(model, batches), "sphere": sphere}

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        sphere, logits = state["sphere"], state["model"](x)
        clean, overlap = F.cross_entropy(logits, y), sphere.overlap()
        loss = clean + self.alpha * overlap
        state["descent"](loss)
        sphere.project()
        return {"loss": loss, "clean_loss": clean, "overlap": overlap, "clean_acc": batch_accuracy(logits, y)}
