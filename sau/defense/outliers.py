"""What CLP, BNP and EP have in common: a score for every channel, and the rule that prunes those that stand out.

In a layer with scores s_1..s_C, channel c is pruned if

    s_c > mean(s) + u * std(s)          (std with C - 1 in the denominator)

and pruning sets the batch norm's scale (gamma) to 0, and with `zero_shift` its shift (beta) too.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sau.config import param
from sau.defense import pruning
from sau.defense.base import Defense
from sau.defense.hooks import forward_hooks
from sau.defense.inputs import first
from sau.loop import Session
from sau.models import full_precision
from sau.optim import DESCENT
from sau.types import Batched, Pixels

Scores = dict[str, Tensor]  # for each batch norm, by its name, one number a channel [C]; more is more suspicious


@dataclass(frozen=True, kw_only=True)
class Outliers(Defense):
    """A defense that prunes outliers is its `scores`."""

    learns: ClassVar[bool] = False
    ignored: ClassVar[dict[str, str]] = dict.fromkeys(DESCENT, "channels are pruned, nothing is trained")

    u: float = param(3.0, "standard deviations above its layer's mean from which on a channel is pruned", ge=0)
    zero_shift: bool = param(True, "zero the shift of pruned channels as well as their scale")
    select: Literal["defender", "oracle"] = param(
        "defender",
        "defender prunes by u; oracle tries u_num values from u_max down to u_min instead and keeps the one with "
        "the lowest ASR on the test sets",
    )
    u_min: float = param(0.0, "lowest u that the oracle tries", ge=0)
    u_max: float = param(10.0, "highest u that the oracle tries")
    u_num: int = param(21, "how many values of u the oracle tries", ge=1)
    acc_ratio: float = param(0.1, "share of the test accuracy that the oracle may lose", ge=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("u_max", self.u_max >= self.u_min, f"u_min ({self.u_min}) and more")

    @abstractmethod
    def scores(self, model: nn.Module, batches: Batched) -> Scores:
        """How suspicious each channel of each batch norm is; `model` is in eval mode and computes in fp32."""

    def run(self, model: nn.Module, batches: Batched, session: Session) -> None:
        # bf16 has steps of 1/128, which would be seen in the bins of a histogram.
        with full_precision(model.eval()), torch.no_grad():
            scores = self.scores(model, batches)
        prune = partial(pruning.apply, model, shift=self.zero_shift)
        if self.select == "defender":
            seen = first(batches) if self.looks else None
            pruning.prune_checked(model, level(scores, self.u), prune, seen, session)
            return
        sweep = torch.linspace(self.u_max, self.u_min, self.u_num, dtype=torch.float64).tolist()
        levels = [level(scores, u) for u in sweep]
        pruning.choose(model, levels, prune, None, self.acc_ratio, session, oracle=True)


def level(scores: Scores, u: float) -> pruning.Level:
    """The channels that lie more than `u` standard deviations above the mean of their layer.

    A layer keeps its least suspicious channel, which rounding of the mean of equal scores could prune.
    """
    flags = {name: torch.zeros(len(s), dtype=torch.bool, device=s.device) for name, s in scores.items()}
    for name, s in scores.items():
        if len(s) > 1:  # one channel has no deviation
            flags[name] = (s > s.mean() + u * s.std()) & (s > s.min())
    return pruning.Level(f"u {u:g}", flags)


def look(model: nn.Module, norms: pruning.Norms, x: Pixels, at: Callable[[str, Tensor], None]) -> None:
    """Send `x` through `model` and call `at` with the name and the input [B, C, ...] of each of `norms` on the way."""
    with forward_hooks(
        (norm, lambda _, inputs, output, name=name: at(name, inputs[0])) for name, norm in norms.items()
    ):
        model(x)  # a batch norm does not change its input, so it may be looked at afterwards
