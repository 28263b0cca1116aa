"""What the defenses share that search a ball around every clean picture: SAU, and AT beside it."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sau.config import param
from sau.defense.base import ENOUGH, SMALLEST_BATCH, Tuning
from sau.models.preact_resnet import PreActResNet18
from sau.optim import Optimizer, Schedule
from sau.perturb import RADII, Ball, Init, Norm, is_radius
from sau.runtime.batchnorm import fixed_norms
from sau.types import Labels, Pixels

UPDATES = 600  # where the published settings do not hold


@dataclass(frozen=True, kw_only=True)
class Searching(Tuning):
    """A defense that updates weights on perturbed pictures x + e, e found by sign steps inside a ball S."""

    adapting: ClassVar[tuple[str, ...]] = (*Tuning.adapting, "augment")
    searches: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    epochs: int = param(100, aliases=("n_rounds",))
    lr: float = 1e-4
    lr_scheduler: Schedule | None = "constant"
    client_optimizer: Optimizer = "adam"
    wd: float = 0.0
    eps: float = param(0.2, "radius of the ball S, in [0, 1] pixels; in L_inf below 1", gt=0, aliases=("trigger_norm",))
    norm: Norm = param("L_inf", "norm of the ball; Reg means no ball", aliases=("norm_type",))
    adv_lr: float = param(0.2, "step of the search, as `eps`; every norm uses sign steps", gt=0)
    adv_steps: int = param(5, "steps of the search", ge=1)
    pgd_init: Init = param(
        "max",
        "where the search starts: zero, random (each pixel up to eps away, then brought into the ball), max (+eps "
        "everywhere) or min",
    )
    clip_pixels: bool = param(
        False, "keep x + e inside [0, 1] (the set of images in SAU's paper; its release does not)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "adv_lr"):
            self.require(name, is_radius(getattr(self, name), self.norm), RADII)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> "Searching":
        """The published settings where they were published: PreAct-ResNet18, 2,500 clean images. Elsewhere 600 updates
        at a rate that falls to 0 from 0.08 of the typical weight (root mean square, median over layers), 3e-3 at
        most; augmented where images are few.

        The published 1,000 updates at 1e-4 leave the backdoors of small networks, whose weights are larger, in place.
        """
        few = images < ENOUGH
        if not few and any(isinstance(module, PreActResNet18) for module in model.modules()):
            return self
        size = min(self.batch_size, max(SMALLEST_BATCH, images // 40))
        scales = [p.detach().square().mean().sqrt() for p in model.parameters() if p.ndim > 1]
        rate = float(f"{min(3e-3, max(1e-4, 0.08 * float(torch.stack(scales).median()))):.1e}") if scales else self.lr
        epochs = math.ceil(UPDATES / (per_epoch or -(-images // size)))
        return replace(self, epochs=epochs, batch_size=size, lr=rate, lr_scheduler="CosineAnnealingLR", augment=few)

    @property
    def ball(self) -> Ball:
        """S."""
        return Ball(norm=self.norm, eps=self.eps, clip=self.clip_pixels)

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        with fixed_norms(state["model"], x):
            return self.update(state, x, y)

    @abstractmethod
    def update(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """The search, and what is learned from what it found."""
