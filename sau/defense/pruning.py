"""What the pruning defenses share: levels and the choice among them, the hold-out, batch norms, outliers."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from sau.config import param
from sau.data.images import last_of_each
from sau.defense.base import Defense
from sau.defense.hooks import forward_hooks, require_plain_weight
from sau.errors import ConfigError, TrainingError
from sau.evaluate import score
from sau.loop import RunContext
from sau.models.normalized import full_precision
from sau.optim import DESCENT
from sau.types import Batched, Pixels

Clean = tuple[Tensor, Tensor]  # images [N, C, H, W] in [0, 1] and their labels [N]
Norms = dict[str, nn.BatchNorm2d | nn.SyncBatchNorm]  # by name
Scores = dict[str, Tensor]  # of each batch norm, by name: a number a channel [C], the higher the more suspicious
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class PruningLevel:
    """One way to prune; of a list of levels each prunes what the one before prunes, and more."""

    name: str  # like `threshold 0.35`
    pruned: Mapping[str, Tensor]  # for each layer, by its name, which channels [C] go

    @property
    def count(self) -> int:
        """How many channels go."""
        return sum(int(flags.sum()) for flags in self.pruned.values())

    @property
    def emptied(self) -> list[str]:
        """The layers that would lose all of their channels, after which nothing reaches the logits."""
        return [name for name, flags in self.pruned.items() if flags.all()]


Prune = Callable[[PruningLevel], None]  # applies a level to a network in place


def hold_out(x: Tensor, y: Tensor, share: float) -> tuple[Clean, Clean]:
    """Split clean images into those to learn from and the last `share` of each class, to choose a level by.

    Every class keeps an image to learn from. Where no class has a second one, both parts are all images.
    """
    held = last_of_each(y, share)
    return ((x[~held], y[~held]), (x[held], y[held])) if held.any() else ((x, y), (x, y))


def batch_norms(model: nn.Module, method: str, *, running: bool = False) -> Norms:
    """The batch norms of `model` with scales and shifts (and `running` statistics); ConfigError if there are none."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    norms = {name: norm for name, norm in norms.items() if norm.affine and norm.bias is not None}
    norms = {name: norm for name, norm in norms.items() if not running or norm.running_var is not None}
    if not norms:
        kind = "BatchNorm2d with running statistics" if running else "BatchNorm2d"
        raise ConfigError(f"the network has no batch norm ({kind}), whose channels {method} prunes; try ft or sau")
    if len({id(require_plain_weight(norm, method).weight) for norm in norms.values()}) < len(norms):
        raise ConfigError(f"batch norms of the network share weights, but {method} prunes each of them; try ft or sau")
    return norms


@torch.no_grad()
def zero_channels(layer: nn.Module, pruned: Tensor, *, shift: bool) -> None:
    """Zero the weights of the `pruned` channels [C] of a layer, and with `shift` their biases."""
    layer.get_parameter("weight")[pruned] = 0
    if shift:
        layer.get_parameter("bias")[pruned] = 0


def apply(model: nn.Module, level: PruningLevel, *, shift: bool) -> None:
    """Zero the channels of `level`, layer by layer."""
    for name, pruned in level.pruned.items():
        zero_channels(model.get_submodule(name), pruned, shift=shift)


def choose(
    model: nn.Module,
    levels: Sequence[PruningLevel],
    prune: Prune,
    held: Clean | None,
    tolerance: float,
    session: RunContext,
    *,
    by_asr: bool = True,
) -> PruningLevel | None:
    """Prune `model`, in eval mode, by one of `levels` (from the mildest on) or by none; returns the level.

    A level is allowed while (ACC_0 - ACC) / ACC_0 <= `tolerance`, where ACC_0 is that of the unpruned network. The
    defender measures ACC on `held` and takes the hardest level before the first that is not allowed. The oracle,
    without `held`, takes the lowest ASR of all allowed levels by the session's `judge`, as in the benchmark, or without
    `by_asr` follows the defender's rule on the test ACC.
    """
    judge = session.judge if held is None else partial(score, clean=held, triggered=None)
    assert judge is not None  # `purify` refuses an oracle without one
    first = best = judge(model)
    search, chosen, count = held is None and by_asr, None, 0
    for number, level in enumerate(levels, 1):
        place = f"the search, before level {number} of {len(levels)}"
        if level.emptied or (held is None and session.time_is_up(place)):
            break
        if level.count == count:  # no more than the one before
            continue
        count = level.count
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        prune(level)
        found = judge(model)
        model.load_state_dict(before)
        allowed = first.acc.percent - found.acc.percent <= tolerance * first.acc.percent
        if not (allowed or search):
            break
        if allowed and (not search or (found.asr and best.asr and found.asr.percent < best.asr.percent)):
            chosen, best = level, found
    label = "test ACC" if held is None else "held-back ACC"
    if chosen is None:
        wanted = f"{'lowers the ASR and ' if search else ''}keeps the {label} within {tolerance:g}"
        session.say(f"warning: nothing is pruned: no level that was tried {wanted} of {first.acc.percent} %")
        return None
    prune(chosen)
    figures = f"{label} {first.acc.percent} -> {best.acc.percent} %"
    session.say(f"pruned {chosen.count} channels ({chosen.name}): {figures}")
    return chosen


def prune_fixed(level: PruningLevel, prune: Prune, session: RunContext) -> None:
    """Prune by the one level that a setting gives; TrainingError if a layer would lose all channels."""
    if level.emptied:
        raise TrainingError(f"{level.name} would prune every channel of {', '.join(level.emptied)}; prune less")
    prune(level)
    session.say(f"pruned {level.count} channels ({level.name})")


@dataclass(frozen=True, kw_only=True)
class ChannelOutlierPruning(Defense):
    """Prune the channels whose score stands out in their layer: s_c > mean(s) + u * std(s).

    Pruning sets the batch norm's scale to 0, and with `zero_shift` its shift too.
    """

    gradients = "none"
    ignored: ClassVar[dict[str, str]] = dict.fromkeys(DESCENT, "channels are pruned, nothing is trained")

    u: float = param(3.0, "a channel is pruned beyond so many standard deviations from its layer's mean", ge=0)
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

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        with full_precision(model.eval()), torch.no_grad():  # the steps of bf16, 1/128, would show in a histogram
            scores = self.scores(model, batches)
        prune = partial(apply, model, shift=self.zero_shift)
        if self.select == "defender":
            prune_fixed(outliers(scores, self.u), prune, session)
            return
        values = torch.linspace(self.u_max, self.u_min, self.u_num, dtype=torch.float64).tolist()
        choose(model, [outliers(scores, u) for u in values], prune, None, self.acc_ratio, session)


def outliers(scores: Scores, u: float) -> PruningLevel:
    """The channels more than `u` standard deviations above the mean of their layer, but never its lowest score."""
    # One score has no deviation; the mean of equal scores may be rounded below them.
    flags = {name: (s > s.mean() + u * s.std()) & (s > s.min()) for name, s in scores.items() if len(s) > 1}
    return PruningLevel(f"u {u:g}", flags)


def collect_norm_inputs(model: nn.Module, norms: Norms, x: Pixels, collect: Callable[[str, Tensor], None]) -> None:
    """Run `model` on `x`, and call `collect` with the name and the input [B, C, ...] of each of `norms`."""
    with forward_hooks((norm, lambda _, given, __, name=name: collect(name, given[0])) for name, norm in norms.items()):
        model(x)
