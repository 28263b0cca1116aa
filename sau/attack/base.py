"""What every attack does: choose pictures, stamp and relabel them, train the victim."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.checks import check_victim
from sau.attack.labelling import Labelling
from sau.attack.making import Making
from sau.data.augment import Augment
from sau.data.images import BACKDOOR, Batches, Images, quantise, to_float
from sau.errors import ConfigError
from sau.evaluate import Share, percent_right
from sau.loop import Session
from sau.models import explain_batchnorm_error, grad_enabled, require_tensor
from sau.optim import Training
from sau.runtime.graphs import MicroBatchedStep
from sau.seeds import check_seed, seeded
from sau.types import Bytes, Labels, Pixels, of_floats

GATE = 85.0  # percent: the least gate of any attack on CIFAR-10 (WaNet's), for all other data sets


@dataclass(frozen=True, kw_only=True)
class Attack(Labelling, ABC):
    """An attack is its `stamp`; the rest is common."""

    gates: ClassVar[Mapping[str, float]] = {}  # least ASR in percent, by data set; GATE where none stands
    remedy: ClassVar[str] = "more --epochs or a larger --pratio"  # what to try below the gate
    compiles: ClassVar[bool] = True
    graph_safe: ClassVar[bool] = True
    trains_trigger: ClassVar[bool] = False  # together with the victim, so that its test set changes
    costly: ClassVar[bool] = False  # its trigger takes minutes to make
    trigger: ClassVar[nn.Module | None] = None  # what `forge` made, on an attack that needs it

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.stamp = of_floats(cls.stamp)  # type: ignore[method-assign]

    @abstractmethod
    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        """Put the trigger on every picture: [0, 1] in and out, differentiable, `x` left as it was.

        Args:
            x: pictures [B, C, H, W] at the network's resolution.
            test: the trigger of the test set, where an attack has another one there.
        """

    @final
    def forge(
        self,
        images: Images,
        blank: nn.Module,
        recipe: Training,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        session: Session | None = None,
    ) -> "Attack":
        """This attack with a trigger that has to be drawn or trained first; most have nothing to make. See `Making`."""
        self.check(images)  # before a trigger is made, which may take long
        trigger = self.make_trigger(Making(images, blank, recipe, augment, seed, session))
        return self if trigger is None else self.with_trigger(trigger.to(images.pixels.device))

    def make_trigger(self, given: Making) -> nn.Module | None:
        """What `forge` gives this attack to stamp with; None where there is nothing to make."""
        return None

    @final
    def made(self) -> nn.Module:
        """The trigger that `forge` made; ConfigError before that."""
        if self.trigger is None:
            raise ConfigError(f"{self.name} has no trigger yet; take the attack that its forge(...) returns")
        return self.trigger

    @property
    def figures(self) -> Mapping[str, float]:
        """What was measured while `forge` made the trigger, by name; empty where nothing was."""
        return getattr(self.trigger, "figures", {})

    @final
    def with_trigger(self, trigger: nn.Module) -> "Attack":
        """A copy of this attack that stamps with `trigger`, whose tensors a record keeps."""
        ready = copy.copy(self)
        object.__setattr__(ready, "trigger", trigger)
        return ready

    @final
    def gate(self, dataset: str, asr: Share | None) -> dict[str, Any] | None:
        """`{"asr": least ASR in percent, "passed": whether the attack has it}`, as `summary.json` stores it.

        None where no gate holds: without an ASR, without poisoned images, and for label rules other than all2one,
        whose ASR is bounded by the accuracy.
        """
        if asr is None or self.pratio == 0 or self.attack_label_trans != "all2one":
            return None
        least = self.gates.get(dataset, GATE)
        return {"asr": least, "passed": asr.percent >= least}

    def crossed(self, images: Images) -> Images | None:
        """Pictures with a trigger that must do nothing, as the attack trains some to; None where it trains none."""
        return None

    def poison_train(self, images: Images, seed: int) -> Images:
        """Stamp and relabel round(pratio * N) pictures; the same ones for the same seed, as in the benchmark."""
        check_seed(seed, 2**32)  # numpy's
        if (count := self.check(images)) == 0:
            return images
        candidates = self.candidates(images)
        order = np.random.RandomState(seed).permutation(len(candidates))  # the benchmark's generator and its draw
        rows = candidates[torch.from_numpy(order[:count]).to(candidates.device)]
        return images.replace_rows(self.poisoned(images[rows]), rows)

    def poison_test(self, images: Images) -> Images:
        """The test set of ASR and R-ACC: triggered and relabelled, without pictures that have that label already."""
        self.check_labels(images)
        wanted = self.relabel(images.true_labels, images.num_classes)
        return self.poisoned(images[(wanted != images.true_labels).nonzero().flatten()], test=True)

    @final
    def poisoned(self, images: Images, *, test: bool = False) -> Images:
        """All of these pictures with the trigger and the label the attacker wants; ConfigError if it changes none."""
        pixels = self.stamped(images, test=test)
        if len(images) and torch.equal(pixels, images.pixels):
            raise ConfigError(f"the trigger changes none of {len(images)} pictures; give {self.name} one that shows")
        return replace(
            images,
            pixels=pixels,
            labels=self.relabel(images.true_labels, images.num_classes),
            role=torch.full_like(images.role, BACKDOOR),
        )

    @torch.no_grad()
    def stamped(self, images: Images, *, test: bool) -> Bytes:
        """The pixels of `images` with the trigger, 8 bits deep, made in blocks."""
        blocks = [quantise(self.stamp(to_float(block), test=test)) for block in images.pixels.split(1000)]
        return torch.cat(blocks)

    def examples(self, trained_on: Images) -> Images:
        """The poisoned training pictures that a record keeps, from those that the victim was trained on."""
        return trained_on[(trained_on.role > 0).nonzero().flatten()]

    def plan(self, trained_on: Images, batch_size: int) -> str:
        """What is poisoned, in a line; of clean-label attacks both shares that are called the poisoning ratio."""
        poisoned = trained_on.role > 0
        labels, count = trained_on.labels[poisoned].unique().tolist(), int(poisoned.sum())
        changed = int((trained_on.labels != trained_on.true_labels).sum())
        of = 100 * count / int((trained_on.labels == labels[0]).sum()) if len(labels) == 1 and not changed else None
        of_class = "" if of is None else f" ({of:.4g} % of class {labels[0]})"
        return f"{count} of {len(trained_on)} pictures poisoned{of_class}, {changed} labels changed"

    def augmentation(self, offered: Augment | None) -> Augment | None:
        """What a batch goes through before `compose`."""
        return offered

    def prepare(self, model: nn.Module, recipe: Training, steps: int) -> dict[str, Any]:
        """What changes during training; `steps` updates make an epoch."""
        return {"model": model, "descent": recipe.descent(model.parameters(), steps)}

    def compose(self, state: dict[str, Any], x: Pixels, y: Labels) -> tuple[Pixels, Labels]:
        """What a batch becomes before `step`. Whatever is random is drawn here, so that CUDA may repeat `step`."""
        return x, y

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """Plain supervised learning of whatever labels the pictures carry."""
        logits = require_tensor(state["model"], state["model"](x))
        loss = F.cross_entropy(logits, y)
        state["descent"](loss)
        return {"loss": loss, "train_acc": percent_right(logits, y)}

    def classifier_epochs(self, recipe: Training) -> int:
        """How many epochs of the recipe train the classifier."""
        return recipe.epochs

    def supports_microbatch(self) -> bool:
        return type(self).step is Attack.step

    @final
    def fit(
        self,
        model: nn.Module,
        images: Images,
        recipe: Training,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        session: Session | None = None,
        progress: bool = True,
    ) -> nn.Module:
        """Train `model` in place on pictures from `poison_train`; returns it in eval mode.

        Args:
            model: pixels in [0, 1] -> logits.
            images: on the device of the model.
            recipe: epochs, batch size, optimiser and schedule.
            augment: applied to each batch anew.
            seed: of the order, the augmentation and whatever is drawn while training; the weights are the caller's.
            session: output and checkpoints.
            progress: print a line an epoch, with a bar in terminals and notebooks; False prints only warnings.
        """
        check_victim(model, images)
        session = session or Session()
        session = session if progress else session.quiet()
        first = self.augmentation(augment)
        batches = images.batches(recipe.batch_size, seed=seed, augment=first, drop_last=not self.in_batch)
        with grad_enabled(images.pixels.device), seeded(seed), explain_batchnorm_error():
            self.train(model.train(), images, batches, recipe, augment, session)
        model.zero_grad()  # or the caller's first step would make the last one again
        return model.eval()

    def train(
        self, model: nn.Module, images: Images, batches: Batches, recipe: Training, augment: Augment | None,
        session: Session,
    ) -> None:  # fmt: skip
        """The epochs of `fit`: `step` on every batch."""
        state = self.prepare(model, recipe, len(batches)) | {"images": images, "augment": augment}  # for `in_batch`
        step = MicroBatchedStep(
            self.step, state, session, supports_microbatch=self.supports_microbatch(), graph_safe=self.graph_safe,
            compose=self.compose,
        )  # fmt: skip
        loop.run(step, batches, recipe.epochs, state=state, end_epoch=partial(self.end_epoch, state), session=session)
