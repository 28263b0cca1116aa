"""What the pruning defenses share: levels and the choice among them, the hold-out, masks on batch norms, outliers."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sau import loop
from sau.config import param
from sau.data.images import last_of_each
from sau.defense.base import Defense
from sau.defense.hooks import forward_hooks, require_plain_weight
from sau.defense.inputs import first_batch
from sau.errors import ConfigError, TrainingError
from sau.evaluate import score
from sau.loop import RunContext
from sau.models import full_precision
from sau.optim import DESCENT, Training
from sau.types import Batched, Labels, Logits, Pixels

Clean = tuple[Tensor, Tensor]  # images [N, C, H, W] in [0, 1] and their labels [N]
Norms = dict[str, nn.BatchNorm2d | nn.SyncBatchNorm]  # by name
Scores = dict[str, Tensor]  # of each batch norm, by name: a number a channel [C], the higher the more suspicious
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
CHECKED = 500  # images that show whether a network guesses


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


def hold_out(x: Tensor, y: Tensor, share: float, session: RunContext) -> tuple[Clean, Clean]:
    """Split clean images into those to learn from and the last `share` of each class, to choose a level by.

    Every class keeps an image to learn from. Where no class has a second one, both parts are all images.
    """
    held = last_of_each(y, share)
    if not held.any():
        session.say("warning: no class has a second image to hold back, so the choice is by the images it learns from")
        return (x, y), (x, y)
    return (x[~held], y[~held]), (x[held], y[held])


def chance(held: Clean) -> float:
    """The accuracy, in percent, of always predicting the commonest class."""
    return 100 * int(held[1].bincount().max()) / len(held[1])


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


@contextmanager
def restore_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights may be changed; then they are as before."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    before = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(old)


def sweep(most: float, step: float) -> list[float]:
    """0, `step`, 2 `step` and so on up to `most`, without the rounding of the multiplication."""
    return [round(i * step, 10) for i in range(int(most / step + 1e-9) + 1)]


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
    defender measures ACC on `held` and takes the hardest level before the first that is not allowed; accuracies that
    are no more than chance allow none. The oracle, without `held`, takes the lowest ASR of all allowed levels by the
    session's `judge`, as in the benchmark, or without `by_asr` follows the defender's rule on the test ACC.
    """
    judge = session.judge if held is None else partial(score, clean=held, triggered=None)
    assert judge is not None  # `purify` refuses an oracle without one
    label, least = ("test ACC", -1.0) if held is None else ("held-back ACC", chance(held))
    search = held is None and by_asr
    first = best = judge(model)
    if first.acc.percent <= least:
        session.say(f"warning: nothing is pruned: {label} {first.acc.percent} % is no more than chance ({least:.4g} %)")
        return None
    chosen, count = None, 0
    for number, level in enumerate(levels, 1):
        place = f"the search, before level {number} of {len(levels)}"
        if level.emptied or (held is None and session.time_is_up(place)):
            break
        if level.count == count:  # no more than the one before
            continue
        count = level.count
        with restore_weights(model):
            prune(level)
            found = judge(model)
        allowed = first.acc.percent - found.acc.percent <= tolerance * first.acc.percent and found.acc.percent > least
        if not (allowed or search):
            break
        if allowed and (not search or (found.asr and best.asr and found.asr.percent < best.asr.percent)):
            chosen, best = level, found
    if chosen is None:
        wanted = f"{'lowers the ASR and ' if search else ''}keeps the accuracy within {tolerance:g}"
        session.say(f"warning: nothing is pruned: no level that was tried {wanted} of {first.acc.percent} %")
        return None
    prune(chosen)
    figures = f"{label} {first.acc.percent} -> {best.acc.percent} %"
    session.say(f"pruned {chosen.count} channels ({chosen.name}): {figures}")
    return chosen


