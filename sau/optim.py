"""What a method is, and gradient descent: settings of optimisers and learning-rate schedules, the step down a loss."""

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, dataclass_transform

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules

from sau.config import check, ordered, param
from sau.errors import DataError, require
from sau.files import checksum

Schedule = Literal[
    "constant", "CosineAnnealingLR", "OneCycleLR", "StepLR", "MultiStepLR", "CyclicLR", "ReduceLROnPlateau"
]
Optimizer = Literal["sgd", "adam", "adamw", "adadelta"]

# The benchmark's flags and keys about gradient descent, which its scripts have whether they train or not.
DESCENT = (
    "epochs", "lr", "lr_scheduler", "client_optimizer", "sgd_momentum", "wd", "steplr_stepsize", "steplr_gamma",
    "steplr_milestones", "adam_betas", "cos_t_max",
)  # fmt: skip


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is a frozen set of hyperparameters; whatever changes while it runs lives in the state of `prepare`.

    A subclass is a dataclass, frozen and of keywords, and needs no decorator for it. `ignored` maps flags of the
    benchmark that have no effect here to the reason, `training_aliases` the benchmark's names for settings of the
    victim's training to ours, where only this method has them.
    """

    name: ClassVar[str] = ""
    compiles: ClassVar[bool] = False  # whether torch.compile may run its network, which has no hooks and steady sizes
    training_aliases: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[dict[str, str]] = {}
    unread: ClassVar[tuple[str, ...]] = ()  # keys of the benchmark's own file of the method that its code does not read
    # Whether `step` has the device do the same each time, with one update of each `Descent` in its state: CUDA may then
    # replay it as a graph, and its Python does not run again. A subclass with a step of its own has to say it anew.
    graph_safe: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()  # parameters that name files, whose content is part of what a run is
    watched: ClassVar[str] = "loss"  # the loss by which ReduceLROnPlateau judges; one below 0 would mislead it
    retired: ClassVar[dict[str, Any]] = {}  # former settings in the identity of kept results, at their only value now
    later: ClassVar[tuple[str, ...]] = ()  # settings newer than kept results: in the identity only if not the default

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        inherited = {one.name for base in cls.__bases__ if is_dataclass(base) for one in fields(base)}
        if bare := inherited & vars(cls).keys() - inspect.get_annotations(cls).keys():
            raise TypeError(
                f"{cls.__name__}: {', '.join(sorted(bare))} would be ignored; a parameter is written with its type"
            )
        if "graph_safe" not in vars(cls) and "step" in vars(cls):
            cls.graph_safe = False
        dataclass(frozen=True, kw_only=True)(cls)
        if lines := [f"    {option.name}: {option.about}." for option in ordered(cls) if option.help]:
            cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), "", "Args:", *lines, ""])
        made = {one.name for one in fields(cls)} - inherited
        if fixed := sorted(name for name in made if any(hasattr(base, name) for base in cls.__bases__)):
            raise TypeError(f"{cls.__name__}: {', '.join(fixed)} would become a parameter; write it without a type")

    def __post_init__(self) -> None:
        check(self)

    def params(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def identity(self) -> dict[str, Any]:
        """`params` as they determine a result: of a file the SHA-256 of its content, for the place differs between
        machines; of a record's folder that of its weights. DataError if one cannot be read."""
        unused = {field.name for field in fields(self) if getattr(self, field.name) == field.default} & {*self.later}
        found = {**self.retired, **{name: value for name, value in self.params().items() if name not in unused}}
        for name in self.files:
            if (given := found[name]) is not None:
                path = Path(given) / "model.safetensors" if Path(given).is_dir() else Path(given)
                try:
                    found[f"{name}_sha256"] = checksum(path)
                except DataError as error:
                    raise DataError(f"{name}: {error}; name an existing file") from None
                del found[name]
        return found

    def step(self, state: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from a batch (x [B, C, H, W] in [0, 1], y [B]); returns what to report: scalars, averaged by
        epoch, or integer counts, summed."""
        raise TypeError(f"{type(self).__name__} has no step of its own; it must define one or override the caller")

    def end_epoch(self, state: dict[str, Any], losses: dict[str, float]) -> bool | None:
        """After each epoch, with its mean losses: move the learning-rate schedule. True ends the training early."""
        state["descent"].end_epoch(losses[self.watched])
        return None

    def supports_microbatch(self) -> bool:
        """Whether `step` makes one update, of `state["descent"]`, from a mean over the images of its batch; the batch
        may then go through in parts where memory does not hold it."""
        return False

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Refuse a hyperparameter: ConfigError with its name, its value and what is allowed."""
        require(name, getattr(self, name), ok, allowed)


class Descent:
    """An optimiser and its schedule as one checkpointable object.

    A loss may be one of several micro-batches of an update: `share` is its weight, `first` clears the gradients of the
    update before, `last` moves the weights. With `keeps` every gradient is added to those of all steps before, as by
    code that forgets to clear them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler
        self.every_update = isinstance(scheduler, schedules.OneCycleLR)
        self.share, self.first, self.last = 1.0, True, True
        self.keeps = False
        self.moves = 0  # updates that Python has made
        self.rates: list[Tensor] = []  # of each group, where a CUDA graph reads them
        self.still = False  # the schedule, while an update is captured

    def __call__(self, loss: Tensor, *others: "Descent", clip: float | None = None) -> None:
        """One step down the gradient of `loss`, together with `others` that share it.

        The gradient of this one is shortened to the length `clip` where it is longer.
        """
        together = (self, *others)
        for one in together:
            if self.first and not one.keeps:
                one.optimizer.zero_grad(set_to_none=True)
        (loss if self.share == 1 else self.share * loss).backward()
        if not self.last:
            return
        if clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, clip)
        for one in together:
            one._move()

    def follow(self, gradients: Sequence[Tensor]) -> None:
        """One step down given gradients, one for each of `parameters`."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            # Fused optimisers walk memory, so a gradient must lie in it as its parameter does.
            parameter.grad = torch.empty_like(parameter).copy_(gradient.detach())
        self._move()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What moves, in the order it was given."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _move(self) -> None:
        self.optimizer.step()
        self.moves += 1
        if not self.still:
            self.advance()

    def advance(self) -> None:
        """Move a schedule that counts updates."""
        if self.every_update:
            self.scheduler.step()

    @contextmanager
    def capturing(self) -> Iterator[None]:
        """Inside, an update is captured, not made: rates are read from memory that `refresh` fills before each time it
        is repeated, and the schedule stands still, so that `advance` is to be called after each."""
        groups = self.optimizer.param_groups
        kept = [dict(group) for group in groups]
        self.rates = self.rates or [torch.zeros((), device=self.parameters[0].device) for _ in groups]
        self.still = True
        for group, rate in zip(groups, self.rates, strict=True):
            group.update(lr=rate, capturable=True)
        try:
            yield
        finally:
            self.still = False
            for group, before in zip(groups, kept, strict=True):
                group.clear()
                group.update(before)

    def refresh(self) -> None:
        """Put the rates of the schedule where a captured update reads them."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            rate.fill_(group["lr"])

    def end_epoch(self, loss: float) -> None:
        """Move a schedule that counts epochs; `loss` is the epoch's mean, which ReduceLROnPlateau watches."""
        if self.scheduler is not None and not self.every_update:
            plateau = isinstance(self.scheduler, schedules.ReduceLROnPlateau)
            self.scheduler.step(*([loss] if plateau else []))

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule, for a checkpoint, and the gradients that the next step adds to."""
        kept = {"gradients": [parameter.grad for parameter in self.parameters]} if self.keeps else {}
        schedule = self.scheduler and self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": schedule, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for parameter, gradient in zip(self.parameters, state.get("gradients", ()), strict=False):
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)


class Training(Method):
    """The settings of gradient descent, shared by the victim's training and by every defense that trains."""

    epochs: int = param(100, "passes over the training images", ge=0)
    batch_size: int = param(128, "images in a batch", ge=1)
    lr: float = param(0.01, "learning rate at the start (OneCycleLR: at its highest)", gt=0)
    lr_scheduler: Schedule | None = param(
        "CosineAnnealingLR", "constant (or none), or one of torch.optim, moved by epochs, OneCycleLR by updates"
    )
    client_optimizer: Optimizer = param("sgd", "optimiser; adam has AMSGrad, as in the benchmark", aliases=("optim",))
    sgd_momentum: float = param(0.9, "momentum of sgd", ge=0, lt=1)
    wd: float = param(5e-4, "weight decay on all parameters, batch norm too", ge=0, aliases=("weight_decay",))
    adam_betas: tuple[float, ...] = param((0.9, 0.999), "decay rates of adam's two moments", ge=0, lt=1)
    steplr_stepsize: int = param(30, "epochs between drops (StepLR), or of a climb to lr (CyclicLR)", ge=1)
    steplr_gamma: float = param(0.1, "factor of a drop (StepLR, MultiStepLR, ReduceLROnPlateau)", gt=0, le=1)
    steplr_milestones: tuple[int, ...] = param((60, 90), "epochs at which the rate drops (MultiStepLR), like 60,90")
    cos_t_max: int | None = param(None, "epochs until CosineAnnealingLR is at min_lr; none: the whole run", ge=1)
    min_lr: float = param(0.0, "lowest rate of CosineAnnealingLR and of CyclicLR, whose first epoch has it", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("adam_betas", len(self.adam_betas) == 2, "two numbers")
        falls = self.lr_scheduler != "ReduceLROnPlateau" or self.steplr_gamma < 1
        self.require("steplr_gamma", falls, "above 0 and below 1 for ReduceLROnPlateau")
        self.require("min_lr", self.min_lr <= self.lr, "0 up to lr")

    def descent(self, parameters: Iterable[nn.Parameter], steps: int) -> Descent:
        """An optimiser over `parameters` with its schedule; `steps` updates make an epoch."""
        kinds: dict[str, tuple[Any, dict[str, Any]]] = {
            "sgd": (torch.optim.SGD, {"momentum": self.sgd_momentum, "fused": True}),
            "adam": (torch.optim.Adam, {"betas": self.adam_betas, "amsgrad": True, "fused": True}),
            "adamw": (torch.optim.AdamW, {"betas": self.adam_betas, "fused": True}),
            "adadelta": (torch.optim.Adadelta, {}),
        }
        kind, own = kinds[self.client_optimizer]
        optimizer = kind(list(parameters), lr=self.lr, weight_decay=self.wd, **own)
        return Descent(optimizer, self._scheduler(optimizer, steps))

    def _scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        settings: dict[str | None, dict[str, Any]] = {
            "CosineAnnealingLR": {"T_max": self.cos_t_max or max(1, self.epochs), "eta_min": self.min_lr},
            "OneCycleLR": {"max_lr": self.lr, "total_steps": max(1, self.epochs * steps), "cycle_momentum": False},
            "StepLR": {"step_size": self.steplr_stepsize, "gamma": self.steplr_gamma},
            "MultiStepLR": {"milestones": list(self.steplr_milestones), "gamma": self.steplr_gamma},
            "CyclicLR": {"base_lr": self.min_lr, "max_lr": self.lr, "step_size_up": self.steplr_stepsize}
            | {"cycle_momentum": False},
            "ReduceLROnPlateau": {"factor": self.steplr_gamma},
        }
        given, name = settings.get(self.lr_scheduler), str(self.lr_scheduler)
        return None if given is None else getattr(schedules, name)(optimizer, **given)


def adam(lr: float, schedule: Schedule = "constant", **settings: Any) -> Training:
    """Adam as papers have it: without AMSGrad, which `client_optimizer="adam"` has as in BackdoorBench, and without
    weight decay, where AdamW is the same. `settings` are further fields of `Training`."""
    return Training(client_optimizer="adamw", wd=0.0, lr=lr, lr_scheduler=schedule, **settings)
