"""What the pruning defenses share: levels and the choice among them, the hold-out, batch norms, outliers, masks."""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sau import loop
from sau.config import param
from sau.data.batches import rebatch, stack_batches
from sau.data.images import last_of_each
from sau.defense.base import Defense, Select
from sau.errors import ConfigError, TrainingError
from sau.evaluate import score
from sau.loop import RunContext
from sau.models.normalized import forward_hooks, full_precision, require_plain_weight
from sau.optim import DESCENT, Training
from sau.types import Batched, Labels, Logits, Pixels

Clean = tuple[Tensor, Tensor]  # images [N, C, H, W] in [0, 1] and their labels [N]
Norms = dict[str, nn.BatchNorm2d | nn.SyncBatchNorm]  # by name
ByNorm = dict[str, Tensor]  # for each batch norm, by name, a number a channel [C]
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


@dataclass(frozen=True)
class PruningLevel:
    """One way to prune; of a list of levels each prunes what the one before prunes, and more."""

    name: str  # like `threshold 0.35`
    pruned: Mapping[str, Tensor]  # for each layer, by its name, which channels [C] go; of a linear layer which inputs
    shift: bool = True  # whether their biases go, too

    @property
    def count(self) -> int:
        """How many channels go."""
        return sum(int(flags.sum()) for flags in self.pruned.values())

    @property
    def emptied(self) -> list[str]:
        """The layers that would lose all of their channels, after which nothing reaches the logits."""
        return [name for name, flags in self.pruned.items() if flags.all()]

    @torch.no_grad()
    def prune(self, model: nn.Module) -> None:
        """Zero the weights of the channels in place."""
        for name, flags in self.pruned.items():
            layer = model.get_submodule(name)
            if isinstance(layer, nn.Linear):
                layer.weight[:, flags] = 0
                continue
            layer.get_parameter("weight")[flags] = 0
            if self.shift and layer.bias is not None:
                layer.get_parameter("bias")[flags] = 0


def hold_out(x: Tensor, y: Tensor, share: float) -> tuple[Clean, Clean]:
    """Split clean images into those to learn from and the last `share` of each class, to choose a level by.

    Every class keeps an image to learn from. Where no class has a second one, both parts are all images.
    """
    held = last_of_each(y, share)
    return ((x[~held], y[~held]), (x[held], y[held])) if held.any() else ((x, y), (x, y))


def choose(
    model: nn.Module, levels: Sequence[PruningLevel], held: Clean | None, tolerance: float, session: RunContext,
    by_asr: bool = True,
) -> PruningLevel | None:  # fmt: skip
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
    before = copy.deepcopy(model.state_dict())
    for number, level in enumerate(levels, 1):
        place = f"the search, before level {number} of {len(levels)}"
        if level.emptied or (held is None and session.time_is_up(place)):
            break
        if level.count == count:  # no more than the one before
            continue
        count = level.count
        level.prune(model)
        found = judge(model)
        model.load_state_dict(before)
        allowed = first.acc.percent - found.acc.percent <= tolerance * first.acc.percent
        if allowed and (not search or (found.asr and best.asr and found.asr.percent < best.asr.percent)):
            chosen, best = level, found
        elif not search:
            break
    label = "test ACC" if held is None else "held-back ACC"
    if chosen is None:
        wanted = f"{'lowers the ASR and ' if search else ''}keeps the {label} within {tolerance:g}"
        session.say(f"warning: nothing is pruned: no level that was tried {wanted} of {first.acc.percent} %")
        return None
    prune_fixed(model, chosen, session, f": {label} {first.acc.percent} -> {best.acc.percent} %")
    return chosen


def prune_fixed(model: nn.Module, level: PruningLevel, session: RunContext, figures: str = "") -> None:
    """Prune `model` by one level and say so, with `figures`; TrainingError if a layer would lose all channels."""
    if level.emptied:
        raise TrainingError(f"{level.name} would prune every channel of {', '.join(level.emptied)}; prune less")
    level.prune(model)
    session.say(f"pruned {level.count} channels ({level.name}){figures}")


# Batch norms, and what feeds them


