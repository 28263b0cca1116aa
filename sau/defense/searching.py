"""What the defenses share that search a ball around every clean picture: SAU, and AT beside it."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from sau.defense.base import Tuning
from sau.models.frozen import fixed_norms
from sau.optim import Optimizer, Schedule
from sau.perturb import RADII, Ball, Init, Norm, is_radius
from sau.types import Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class Searching(Tuning):
    """A defense that updates weights on perturbed pictures x + e, e found by sign steps inside a ball S.

    Args:
        eps: radius of the ball S, in [0, 1] pixels: above 0 and, in L_inf, below 1.
        norm: norm of the ball; Reg means no ball.
        adv_lr: step of the search, as `eps`; every norm uses sign steps.
        adv_steps: steps of the search.
        pgd_init: where the search starts: zero, random (each pixel up to eps away, then brought into the ball), max
            (+eps everywhere) or min.
        clip_pixels: keep x + e inside [0, 1] (the set of images in SAU's paper; its release does not).
    """

    searches: ClassVar[bool] = True
    compiles: ClassVar[bool] = True
    aliases: ClassVar[dict[str, str]] = {"n_rounds": "epochs", "trigger_norm": "eps", "norm_type": "norm"}

    lr: float = 1e-4
    lr_scheduler: Schedule = "constant"
    client_optimizer: Optimizer = "adam"
    wd: float = 0.0
    eps: float = 0.2
    norm: Norm = "L_inf"
    adv_lr: float = 0.2
    adv_steps: int = 5
    pgd_init: Init = "max"
    clip_pixels: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "adv_lr"):
            self.require(name, is_radius(getattr(self, name), self.norm), RADII)
        self.require("adv_steps", self.adv_steps >= 1, "1 and more")

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
