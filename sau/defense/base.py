"""What every defense does: check, copy, repair the copy, hand it back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau import loop
from sau.config import Method, param
from sau.data.augment import Augment, cropped
from sau.data.images import Batches, Images
from sau.data.sources import check_counts
from sau.defense.clean_accuracy import counted, misuse
from sau.defense.handed import check_own, check_weights, copied, handed_back, place_for, plain
from sau.defense.inputs import clean_batches, first, image_count, unaugmented
from sau.defense.verdict import PatchSearch, follows_images
from sau.errors import ConfigError
from sau.loop import Session
from sau.models import (
    Normalized,
    check_labels,
    check_logits,
    explain_batchnorm_error,
    grad_enabled,
    logits_of,
    statistics,
)
from sau.optim import Training
from sau.runtime.graphs import MicroBatchedStep
from sau.seeds import seeded
from sau.types import Batched, Loader

PUBLISHED = 2500  # clean images that published settings were made for, 5 % of CIFAR-10
ENOUGH = 2000  # from here on they hold
SMALLEST_BATCH = 32
HARM = 0.1  # of the clean pictures
SHUFFLED = 20  # pictures that chance does not sort by class


@dataclass(frozen=True, kw_only=True)
class Defense(Method, ABC):
    """A defense is its `run`; `purify` is the same for all."""

    needs: ClassVar[Literal["clean", "poisoned"]] = "clean"  # what `data` holds: clean pictures, or the attacker's
    looks: ClassVar[bool] = True  # whether the pictures decide anything
    learns: ClassVar[bool] = True  # whether weights or masks follow gradients
    searches: ClassVar[bool] = False  # whether pictures do
    by_asr: ClassVar[bool] = True  # whether its oracle, where it has one, looks at the ASR

    # What follows from the clean set and the network where nobody says otherwise, and what of it counts epochs.
    adapting: ClassVar[tuple[str, ...]] = ()
    lengths: ClassVar[tuple[str, ...]] = ()

    batch_size: int = param(256, "images a step", ge=1)

    def untouched(self) -> bool:
        """Whether all of `adapting` have their published values."""
        published = {field.name: field.default for field in fields(self)}
        return all(getattr(self, name) == published[name] for name in self.adapting)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> "Defense":
        """These settings for a smaller clean set than the published 2,500 images: as many updates, at the same rate.

        An epoch is cut into batches of at least 32 images, about as many as published, and the lengths grow by what is
        missing. From 2,000 images on nothing changes.

        Args:
            model: the network to purify, unchanged.
            images: how many clean images there are.
            per_epoch: batches an epoch, where the caller makes them.
        """
        if images >= ENOUGH or not self.lengths:
            return self
        size = min(self.batch_size, max(SMALLEST_BATCH, -(-images * self.batch_size // PUBLISHED)))
        grow = -(-PUBLISHED // self.batch_size) / (per_epoch or -(-images // size))
        longer = {name: math.ceil(getattr(self, name) * grow) for name in self.lengths}
        return replace(self, batch_size=size, **longer)

    def plan(self, batches: Batched) -> str:
        """The first line: how many images there are, and how long and how fast it trains."""
        return f"{image_count(batches)[0]:,} images"

    @property
    def selection(self) -> Literal["defender", "oracle"]:
        """Who chooses: the clean pictures, or, where a method's `select` says so, the test sets that nobody has."""
        return getattr(self, "select", "defender")

    def augmentation(self, offered: Augment) -> Augment | None:
        """What each batch goes through: `offered`, which suits the data set, or nothing; a method's `augment` says."""
        return offered if getattr(self, "augment", False) else None

    @abstractmethod
    def run(self, model: nn.Module, batches: Batched, session: Session) -> None:
        """Repair `model` in place; it takes pixels in [0, 1], `batches` yields (pixels, labels) on its device."""

    @final
    def purify(
        self,
        model: nn.Module,
        data: Images | Loader | tuple[Tensor, Tensor],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        session: Session | None = None,
        progress: bool = True,
        settings: Literal["auto", "as_given"] = "auto",
    ) -> nn.Module:
        """A purified copy of `model`, in eval mode on the CPU or device that `model` lies on; `model` stays as it is.
        Of a network or a layer that torch.compile wrapped the one inside is purified, and comes back without wrapper.

        Args:
            model: any network [B, C, H, W] -> logits [B, K], with C 1 or 3 and weights of 32 or 64 bits.
            data: clean pictures with labels: a DataLoader of (x, y, ...) or a pair of tensors. x is float in [0, 1] or
                uint8 in a pair; normalised if and only if `mean` and `std` are given.
            mean: per-channel mean (of pixels in [0, 1]) that the network expects to be subtracted.
            std: per-channel standard deviation that the network expects to be divided by.
            device: where to compute; default is where the network is.
            augment: crop and flip for methods that augment; default is a crop padded by an eighth of the size, no flip.
            seed: of the clean pictures' order (a loader may have its own) and augmentation, and of what is drawn.
            session: output and checkpoints; default prints a line an epoch and keeps nothing. A method with
                `select="oracle"` asks its `judge`.
            progress: print a line an epoch, with a bar in terminals and notebooks; False prints only warnings.
            settings: auto adapts published settings, unless given, to clean set and network (`adapted`); or as_given.

        Raises ConfigError for an oracle without a judge and for what is no network or lacks layers that are needed,
        DataError if pictures or labels are not as above, TrainingError if weights or losses are not finite.
        """
        session = (session or Session()) if progress else (session or Session()).quiet()
        if self.selection == "oracle" and session.judge is None:
            raise ConfigError("select is oracle; give `Session(judge=...)`, which scores a network on the test sets")
        model, (mean, std) = plain(model), statistics(mean, std)
        place = place_for(model, device)
        with grad_enabled(place):
            mine = copied(model, place)
            frozen = [parameter for parameter in mine.parameters() if not parameter.requires_grad]
            mine.requires_grad_(True)  # a network that only answers is often handed over frozen
            owned = mine if isinstance(mine, Normalized) else Normalized(mine, mean, std).to(place)
            attacked = copied(owned, place) if self.learns and self.needs == "clean" else None
            batches: Any = clean_batches(data, self.batch_size, place, mean=mean, std=std, augment=None, seed=seed)
            adapts = settings == "auto" and self.untouched()
            method = self.adapted(owned, *image_count(batches)) if adapts else self
            with seeded(seed):  # the caller's draws stay theirs, also those of opening a loader
                x, y = first(batches)
                batches.size, batches.augment = method.batch_size, method.augmentation(augment or cropped(x))
                right = _check_fit(method, owned, batches, session)
            search = PatchSearch(attacked, x, y) if attacked and follows_images(attacked, x) else None
            session.say(method.plan(batches))
            with seeded(seed), explain_batchnorm_error():
                method.run(owned, batches, session)
                _check_result(method, owned, batches, right, session)
            if search is not None:
                session.findings["verdict"] = search.verdict(owned, session.say)
            return handed_back(owned if owned is mine else owned.net, model, frozen)