@torch.no_grad()
def prune_fixed(model: nn.Module, level: PruningLevel, prune: Prune, clean: Clean | None, session: RunContext) -> None:
    """Prune `model`, in eval mode, by the one level that a setting gives.

    TrainingError, with the network as it was, if a layer would lose all channels, or if the network would guess on
    `clean` images that it now classifies well (nearer to all correct than to chance); None is not checked.
    """
    if level.emptied:
        raise TrainingError(f"{level.name} would prune every channel of {', '.join(level.emptied)}; prune less")
    if clean is not None:
        x, y = (part[:CHECKED] for part in clean)
        guess, before = int(y.bincount().max()), int((model(x).argmax(1) == y).sum())
        with restore_weights(model):
            prune(level)
            after = int((model(x).argmax(1) == y).sum())
        if after <= guess and before - guess > len(y) - before:
            what = f"leave a network that guesses ({before} -> {after} of {len(y)} images correct)"
            raise TrainingError(f"{level.name} would prune {level.count} channels and {what}; prune less")
    prune(level)
    session.say(f"pruned {level.count} channels ({level.name})")


Losses = Callable[[Tensor, Pixels, Labels], dict[str, Tensor]]  # (mask [C], x, y) -> what to report, with `loss`


class MaskedNorms:
    """`model` as a function of masks and perturbations of its batch norms, all of them side by side [C].

    Its weights are fixed and its buffers are copies, so `model` stays as it is. Weights that are loaded into `model`
    later count, as those of a checkpoint.
    """

    def __init__(self, model: nn.Module, norms: Norms) -> None:
        self.model, self.norms = model, norms
        self.fixed: dict[str, Tensor] = {}
        for name, module in model.named_modules():  # each module once, also one with two names
            prefix = f"{name}." if name else ""
            self.fixed |= {prefix + key: weight.detach() for key, weight in module.named_parameters(recurse=False)}
            self.fixed |= {prefix + key: buffer.clone() for key, buffer in module.named_buffers(recurse=False)}
        self.sizes = [norm.num_features for norm in norms.values()]

    def __call__(self, x: Pixels, mask: Tensor, noise: Tensor | None = None) -> Logits:
        """Logits with scale w * (mask + xi) and shift b * (1 + zeta), where noise [2, C] is (xi, zeta), or no noise."""
        xi, zeta = noise if noise is not None else (0.0, 0.0)
        scale, shift = self._concat("weight") * (mask + xi), self._concat("bias") * (1 + zeta)
        changed = {f"{name}.weight": part for name, part in self.split(scale).items()}
        changed |= {f"{name}.bias": part for name, part in self.split(shift).items()}
        return functional_call(self.model, {**self.fixed, **changed}, (x,), tie_weights=False)

    def _concat(self, name: str) -> Tensor:
        return torch.cat([norm.get_parameter(name).detach() for norm in self.norms.values()])

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """[C] of all batch norms as [C] of each one, by name."""
        return dict(zip(self.norms, values.split(self.sizes), strict=True))

    def learn(
        self, label: str, losses: Losses, batches: Batched, sgd: Training, session: RunContext, rate: str, **kept: Any
    ) -> dict[str, Tensor]:
        """Masks [C] of each batch norm, from 1 down the `loss` of `losses`, clamped to [0, 1] after every update.

        `label` and `rate` are those of `loop.run`; checkpoints hold what is `kept`, too.
        """
        mask = nn.Parameter(torch.ones_like(self._concat("weight")))
        descent = sgd.descent([mask], len(batches))

        def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
            report = losses(mask, x, y)
            descent(report["loss"])
            with torch.no_grad():
                mask.clamp_(0, 1)
            return {**report, "mask": mask.mean()}

        def end_epoch(losses: dict[str, float]) -> None:
            descent.end_epoch(losses["loss"])

        state = {**kept, "masks": nn.ParameterList([mask]), "descent": descent}
        loop.run(step, batches, sgd.epochs, state=state, end_epoch=end_epoch, session=session, label=label, rate=rate)
        return self.split(mask.detach())


@dataclass(frozen=True, kw_only=True)
class ChannelOutlierPruning(Defense):
    """Prune the channels whose score stands out in their layer: s_c > mean(s) + u * std(s).

    Pruning sets the batch norm's scale to 0, and with `zero_shift` its shift too.
    """

    gradients = "none"
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

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        with full_precision(model.eval()), torch.no_grad():  # the steps of bf16, 1/128, would show in a histogram
            scores = self.scores(model, batches)
        prune = partial(apply, model, shift=self.zero_shift)
        if self.select == "defender":
            first = first_batch(batches) if self.data_use != "none" else None
            prune_fixed(model, outliers(scores, self.u), prune, first, session)
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
