"""The settings of gradient descent: one home for optimisers and learning-rate schedules."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import lr_scheduler as schedules

from sau.method import Method
from sau.optim.descent import Descent

Schedule = Literal[
    "constant", "CosineAnnealingLR", "OneCycleLR", "StepLR", "MultiStepLR", "CyclicLR", "ReduceLROnPlateau"
]
Optimizer = Literal["sgd", "adam", "adamw", "adadelta"]

# The benchmark's flags and keys about gradient descent, which its scripts have whether they train or not.
DESCENT = (
    "epochs", "lr", "lr_scheduler", "client_optimizer", "sgd_momentum", "wd", "steplr_stepsize", "steplr_gamma",
    "steplr_milestones", "adam_betas", "cos_t_max",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Training(Method):
    """The settings of gradient descent, shared by the victim's training and by every defense that trains.

    Args:
        epochs: passes over the training pictures.
        batch_size: pictures a step.
        lr: learning rate at the start (OneCycleLR: at its highest).
        lr_scheduler: constant, or a schedule of torch.optim by its name; stepped after each epoch, and OneCycleLR after
            each update.
        client_optimizer: sgd (with momentum), adam (with AMSGrad, as in the benchmark), adamw or adadelta.
        sgd_momentum: momentum of sgd.
        wd: weight decay on every parameter, batch norm and biases included.
        adam_betas: decay rates of adam's two moments.
        steplr_stepsize: epochs between two drops (StepLR), or of a climb from min_lr to lr (CyclicLR).
        steplr_gamma: factor of a drop (StepLR, MultiStepLR, ReduceLROnPlateau).
        steplr_milestones: epochs at which the rate drops (MultiStepLR), like 60,90.
        cos_t_max: epochs after which CosineAnnealingLR reaches min_lr; none means at the end of the run.
        min_lr: lowest rate of CosineAnnealingLR and of CyclicLR, whose first epoch has it.
    """

    aliases: ClassVar[dict[str, str]] = {"optim": "client_optimizer", "weight_decay": "wd"}
    nones: ClassVar[dict[str, str]] = {"lr_scheduler": "constant"}

    epochs: int = 100
    batch_size: int = 128
    lr: float = 0.01
    lr_scheduler: Schedule = "CosineAnnealingLR"
    client_optimizer: Optimizer = "sgd"
    sgd_momentum: float = 0.9
    wd: float = 5e-4
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    steplr_stepsize: int = 30
    steplr_gamma: float = 0.1
    steplr_milestones: tuple[int, ...] = (60, 90)
    cos_t_max: int | None = None
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("epochs", self.epochs >= 0, "0 and more")
        self.require("batch_size", self.batch_size >= 1, "1 and more")
        self.require("lr", self.lr > 0, "above 0")
        self.require("sgd_momentum", 0 <= self.sgd_momentum < 1, "0 up to below 1")
        self.require("wd", self.wd >= 0, "0 and more")
        self.require(
            "adam_betas", len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas), "two in [0, 1)"
        )
        self.require("steplr_stepsize", self.steplr_stepsize >= 1, "1 and more")
        self.require("steplr_gamma", 0 < self.steplr_gamma <= 1, "above 0 and up to 1")
        falls = self.lr_scheduler != "ReduceLROnPlateau" or self.steplr_gamma < 1
        self.require("steplr_gamma", falls, "above 0 and below 1 for ReduceLROnPlateau")
        self.require("cos_t_max", self.cos_t_max is None or self.cos_t_max >= 1, "none, or 1 and more")
        self.require("min_lr", 0 <= self.min_lr <= self.lr, "0 up to lr")

    def descent(self, parameters: Iterable[nn.Parameter], steps: int) -> Descent:
        """An optimiser over `parameters` with its schedule; `steps` updates make an epoch."""
        optimizer = self._optimizer(list(parameters))
        return Descent(optimizer, self._scheduler(optimizer, steps), self.lr_scheduler == "OneCycleLR")

    def _optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        common: dict[str, Any] = {"lr": self.lr, "weight_decay": self.wd}
        if self.client_optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.sgd_momentum, fused=True, **common)
        if self.client_optimizer == "adadelta":
            return torch.optim.Adadelta(parameters, **common)
        betas = (self.adam_betas[0], self.adam_betas[1])
        if self.client_optimizer == "adamw":
            return torch.optim.AdamW(parameters, betas=betas, fused=True, **common)
        return torch.optim.Adam(parameters, betas=betas, amsgrad=True, fused=True, **common)

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        match self.lr_scheduler:
            case "CosineAnnealingLR":
                return schedules.CosineAnnealingLR(optimizer, self.cos_t_max or max(1, self.epochs), self.min_lr)
            case "OneCycleLR":
                total = max(1, self.epochs * steps)
                return schedules.OneCycleLR(optimizer, self.lr, total_steps=total, cycle_momentum=False)
            case "StepLR":
                return schedules.StepLR(optimizer, self.steplr_stepsize, self.steplr_gamma)
            case "MultiStepLR":
                return schedules.MultiStepLR(optimizer, list(self.steplr_milestones), self.steplr_gamma)
            case "CyclicLR":
                return schedules.CyclicLR(optimizer, self.min_lr, self.lr, self.steplr_stepsize, cycle_momentum=False)
            case "ReduceLROnPlateau":
                return schedules.ReduceLROnPlateau(optimizer, factor=self.steplr_gamma)
        return None


def adam(lr: float, schedule: Schedule = "constant", **settings: Any) -> Training:
    """Adam as papers have it: without AMSGrad, which our `adam` has like the benchmark's, and without decay.

    Args:
        lr: learning rate.
        schedule: of the rate.
        settings: further fields of `Training`.
    """
    return Training(client_optimizer="adamw", wd=0.0, lr=lr, lr_scheduler=schedule, **settings)  # the two are the same