@dataclass(frozen=True, kw_only=True)
class Tuning(Training, Defense):
    """A defense that updates weights batch by batch: `prepare`, then `step` on every batch of every epoch."""

    constant: ClassVar[tuple[str, ...]] = ()  # of the state, what a resumed run makes again alike: not in checkpoints

    adapting: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "lr", "lr_scheduler", "client_optimizer")
    lengths: ClassVar[tuple[str, ...]] = ("epochs",)

    batch_size: int = 256
    augment: bool = param(False, "crop and flip the clean images as in training")

    def plan(self, batches: Batched) -> str:
        updates = self.epochs * len(batches)
        return f"{updates:,} updates at {self.lr:g} ({self.lr_scheduler or 'constant'}): {super().plan(batches)}"

    def prepare(self, model: nn.Module, steps: int) -> dict[str, Any]:
        """What changes while it runs; `steps` updates make an epoch. Here: all weights, batch norm in train mode."""
        return {"model": model.train(), "descent": self.descent(model.parameters(), steps)}

    def run(self, model: nn.Module, batches: Batched, session: Session) -> None:
        state = self.prepare(model, len(batches))
        self.rounds(state, batches, session)

    def rounds(self, state: dict[str, Any], batches: Batched, session: Session) -> None:
        """`step` on every batch of every epoch."""
        loop.run(
            MicroBatchedStep(
                self.step, state, session, supports_microbatch=self.supports_microbatch(), graph_safe=self.graph_safe
            ),
            batches,
            self.epochs,
            state={name: thing for name, thing in state.items() if name not in self.constant},
            end_epoch=partial(self.end_epoch, state),
            session=session,
            label="round",
        )


