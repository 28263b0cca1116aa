"""The descent step: an optimiser and its schedule as one thing, down one loss, several, or a part of one."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules


@dataclass(frozen=True)
class Part:
    """The place of a loss in an update that several losses make.

    Args:
        share: its weight; those of all parts sum up to 1.
        first: whether the gradients of the update before are cleared.
        last: whether the weights move.
    """

    share: float = 1.0
    first: bool = True
    last: bool = True


WHOLE = Part()


class Descent:
    """An optimiser and its schedule as one checkpointable thing; `part` says which part of an update a loss is.

    With `keeps` every gradient is added to those of all steps before, as by code that forgets to clear them.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any, every_update: bool) -> None:
        self.optimizer, self.scheduler, self.every_update = optimizer, scheduler, every_update
        self.part, self.keeps = WHOLE, False
        self.rates: list[Tensor] = []  # of each group, where a captured update reads them
        self.still = False  # the schedule, while an update is captured

    def __call__(self, loss: Tensor, *others: "Descent", clip: float | None = None) -> None:
        """One step down the gradient of `loss`, together with `others` that share it.

        The gradient of this one is shortened to the length `clip` where it is longer.
        """
        together, part = (self, *others), self.part
        for one in together:
            if part.first and not one.keeps:
                one.optimizer.zero_grad(set_to_none=True)
        (loss if part is WHOLE else part.share * loss).backward()
        if not part.last:
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
        if not self.still:
            self.advance()

    def advance(self) -> None:
        """Move a schedule that counts updates."""
        if self.every_update:
            self.scheduler.step()

    @property
    def fused(self) -> bool:
        """Whether the optimiser can read its rates from the device's memory."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

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
        if self.scheduler is None or self.every_update:
            return
        if isinstance(self.scheduler, schedules.ReduceLROnPlateau):
            self.scheduler.step(loss)
        else:
            self.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Optimiser and schedule, for a checkpoint, and the gradients that the next step adds to."""
        kept = {"gradients": [parameter.grad for parameter in self.parameters]} if self.keeps else {}
        schedule = self.scheduler and self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": schedule, **kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for parameter, gradient in zip(self.parameters, state.get("gradients", ()), strict=False):
            parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
