"""FT, plain fine-tuning, and FT-SAM (Zhu, Wei, Shen, Fan, Wu, ICCV 2023), by adaptive sharpness-aware minimisation.

    min_w  max_{e in N(w)}  L(w + e),      N(w) = { e : | e / |w| |_2 <= rho },

where L is the cross-entropy with smoothed labels on the clean images. With g = grad L(w), the maximum of the
linearised loss (Kwon et al., ASAM, 2021) is taken at

    e = rho * w^2 g / (| |w| g |_2 + 1e-12)        products entry by entry, one norm over all weights,

so that large weights, which the backdoor's neurons tend to have, are shaken most. The weights then move from w along
g_e = grad L(w + e). Optionally they also climb alpha times the part of g that is orthogonal to g_e (Zhuang et al.,
GSAM, 2022), which narrows the gap between the two losses.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import get_total_norm

from sau.config import param
from sau.defense.base import TrainingDefense
from sau.evaluate import batch_accuracy
from sau.optim import Descent
from sau.types import Labels, Logits, Pixels, Scalar

TINY = 1e-12  # keeps a norm of 0 from dividing


def smoothed_loss(z: Logits, y: Labels, share: float) -> Scalar:
    """Mean cross-entropy against 1 - share for the label, with `share` spread evenly over the other classes."""
    classes = z.shape[1]
    # torch spreads over all classes, the label's own included; this much of it leaves the label exactly 1 - share.
    return F.cross_entropy(z, y, label_smoothing=share * classes / max(1, classes - 1))


@contextmanager
def perturbed(model: nn.Module, weights: Sequence[Tensor], e: Sequence[Tensor]) -> Iterator[None]:
    """Inside, the weights are w + e, and batch norms in train mode leave their running statistics as they are;
    afterwards the weights are the same bits as before."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = [weight.detach().clone() for weight in weights]
    try:
        for weight, change in zip(weights, e, strict=True):
            weight.data.add_(change)
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for weight, before in zip(weights, kept, strict=True):
            weight.data.copy_(before)  # subtracting e again would leave rounding behind


class FT(TrainingDefense):
    """Minimise CE(h(x), y) over all weights, batch norm in train mode; the first control of every comparison."""

    name = "ft"
    compiles = True

    augment: bool = True


class FTSAM(TrainingDefense):
    """Fine-tune where the clean loss is flat, batch norm in train mode."""

    name = "ft-sam"
    graph_safe = True
    ignored = {
        "rho_min": "rho stays as it is",
        "print_freq": "every round is said",
        "checkpoint_path": "the checkpoint lies in the record",
        "bd_yaml_path": "the record knows the attack; settings stand in --yaml_path",
    }

    augment: bool = True
    rho: float = param(2.0, "radius of |e / |w||_2 where adaptive, else of |e|_2", ge=0, aliases=("rho_max",))
    adaptive: bool = param(True, "measure e relative to the size of each weight (ASAM); otherwise absolutely (SAM)")
    alpha: float = param(0.0, "step along the part of g that is orthogonal to g_e", ge=0)
    label_smoothing: float = param(0.1, "share of the label that the other classes get", ge=0, le=0.5)

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        model = state["model"]
        logits = model(x)
        loss = smoothed_loss(logits, y, self.label_smoothing)
        worst = self.update(model, state["descent"], loss, lambda: smoothed_loss(model(x), y, self.label_smoothing))
        return {"loss": loss, "worst_loss": worst, "clean_acc": batch_accuracy(logits, y)}

    def update(self, model: nn.Module, descent: Descent, loss: Scalar, again: Callable[[], Scalar]) -> Scalar:
        """Move the weights along the gradient of L at w + e, from `loss`, L at w; `again` computes L anew. L(w + e)."""
        weights = descent.parameters
        here = torch.autograd.grad(loss, weights, materialize_grads=True)
        with perturbed(model, weights, self.perturbation(weights, here)):
            worst = again()
            there = torch.autograd.grad(worst, weights, materialize_grads=True)
        descent.follow(self.direction(here, there) if self.alpha else there)
        return worst

    @torch.no_grad()
    def perturbation(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
        """e, from the weights and the gradients at them, in the shapes of the weights."""
        sizes = [weight.abs() if self.adaptive else torch.ones_like(weight) for weight in weights]
        scaled = [size * gradient for size, gradient in zip(sizes, gradients, strict=True)]
        factor = self.rho / (get_total_norm(scaled) + TINY)
        return [size * part * factor for size, part in zip(sizes, scaled, strict=True)]

    @torch.no_grad()
    def direction(self, here: Sequence[Tensor], there: Sequence[Tensor]) -> list[Tensor]:
        """g_e - alpha * (g - (<g, g_e> / |g_e|^2) g_e)."""
        along = sum((g * ge).sum() for g, ge in zip(here, there, strict=True)) / (get_total_norm(there) ** 2 + TINY)
        return [ge - self.alpha * (g - along * ge) for g, ge in zip(here, there, strict=True)]
