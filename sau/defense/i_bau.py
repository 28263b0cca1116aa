"""i-BAU, Implicit Backdoor Adversarial Unlearning (Zeng et al., "Adversarial Unlearning of Backdoors via Implicit
Hypergradient", ICLR 2022), as the benchmark runs it.

One perturbation d for all images, and weights w that answer it:

    min_w  l_out(d*(w), w)                    l_out = CE(h(x + P d), y), P adds d to a few images of the batch
    d*(w) = argmin_d  l_in(d, w)              l_in  = -CE(h(x + d), y) + l2 * |d|^2,  y = argmax h(x) in the search

d* moves with w. It is the fixed point of F(d, w) = d - r * grad_d l_in(d, w), so by the implicit function theorem

    d l_out / d w  =  g_w + (dF/dw)^T v,      v = (dF/dd)^T v + g_d,      g = partial derivatives of l_out

and K rounds of the equation for v, from v = 0, come close to its solution.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sau.config import param
from sau.data.batches import first_batch, to_device_async
from sau.defense.base import TrainingDefense
from sau.loop import RunContext
from sau.models.normalized import full_precision
from sau.optim import Optimizer, Schedule
from sau.types import Batched, Labels, Pixels, Scalar

Labelled = tuple[Tensor, Tensor]  # images [B, C, H, W] and labels [B]
SETTLED = 1e-10  # v is taken for solved once a step changes it by less, in its 2-norm


class IBAU(TrainingDefense):
    """Unlearn one perturbation of all images, by implicit gradients.

    A round is one pass of steps on the perturbation, from zero, then one update of the weights for each batch. The
    images, their order and their augmentation are drawn once for all rounds.
    """

    name = "i-bau"
    unread = ("lr_scheduler", "amp")
    gradients = "images"
    few_suffice = True

    epochs: int = param(5, "rounds (n_rounds)", aliases=("n_rounds",))
    lr: float = 1e-4
    lr_scheduler: Schedule | None = "constant"
    client_optimizer: Optimizer = "adam"
    wd: float = 0.0
    augment: bool = True
    K: int = param(5, "steps of the fixed-point iteration for v", ge=1)
    portion: float = param(0.01, "share of a batch that P takes; at least one image unless it is 0", ge=0, le=1)
    inner_lr: float = param(10.0, "learning rate of the perturbation", gt=0)
    fixed_point_lr: float = param(0.1, "rate r of the fixed-point map", gt=0)
    l2_weight: float = param(0.001, "weight of the perturbation's squared length in the inner problem", ge=0)
    space: Literal["normalised", "pixel"] = param(
        "normalised", "what the perturbation is added to: the normalised images, as in the benchmark, or the pixels"
    )

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        super().run(model, [(x, y) for x, y, *_ in batches], session)

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        """With `delta`, the perturbation [1, C, H, W] of the round, and `done`, how many batches of all rounds are."""
        delta, done = torch.zeros_like(first_batch(batches)[0][:1]), torch.zeros((), dtype=torch.int64)
        kept = nn.ParameterDict({"delta": nn.Parameter(delta, False), "done": nn.Parameter(done, False)})
        return {**super().prepare(model, batches), "model": model.eval(), "_batches": batches, "universal": kept}

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """One update; at the beginning of a round the perturbation is found first."""
        model, batches = state["model"], state["_batches"]
        delta, done = state["universal"]["delta"], state["universal"]["done"]
        turn, place = divmod(int(done), len(batches))
        with full_precision(model), sdpa_kernel(SDPBackend.MATH):  # the attention that can be differentiated twice
            if place == 0:
                delta.copy_(self.inner_pass(model, batches))
            carriers = to_device_async(self.carriers(len(x), turn), x.device)
            surrogate, outer, inner = self.losses(model, (x, y), batches[0], delta, carriers)
            state["descent"](surrogate)
        done += 1
        return {"loss": outer, "inner_loss": inner, "delta": delta.norm()}

    def carriers(self, size: int, turn: int) -> Tensor:
        """Which images of a batch carry the perturbation in a round: they take turns, in the order of the batch."""
        count = max(1, int(self.portion * size)) if self.portion else 0
        return (turn * count + torch.arange(count)) % size

    def inner_loss(self, model: nn.Module, x: Pixels, y: Labels, delta: Tensor) -> Scalar:
        """l_in on one batch."""
        return self.l2_weight * delta.square().sum() - F.cross_entropy(model(x + self.in_pixels(model, delta)), y)

    def in_pixels(self, model: nn.Module, delta: Tensor) -> Tensor:
        """The perturbation as it is added to pixels in [0, 1]."""
        std = getattr(model, "std", None) if self.space == "normalised" else None
        return delta if std is None else delta * std

    def inner_pass(self, model: nn.Module, batches: Sequence[Labelled]) -> Tensor:
        """One pass of plain descent on l_in, from zero, with the network's own predictions as labels."""
        delta = torch.zeros_like(batches[0][0][:1])
        for x, _ in batches:
            with torch.no_grad():
                predictions = model(x).argmax(1)
            d = delta.requires_grad_()
            (slope,) = torch.autograd.grad(self.inner_loss(model, x, predictions, d), d)  # no weight gradients
            delta = d.detach() - self.inner_lr * slope
        return delta

    def losses(
        self, model: nn.Module, batch: Labelled, first: Labelled, delta: Tensor, carriers: Tensor
    ) -> tuple[Scalar, Scalar, Scalar]:
        """(surrogate, l_out, l_in); the hypergradient is the gradient of the surrogate with respect to the weights.

        `batch` is that of l_out, of which the `carriers` carry `delta`, and `first` that of l_in. `model` is in eval
        mode, so that its logits of an image do not depend on the others.
        """
        (x, y), d = batch, delta.detach().clone().requires_grad_()
        inner = self.inner_loss(model, *first, d)
        (slope,) = torch.autograd.grad(inner, d, create_graph=True)
        # Only the carriers' terms depend on the perturbation: an image or two, not the whole batch.
        carried = F.cross_entropy(model(x[carriers] + self.in_pixels(model, d)), y[carriers], reduction="sum")
        (g,) = torch.autograd.grad(carried / len(x), d)
        v = g  # after the first of K rounds of v <- (dF/dd)^T v + g from 0, where F = d - r * slope
        for _ in range(self.K - 1):
            (curved,) = torch.autograd.grad(slope, d, v, retain_graph=True)  # the Hessian of l_in times v
            before, v = v, v - self.fixed_point_lr * curved + g
            if float((v - before).norm()) < SETTLED:
                break
        stamped = x.index_add(0, carriers, self.in_pixels(model, delta).expand(len(carriers), *x.shape[1:]))
        outer = F.cross_entropy(model(stamped), y)
        return outer - self.fixed_point_lr * (v * slope).sum(), outer, inner
