"""What defenses that prune have in common: batch norms, levels, and the choice of how much to prune.

A level is one way to prune, and levels are ordered: each prunes what the ones before it prune, and more.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sau.defense.held import Held, chance, guesses, named
from sau.defense.hooks import require_plain_weight
from sau.errors import ConfigError, TrainingError
from sau.evaluate import Score, score
from sau.loop import Session

Norms = dict[str, nn.BatchNorm2d | nn.SyncBatchNorm]
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
CHECKED = 500  # pictures that tell whether a network guesses
MOST_LEVELS = 1000  # that a search may try


@dataclass(frozen=True)
class Level:
    """One way to prune.

    Args:
        name: what to call it, like `threshold 0.35`.
        pruned: for each layer, by its name, which channels [C] go.
    """

    name: str
    pruned: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """How many channels go."""
        return sum(int(flags.sum()) for flags in self.pruned.values())

    @property
    def everything(self) -> bool:
        """Whether some layer would lose all of its channels, after which nothing reaches the logits."""
        return any(bool(flags.all()) for flags in self.pruned.values())


def up_to(name: str, masks: Mapping[str, Tensor], most: float) -> Level:
    """The channels whose masks, [C] by the layer's name, are `most` or less."""
    return Level(name, {layer: mask <= most for layer, mask in masks.items()})


def batch_norms(model: nn.Module, method: str, *, running: bool = False) -> Norms:
    """The batch norms with scales and shifts (and, if asked, with running statistics) of `model` by name.

    ConfigError if it has none, for `method` prunes channels.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, NORMS)}
    found = {name: norm for name, norm in found.items() if norm.affine and norm.bias is not None}
    found = {name: norm for name, norm in found.items() if not (running and norm.running_var is None)}
    if not found:
        kind = "BatchNorm2d with running statistics" if running else "BatchNorm2d"
        raise ConfigError(f"the network has no batch norm ({kind}), whose channels {method} prunes; try ft or sau")
    scales = {id(require_plain_weight(norm, method).weight) for norm in found.values()}
    if len(scales) < len(found):
        raise ConfigError(f"batch norms of the network share weights, but {method} prunes each of them; try ft or sau")
    return found


def sweep(most: float, step: float) -> list[float]:
    """What a search tries: 0, `step`, 2 `step` and so on up to `most`, without the noise of the multiplication."""
    return [round(i * step, 10) for i in range(int(most / step + 1e-9) + 1)]


def coarse(most: float, step: float) -> tuple[bool, str]:
    """Whether a sweep tries no more than it may, each value being a network to measure, and what is allowed."""
    least = most / MOST_LEVELS
    return step >= least, f"{least:g} and more"


@torch.no_grad()
def silence(layer: nn.Module, pruned: Tensor, *, shift: bool) -> None:
    """Zero the weights of the `pruned` channels [C] of a layer, and their biases if asked."""
    layer.get_parameter("weight")[pruned] = 0
    if shift:
        layer.get_parameter("bias")[pruned] = 0


def apply(model: nn.Module, level: Level, *, shift: bool) -> None:
    """Silence what `level` names, layer by layer."""
    for name, pruned in level.pruned.items():
        silence(model.get_submodule(name), pruned, shift=shift)


@contextmanager
def undone(model: nn.Module) -> Iterator[None]:
    """Whatever happens to the weights inside is undone at the end."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    try:
        yield
    finally:
        for name, tensor in model.state_dict().items():
            if name in before:
                tensor.copy_(before[name])