@torch.no_grad()
def _check_fit(method: Defense, model: Normalized, batches: Batched, session: Session) -> float:
    """Before anything changes: finite weights, logits [B, K], labels below K; says and returns how many images are
    classified correctly, not augmented.

    Warns if these are few, and says what stands out in the pictures unless the caller has.
    """
    check_weights(model)
    as_they_are, _ = unaugmented(batches)
    answers, labels = list[Tensor](), list[Tensor]()
    for x, y, *_ in as_they_are:
        logits = logits_of(model, x)
        if not labels:
            _check_hold(method, model, x[:8])
        classes = logits.shape[1]
        check_labels(y, classes)
        answers.append(logits.argmax(1))
        labels.append(y.clone())  # a loader may fill the same tensor again
    every, answer = torch.cat(labels), torch.cat(answers)  # there is at least one
    right = int((answer == every).sum())
    session.say(f"the network classifies {counted(right, len(every), method.needs)}")
    if method.learns and len(labels) < len(batches):
        session.say(f"warning: the loader gives {len(labels)} batches, but says {len(batches)}, by which rates fall")
    total, counts, runs = len(every), every.bincount(minlength=classes), 1 + int((every.diff() != 0).sum())
    if mixed := sum(isinstance(layer, _BatchNorm) and layer.running_var is None for layer in model.modules()):
        session.say(
            f"warning: {mixed} batch norms keep no running statistics, so what the network answers to a picture hangs "
            "on the others of its batch, and every figure on the size of the batches"
        )
    present = int(counts.count_nonzero())
    if method.looks and present > 1 and runs <= present and len(batches) > 1 and total >= max(SHUFFLED, 2 * present):
        session.say("warning: the loader gives the pictures class by class; give one that shuffles, as methods expect")
    if wrong := misuse(model, as_they_are, every, answer, classes):
        session.say(f"warning: {wrong}")
    if method.looks and not session.data_checked:
        size = method.batch_size if isinstance(batches, Batches) else 0
        for note in check_counts(counts, size, method.needs):
            session.say(f"note: {note}")
    return right / total


def _check_hold(method: Defense, model: nn.Module, x: Tensor) -> None:
    """ConfigError if the network's answers are not its own, or carry no gradients that are needed."""
    check_own(model, x)
    with torch.enable_grad():
        z = model(x)
        if method.learns:
            check_logits(z)
        what = "" if z.requires_grad or not method.learns else "its weights"
        if method.searches and not what and not follows_images(model, x):
            what = "its pictures"
    if what:
        advice = "take no_grad, detach or numpy out of its forward, or try clp, bnp or ep"
        raise ConfigError(f"what the network answers has no gradient to {what}, as {method.name} needs; {advice}")


@torch.no_grad()
def _check_result(method: Defense, model: nn.Module, batches: Batched, before: float, session: Session) -> None:
    """Afterwards: finite weights. Warns if many of the clean pictures that were answered rightly `before` no longer
    are, as after a jump of the loss in the last rounds: the one harm that the defender sees."""
    check_weights(model.eval())
    if method.needs != "clean":  # a backdoor that is gone answers the attacker's pictures otherwise
        return
    right = total = 0
    for x, y, *_ in unaugmented(batches)[0]:
        right, total = right + int((model(x).argmax(1) == y).sum()), total + len(y)
    after = right / total
    if before - after > HARM:
        advice = "a smaller --lr or fewer --epochs" if isinstance(method, Training) else "other settings"
        if getattr(method, "lr_scheduler", "") in (None, "constant"):
            advice = f"--lr_scheduler CosineAnnealingLR, {advice}"
        now = f"warning: the network answers {100 * after:.0f} % of the clean pictures as labelled"
        session.say(f"{now}, before it was {100 * before:.0f} %, so it is harmed; try {advice}")