def affine_norms(model: nn.Module, *, running: bool = False) -> Norms:
    """The batch norms of `model` with scales and shifts (and `running` statistics)."""
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, NORMS) and norm.bias is not None}
    return {name: norm for name, norm in norms.items() if not running or norm.running_var is not None}


def batch_norms(model: nn.Module, method: str, *, running: bool = False) -> Norms:
    """`affine_norms`, whose channels `method` prunes; ConfigError if there are none, or if they share weights."""
    norms = affine_norms(model, running=running)
    if not norms:
        kind = "BatchNorm2d with running statistics" if running else "BatchNorm2d"
        raise ConfigError(f"the network has no batch norm ({kind}), whose channels {method} prunes; try ft or sau")
    if len({id(require_plain_weight(norm, method).weight) for norm in norms.values()}) < len(norms):
        raise ConfigError(f"batch norms of the network share weights, but {method} prunes each of them; try ft or sau")
    return norms


@torch.no_grad()
def trace(model: nn.Module, x: Pixels, *kinds: type[nn.Module]) -> list[tuple[nn.Module, nn.Module | None]]:
    """The layers of `kinds` in the order in which they run on `x`, each with the one whose very output it takes.

    That is None where another layer, or a sum, made the input, or changed it in place, which raises its version.
    """
    calls: list[tuple[nn.Module, nn.Module | None]] = []
    outputs: list[tuple[Tensor, int, nn.Module]] = []

    def follow(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        version = inputs[0]._version - getattr(layer, "inplace", False)  # its own change has been counted
        makers = [maker for made, then, maker in outputs if made is inputs[0] and then == version]
        calls.append((layer, makers[-1] if makers else None))
        outputs.append((output, output._version, layer))

    with forward_hooks((module, follow) for module in model.modules() if isinstance(module, kinds)):
        model(x)
    return calls


# Outliers: CLP, BNP and EP


class ChannelOutlierPruning(Defense):
    """Prune the channels whose score stands out in their layer: s_c > mean(s) + u * std(s).

    Pruning sets the batch norm's scale to 0, and with `zero_shift` its shift too.
    """

    gradients = "none"
    ignored = dict.fromkeys(DESCENT, "channels are pruned, nothing is trained")

    u: float = param(3.0, "a channel is pruned beyond so many standard deviations from its layer's mean", ge=0)
    zero_shift: bool = param(True, "zero the shift of pruned channels as well as their scale")
    select: Select = param("defender", "defender prunes by u; oracle by the u with the lowest ASR on the test sets")
    u_min: float = param(0.0, "lowest u that the oracle tries", ge=0)
    u_max: float = param(10.0, "highest u that the oracle tries")
    u_num: int = param(21, "how many values of u the oracle tries", ge=1)
    acc_ratio: float = param(0.1, "share of the test accuracy that the oracle may lose", ge=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("u_max", self.u_max >= self.u_min, f"u_min ({self.u_min}) and more")

    @abstractmethod
    def scores(self, model: nn.Module, batches: Batched) -> ByNorm:
        """How suspicious each channel is, the higher the more; `model` is in eval mode and computes in fp32."""

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        with full_precision(model.eval()), torch.no_grad():  # the steps of bf16, 1/128, would show in a histogram
            scores = self.scores(model, batches)
        if self.select == "defender":
            prune_fixed(model, self.level(scores, self.u), session)
            return
        values = torch.linspace(self.u_max, self.u_min, self.u_num, dtype=torch.float64).tolist()
        choose(model, [self.level(scores, u) for u in values], None, self.acc_ratio, session)

    def level(self, scores: ByNorm, u: float) -> PruningLevel:
        """The channels more than `u` standard deviations above the mean of their layer, but never its lowest score."""
        return PruningLevel(f"u {u:g}", {name: outliers(s, u) for name, s in scores.items()}, self.zero_shift)


def outliers(scores: Tensor, u: float) -> Tensor:
    """Which of the scores [C] lie more than `u` standard deviations above their mean, but never the lowest."""
    # One score has no deviation; the mean of equal scores may be rounded below them.
    deviation = scores.std() if len(scores) > 1 else 0.0
    return (scores > scores.mean() + u * deviation) & (scores > scores.min())


# Masks: ANP and RNP


class MaskPruning(Defense):
    """Learn a mask for every channel of the batch norms, and prune those with the lowest ones.

    Pruning sets the batch norm's scale to 0; its shift stays.
    """

    augment: bool = param(True, "crop and flip the clean images as in training")
    pruning_number: float | None = param(None, "fixed threshold (or number) to prune by; none searches for it", ge=0)
    pruning_max: float = param(0.90, "highest threshold (or number) that is tried", gt=0)
    pruning_step: float = param(0.05, "step of the search, which begins with 0", ge=0.001)
    acc_ratio: float = param(0.1, "share of the accuracy that the search may lose", ge=0, le=1)
    select: Select = param("defender", "who takes the level: held-back images, or (oracle) the ASR on the test sets")
    held_back: float = param(0.2, "share of each class's clean images that the defender searches by", gt=0, lt=1)

    @abstractmethod
    def learn(self, model: nn.Module, clean: Clean, batches: Batched, session: RunContext) -> ByNorm:
        """The masks. `clean` are the images to learn from in the order of the first pass, not augmented; `batches` are
        the same, augmented. `model` stays as it is."""

    def level(self, masks: ByNorm, value: float) -> PruningLevel:
        """The channels whose masks are up to the threshold `value`."""
        return PruningLevel(f"threshold {value:g}", {name: mask <= value for name, mask in masks.items()}, shift=False)

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        batch_norms(model, self.name)  # refuses a network without any before it trains
        clean, held = stack_batches(batches), None
        fixed = self.pruning_number if self.select == "defender" else None
        if fixed is None and self.select == "defender":
            clean, held = hold_out(*clean, self.held_back)
            batches = rebatch(*clean, batches)
        masks = self.learn(model, clean, batches, session)
        if fixed is not None:
            prune_fixed(model, self.level(masks, fixed), session)
            return
        count = int(self.pruning_max / self.pruning_step + 1e-9) + 1
        values = (round(i * self.pruning_step, 10) for i in range(count))  # without the rounding of the multiplication
        choose(model, [self.level(masks, value) for value in values], held, self.acc_ratio, session)


def by_norm(values: Tensor, norms: Norms) -> ByNorm:
    """[..., C] of all batch norms side by side as that of each one."""
    return dict(zip(norms, values.split([norm.num_features for norm in norms.values()], dim=-1), strict=True))


def masked_logits(model: nn.Module, norms: Norms, x: Pixels, mask: Tensor, noise: Tensor | float = 0.0) -> Logits:
    """Logits with scales w * (mask + xi) and shifts b * (1 + zeta) in `norms`, where noise [2, C] is (xi, zeta)."""
    factors = torch.stack([mask, torch.ones_like(mask)]) + noise
    changed = {}
    for name, (scale, shift) in by_norm(factors, norms).items():
        changed[f"{name}.weight"] = norms[name].get_parameter("weight") * scale
        changed[f"{name}.bias"] = norms[name].get_parameter("bias") * shift
    return functional_call(model, changed, (x,), tie_weights=False)


def learn_masks(
    norms: Norms, losses: Callable[[Tensor, Pixels, Labels], dict[str, Tensor]], batches: Batched, sgd: Training,
    session: RunContext, label: str, rate: str, **kept: Any,
) -> ByNorm:  # fmt: skip
    """Masks from 1 down the `loss` that `losses` (mask [C], x, y) reports, clamped to [0, 1] after every update.

    `sgd` has a constant rate. `label` and `rate` are those of `loop.run`; checkpoints hold what is `kept`, too.
    """
    mask = nn.Parameter(torch.cat([torch.ones_like(norm.get_parameter("weight")) for norm in norms.values()]))
    descent = sgd.descent([mask], len(batches))

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        report = losses(mask, x, y)
        descent(report["loss"])
        with torch.no_grad():
            mask.clamp_(0, 1)
        return {**report, "mask": mask.mean()}

    state = {**kept, "masks": nn.ParameterList([mask]), "descent": descent}
    loop.run(step, batches, sgd.epochs, state=state, session=session, label=label, rate=rate)
    return by_norm(mask.detach(), norms)