def choose(
    model: nn.Module,
    levels: Sequence[Level],
    prune: Callable[[Level], None],
    held: Held | None,
    tolerance: float,
    session: Session,
    *,
    oracle: bool,
    by_asr: bool = True,
) -> Level | None:
    """Prune `model` in place by one of `levels`, or not at all where none is allowed; returns the level taken.

    A level is allowed while (ACC_0 - ACC) / ACC_0 <= `tolerance` (the benchmark: |.| <), with ACC_0 of the unpruned
    network; a defender allows none where ACC is no more than chance, and none at all where ACC_0 is.

    Args:
        model: in eval mode.
        levels: from the mildest to the hardest; equal ones are measured once.
        prune: applies a level to `model` in place.
        held: clean pictures that ACC is measured on; the oracle needs none.
        tolerance: share of the accuracy that may be lost.
        session: says what was chosen; its `judge` scores for the oracle, whose search ends at its `limit`.
        oracle: test ACC and ASR choose the lowest ASR of the allowed levels, as in the benchmark; else the hardest
            level counts before the first that is not allowed.
        by_asr: False is an oracle that goes by the defender's rule on test ACC.
    """
    search, judge = oracle and by_asr, _judge(held, session, oracle)
    first = best = judge(model)
    chosen, tried = None, _harder_and_harder(levels)
    least = -1.0 if oracle or held is None else chance(held)
    if held is not None and not oracle and guesses(held, first.acc.percent, least, session):
        return chosen
    for number, level in enumerate(tried, 1):
        if oracle and session.time_is_up(f"the search, before level {number} of {len(tried)}"):
            break
        found = _tried(model, level, prune, judge)
        allowed = first.acc.percent - found.acc.percent <= tolerance * first.acc.percent and found.acc.percent > least
        if not (allowed or search):
            break
        if allowed and (not search or (found.asr and best.asr and found.asr.percent < best.asr.percent)):
            chosen, best = level, found
    if chosen is None:
        wanted = f"{'lowers the ASR and ' if search else ''}keeps the accuracy within {tolerance:g}"
        session.say(f"warning: nothing is pruned: no level that was tried {wanted} of {first.acc.percent} %")
    else:
        whose = named(None if oracle else held)
        prune_and_say(chosen, prune, session, f"{whose} {first.acc.percent} -> {best.acc.percent} %")
    return chosen


def _harder_and_harder(levels: Sequence[Level]) -> list[Level]:
    """Those that prune more than the one before, up to the first that would leave nothing of some layer."""
    found, count = [], 0
    for level in levels:
        if level.everything:
            break
        if level.count != count:
            found.append(level)
        count = level.count
    return found


def _tried(
    model: nn.Module, level: Level, prune: Callable[[Level], None], judge: Callable[[nn.Module], Score]
) -> Score:
    """What `model` scores with a level pruned; afterwards it is as it was."""
    with undone(model):
        prune(level)
        return judge(model)


def _judge(held: Held | None, session: Session, oracle: bool) -> Callable[[nn.Module], Score]:
    if oracle and session.judge is not None:
        return session.judge
    if oracle or held is None:
        raise TypeError("an oracle chooses by the judge of its session, a defender by held-back pictures; give them")
    return partial(score, clean=(held.x, held.y), triggered=None)


@torch.no_grad()
def prune_checked(
    model: nn.Module, level: Level, prune: Callable[[Level], None], seen: tuple[Tensor, Tensor] | None, session: Session
) -> None:
    """Prune `model`, in eval mode, by the one level that a setting says.

    TrainingError, with the network as it was, if it leaves nothing: no channel of some layer, or, of a network that
    is nearer to all right on `seen` than to guessing, one that guesses: it is right no more often than who always says
    the commonest class. Where a method looks at no pictures, `seen` is None and nobody asks.
    """
    if seen is not None and not level.everything:
        x, y = seen[0][:CHECKED], seen[1][:CHECKED]
        with undone(model):
            before = int((model(x).argmax(1) == y).sum())
            prune(level)
            after = int((model(x).argmax(1) == y).sum())
        guess = int(y.bincount().max())
        if after <= guess and before - guess > len(y) - before:
            raise TrainingError(
                f"{level.name} would prune {level.count} channels and leave a network that guesses ({before} -> "
                f"{after} of {len(y)} pictures right); prune less"
            )
    prune_and_say(level, prune, session)


def prune_and_say(level: Level, prune: Callable[[Level], None], session: Session, accuracy: str = "") -> None:
    """Prune by one level; TrainingError, with the network as it was, if a layer would lose all of its channels."""
    if level.everything:
        lost = ", ".join(name for name, flags in level.pruned.items() if flags.all())
        raise TrainingError(f"{level.name} would prune every channel of {lost}; prune less")
    prune(level)
    session.say(f"pruned {level.count} channels ({level.name})" + (f": {accuracy}" if accuracy else ""))
