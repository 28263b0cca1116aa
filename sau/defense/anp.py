"""ANP, Adversarial Neuron Pruning (Wu & Wang, NeurIPS 2021).

A neuron is a channel of a batch norm. With all weights fixed, its scale w and shift b become

    scale = w * (m + xi),    shift = b * (1 + zeta),    m in [0, 1] learned from 1,    xi, zeta a perturbation

and the masks m keep the clean loss L low even under a perturbation that makes it high (paper, eq. 4 to 6):

    xi, zeta  ~  U(-eps, eps);     xi, zeta  +=  eps / steps * sign(grad L(m, xi, zeta)),    steps times
    m  -=  SGD on  alpha * L(m, 0, 0) + (1 - alpha) * L(m, xi, zeta),    then clamped to [0, 1]

A small change of a backdoor neuron sends clean images to the target class, so its mask ends low. Neurons with the
lowest masks are pruned: their scale is set to 0, their shift stays.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import Augment, to_device_async
from sau.defense.pruning import ByNorm, Clean, MaskPruning, PruningLevel, batch_norms, learn_masks, masked_logits
from sau.loop import RunContext
from sau.models.normalized import copied
from sau.optim import DESCENT, Training
from sau.types import Batched, Labels, Pixels

CHUNK = 500  # iterations between two lines of progress


class ANP(MaskPruning):
    """Learn a mask for every neuron under adversarial perturbations of all neurons; prune the lowest."""

    name = "anp"
    ignored = {
        **dict.fromkeys(DESCENT, "the masks are trained by sgd for nb_iter updates at a constant lr"),
        "print_every": f"progress is printed every {CHUNK} iterations",
    }

    batch_size: int = param(256, "images an iteration, drawn with replacement", ge=2)
    nb_iter: int = param(2000, "iterations, that is, updates of the masks", ge=1)
    lr: float = param(0.01, "learning rate of the masks; the paper's is 0.2", gt=0)
    sgd_momentum: float = param(0.9, "momentum of the masks' sgd", ge=0, lt=1)
    anp_eps: float = param(0.4, "how far scale and shift are perturbed, as a share of themselves", ge=0)
    anp_steps: int = param(1, "sign steps of the perturbation", ge=1)
    anp_alpha: float = param(0.2, "weight of the loss without perturbation; the loss under it has the rest", ge=0, le=1)
    pruning_by: Literal["threshold", "number"] = param("threshold", "what is pruned: masks up to a value, or so many")

    def __post_init__(self) -> None:
        super().__post_init__()
        fixed = self.pruning_number
        self.require("select", fixed is None or self.select == "defender", "defender where pruning_number is given")
        if self.pruning_by == "threshold":  # no mask is above 1
            self.require("pruning_number", fixed is None or fixed < 1, "none, or 0 to below 1 (1 prunes every neuron)")
            self.require("pruning_max", self.pruning_max <= 1, "above 0 up to 1 where masks are pruned by threshold")
            return
        for name in ("pruning_max", "pruning_step") if fixed is None else ("pruning_number",):
            self.require(name, float(getattr(self, name)).is_integer(), "a whole number where pruning_by is number")

    def learn(self, model: nn.Module, clean: Clean, batches: Batched, session: RunContext) -> ByNorm:
        network = copied(model).train().requires_grad_(False)  # whose running statistics move
        norms = batch_norms(network, self.name)
        drawn = RandomBatches(*clean, self.batch_size, self.nb_iter, cast(Any, batches).augment)
        sgd = Training(epochs=drawn.chunks, lr=self.lr, lr_scheduler="constant", sgd_momentum=self.sgd_momentum, wd=0.0)
        logits = partial(masked_logits, network, norms)

        def losses(mask: Tensor, x: Pixels, y: Labels) -> dict[str, Tensor]:
            start = torch.empty(2, len(mask)).uniform_(-self.anp_eps, self.anp_eps).to(mask.dtype)
            start = to_device_async(start, mask.device)
            noise = self.ascend(lambda noise: F.cross_entropy(logits(x, mask.detach(), noise), y), start)
            clean, perturbed = F.cross_entropy(logits(x, mask), y), F.cross_entropy(logits(x, mask, noise), y)
            loss = self.anp_alpha * clean + (1 - self.anp_alpha) * perturbed
            return {"loss": loss, "clean_loss": clean, "perturbed_loss": perturbed}

        return learn_masks(norms, losses, drawn, sgd, session, "chunk", "lr")

    def ascend(self, loss: Callable[[Tensor], Tensor], noise: Tensor) -> Tensor:
        """Sign steps up `loss` from `noise`, together as long as eps. As in the released code the result is not
        projected onto [-eps, eps], so it lies in [-2 eps, 2 eps]."""
        for _ in range(self.anp_steps):
            noise = noise.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(noise), noise)
            noise = noise + self.anp_eps / self.anp_steps * gradient.sign()
        return noise.detach()

    def level(self, masks: ByNorm, value: float) -> PruningLevel:
        """The masks up to the threshold `value`, or the `value` lowest ones of all layers together."""
        if self.pruning_by == "threshold":
            return super().level(masks, value)
        rank = torch.cat(list(masks.values())).argsort(stable=True).argsort()
        parts = (rank < value).split([len(mask) for mask in masks.values()])
        return PruningLevel(f"number {value:g}", dict(zip(masks, parts, strict=True)), shift=False)


class RandomBatches:
    """`total` batches drawn with replacement by torch's generator, in chunks of up to CHUNK."""

    def __init__(self, x: Pixels, y: Labels, size: int, total: int, augment: Augment | None) -> None:
        self.x, self.y, self.size, self.total, self.augment = x, y, size, total, augment
        self.chunks, self.epoch = math.ceil(total / CHUNK), 0

    def __len__(self) -> int:
        return min(CHUNK, self.total - self.epoch * CHUNK)

    def __iter__(self) -> Iterator[tuple[Pixels, Labels]]:
        for _ in range(len(self)):
            index = to_device_async(torch.randint(len(self.x), (self.size,)), self.x.device)
            x = self.x[index]
            yield (self.augment(x, torch.default_generator) if self.augment else x), self.y[index]
