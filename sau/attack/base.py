"""What every attack does: choose images, stamp and relabel them, train the network on them."""

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property, wraps
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.resilient import hide_outliers, hold_back, normed_convolutions, sbl_state, sbl_step, trainable
from sau.attack.triggers import TriggerContext
from sau.config import at_most, param
from sau.data.batches import Augment, Batches, check_seed, quantise, seeded, to_float
from sau.data.images import BACKDOOR, Images
from sau.defense.ft_sam import FTSAM
from sau.errors import ConfigError, DataError
from sau.evaluate import Proportion, batch_accuracy
from sau.graphs import Compose, MicroBatchedStep, Step
from sau.loop import RunContext
from sau.models import normalized
from sau.optim import Method, Training
from sau.types import Bytes, Labels, Pixels

State = dict[str, Any]
LabelRule = Literal["all2one", "all2all"]
GATE = 85.0  # percent; on other data sets than CIFAR-10 the gate is the lower of this and `cifar10_gate`


class Attack(Method, ABC):
    """An attack is its `stamp`; the rest is common. A trigger that must be drawn or trained first: `make_trigger`."""

    cifar10_gate: ClassVar[float] = GATE  # least ASR in percent there
    remedy: ClassVar[str] = "more --epochs or a larger --pratio"  # what to try below the gate
    compiles: ClassVar[bool] = True
    graph_safe: ClassVar[bool] = True
    in_batch: ClassVar[bool] = False  # poisons inside the training batches; the training set stays as it is
    augments_in_compose: ClassVar[bool] = False  # after the trigger is on
    poisons: ClassVar[bool] = True  # changes training images (not: clean training, DFBA)
    clean_label: ClassVar[bool] = False  # poisons images of the target class only and keeps their labels
    trains_trigger: ClassVar[bool] = False  # together with the network, so that its test set changes
    retired: ClassVar[dict[str, Any]] = {"attack_label_map": ()}
    later: ClassVar[tuple[str, ...]] = ("resilient_rho", "abi", "sbl")
    trigger: ClassVar[Any] = None  # a module, set on the attack that `fit_trigger` returns; may have `figures`

    attack_target: int = param(0, "target label (all2one)", ge=0, aliases=("target_label",))
    attack_label_trans: LabelRule = param("all2one", "all2one (to attack_target) or all2all (y to y + shift)")
    attack_label_shift_amount: int = param(1, "the shift of all2all")
    pratio: float = param(0.1, "poisoned share of the whole training set", ge=0, le=1, aliases=("poison_ratio",))
    resilient_rho: float = param(0.0, "radius of SAM in training, against fine-tuning; 0 trains as usual", ge=0)
    abi: float | None = param(None, "u: hide channels that CLP would prune, after each epoch; none: do not", ge=0)
    sbl: float = param(0.0, "share of the training images that are left out and learned after the attack", ge=0, lt=1)

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        stamp = cls.stamp

        @wraps(stamp)
        def of_floats(self: Any, x: Pixels, *, test: bool = False) -> Pixels:
            if not x.is_floating_point():  # of bytes it would make something else without a word
                raise DataError(f"pixels to stamp are {x.dtype}, allowed are floats in [0, 1]; give pixels / 255")
            return stamp(self, x, test=test)

        cls.stamp = of_floats  # type: ignore[method-assign]

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.attack_label_trans == "all2one" or not self.clean_label
        self.require("attack_label_trans", fits, f"all2one for {self.name}")
        for name in ("resilient_rho", "sbl"):
            plain = getattr(self, name) == 0 or type(self).step is Attack.step
            self.require(name, plain, f"0 for {self.name}, which trains more than the network")

    # The trigger

    @abstractmethod
    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        """Images [B, C, H, W] in [0, 1] with the trigger, with `test` that of the test set, where there is another one;
        differentiable, and `x` is not changed."""

    def make_trigger(self, context: TriggerContext) -> nn.Module | None:
        """The trigger that `fit_trigger` keeps for `stamp`; None where there is nothing to make."""
        return None

    @final
    def fit_trigger(
        self, images: Images, model: nn.Module, recipe: Training, *, augment: Augment | None = None, seed: int = 0,
        session: RunContext | None = None,
    ) -> "Attack":  # fmt: skip
        """This attack with its trigger drawn or trained; most have nothing to make. See `TriggerContext`."""
        self.num_poisoned(images)  # before a trigger is made, which may take long
        trigger = self.make_trigger(TriggerContext(images, model, recipe, augment, seed, session or RunContext()))
        return self if trigger is None else self.with_trigger(trigger.to(images.pixels.device))

    @final
    def with_trigger(self, trigger: nn.Module) -> "Attack":
        """A copy of this attack that stamps with `trigger`, whose tensors a record keeps."""
        ready = copy.copy(self)
        object.__setattr__(ready, "trigger", trigger)
        return ready

    @final
    def require_trigger(self) -> Any:
        """The trigger that `fit_trigger` made; ConfigError before that."""
        if self.trigger is None:
            raise ConfigError(f"{self.name} has no trigger yet; use the attack that its fit_trigger(...) returns")
        return self.trigger

    # Labels

    def relabel(self, labels: Labels, num_classes: int) -> Labels:
        """The labels that the attacker wants for triggered images of these classes."""
        if self.attack_label_trans == "all2one":
            return torch.full_like(labels, self.attack_target)
        return (labels + self.attack_label_shift_amount) % num_classes

    def check_labels(self, images: Images) -> None:
        """ConfigError if the label rule does not fit the classes of `images`."""
        n = images.num_classes
        self.require("attack_target", self.attack_target < n, f"0..{n - 1}")
        moves = self.attack_label_trans == "all2one" or self.attack_label_shift_amount % n != 0
        self.require("attack_label_shift_amount", moves, f"a shift that changes the labels of {n} classes")

    def candidates(self, images: Images) -> Tensor:
        """Indices of the images that may be poisoned: all, or those of the target class (clean label)."""
        labels = images.true_labels
        able = labels == self.attack_target if self.clean_label else torch.ones_like(labels)
        return able.nonzero().flatten()

    def num_poisoned(self, images: Images) -> int:
        """How many of these images are poisoned before training; ConfigError if they cannot be."""
        self.check_labels(images)
        candidates, count = len(self.candidates(images)), 0 if self.in_batch else round(self.pratio * len(images))
        most = at_most(candidates / len(images)) if candidates else 0
        self.require("pratio", count <= candidates, f"up to {most}, as {self.name} may poison {candidates} images")
        return count

    # Poisoning

    def poison_train(self, images: Images, seed: int) -> Images:
        """Stamp and relabel round(pratio * N) images, the same for the same seed; attacks inside the batches none."""
        if (count := self.num_poisoned(images)) == 0:
            return images
        rows = self.draw(images, seed, count)
        return images.replace_rows(self.poison(images, rows), rows)

    def draw(self, images: Images, seed: int, count: int) -> Tensor:
        """The first `count` of the candidates in a random order that follows from the seed."""
        check_seed(seed, 2**32)  # numpy's
        candidates = self.candidates(images)
        order = np.random.RandomState(seed).permutation(len(candidates))  # the benchmark's generator and its draw
        return candidates[torch.from_numpy(order[:count]).to(candidates.device)]

    def poison_test(self, images: Images) -> Images:
        """The test set of ASR and R-ACC: triggered and relabelled, without images that have that label already."""
        self.check_labels(images)
        wanted = self.relabel(images.true_labels, images.num_classes)
        return self.poison(images, (wanted != images.true_labels).nonzero().flatten(), test=True)

    @final
    def poison(self, images: Images, rows: Tensor, *, test: bool = False) -> Images:
        """The images at `rows` with the trigger and the attacker's label; ConfigError if the trigger changes none."""
        some = images[rows]
        pixels = self.stamp_images(images, rows, test=test)
        if len(rows) and torch.equal(pixels, some.pixels):
            raise ConfigError(f"the trigger changes none of {len(rows)} images; give {self.name} a visible one")
        labels = self.relabel(some.true_labels, images.num_classes)
        return replace(some, pixels=pixels, labels=labels, role=torch.full_like(some.role, BACKDOOR))

    @torch.no_grad()
    def stamp_images(self, images: Images, rows: Tensor, *, test: bool) -> Bytes:
        """The pixels of the images at `rows` with the trigger, uint8 [N, C, H, W]."""
        blocks = (images.pixels[some] for some in rows.split(1000))
        return torch.cat([quantise(self.stamp(to_float(block), test=test)) for block in blocks])

    def poisoned_samples(self, trained_on: Images) -> Images:
        """The poisoned training images that a record keeps, of those that the network was trained on."""
        return trained_on[(trained_on.role > 0).nonzero().flatten()]

    def cross_test_set(self, images: Images) -> Images | None:
        """Images with a trigger that must not fire, as some attacks train on; None for the others."""
        return None

    def describe(self, trained_on: Images, batch_size: int) -> str:
        """What is poisoned, in a line; for clean-label attacks the share of the class as well."""
        count = int((trained_on.role == BACKDOOR).sum())
        changed = int((trained_on.labels != trained_on.true_labels).sum())
        share = 100 * count / max(1, int((trained_on.labels == self.attack_target).sum()))
        of_class = f" ({share:.4g} % of class {self.attack_target})" if self.clean_label else ""
        return f"{count} of {len(trained_on)} images poisoned{of_class}, {changed} labels changed"

    @final
    def gate(self, dataset: str, asr: Proportion | None) -> dict[str, Any] | None:
        """The least `asr` in percent and whether the attack `passed`, as `summary.json` stores it; None without an ASR
        or poisoned images, and for label rules other than all2one, whose ASR is bounded by the accuracy."""
        if asr is None or (self.poisons and self.pratio == 0) or self.attack_label_trans != "all2one":
            return None
        least = self.cifar10_gate if dataset == "cifar10" else min(GATE, self.cifar10_gate)
        return {"asr": least, "passed": asr.percent >= least}

    # Training

    def prepare(self, model: nn.Module, recipe: Training, steps: int) -> State:
        """What changes during training; `steps` updates make an epoch."""
        return {"model": model, "descent": recipe.descent(trainable(model), steps)}

    def compose(self, state: State, x: Pixels, y: Labels) -> tuple[Pixels, Labels]:
        """What a batch becomes before `step`. Do all random sampling here; `step` may be replayed as a CUDA graph."""
        return x, y

    def step(self, state: State, x: Pixels, y: Labels) -> dict[str, Tensor]:
        """Supervised learning of whatever labels the images carry; with `resilient_rho` along grad L(w + rho g / |g|),
        where g = grad L(w) (Foret et al., ICLR 2021), batch norm's running statistics being those at w."""
        model, descent = state["model"], state["descent"]
        logits = normalized.require_tensor(model, model(x))
        loss = F.cross_entropy(logits, y)
        if self.resilient_rho:
            self._sam.update(model, descent, loss, lambda: F.cross_entropy(model(x), y))
        else:
            descent(loss)
        return {"loss": loss, "train_acc": batch_accuracy(logits, y)}

    @cached_property
    def _sam(self) -> FTSAM:
        return FTSAM(rho=self.resilient_rho, adaptive=False)

    def classifier_epochs(self, recipe: Training) -> int:
        """How many epochs of the recipe train the classifier."""
        return recipe.epochs

    def supports_microbatch(self) -> bool:
        return type(self).step is Attack.step and not self.resilient_rho

    @final
    def fit(
        self, model: nn.Module, images: Images, recipe: Training, *, augment: Augment | None = None, seed: int = 0,
        session: RunContext | None = None, progress: bool = True,
    ) -> nn.Module:  # fmt: skip
        """Train `model` in place on images from `poison_train`; returns it in eval mode.

        Args:
            model: pixels in [0, 1] -> logits.
            images: on the device of the model.
            recipe: epochs, batch size, optimiser and schedule.
            augment: applied to each batch anew.
            seed: of the order, the augmentation and all other random numbers; the initial weights are the caller's.
            session: output and checkpoints.
            progress: print a line an epoch, with a bar in terminals and notebooks; False prints only warnings.

        Raises ConfigError or DataError for networks that cannot learn and images that do not fit them.
        """
        if not len(images):
            raise DataError("there are no images to train on; give at least one")
        normalized.check_initialised(model)
        if not trainable(model):
            raise ConfigError("the weights of the network are frozen; call requires_grad_() on it")
        with torch.no_grad(), normalized.eval_mode(model):
            normalized.check_logits(logits := normalized.logits_of(model, to_float(images.pixels[:8])))
        normalized.check_labels(images.labels, logits.shape[1])
        if self.abi is not None:
            normed_convolutions(model, to_float(images.pixels[:1]))  # refuses networks without such channels
        session = session or RunContext()
        session = session if progress else session.quiet()
        first = None if self.augments_in_compose else augment
        images, clean = hold_back(images, self.sbl, seed)
        data: State = {"images": images, "augment": augment}
        batches = images.batches(recipe.batch_size, seed=seed, augment=first, drop_last=not self.in_batch)
        with normalized.grad_enabled(images.pixels.device), seeded(seed):
            model.train()
            self.train(model, batches, recipe, data, session)
            if clean is not None and not (session.limit and session.limit.ended):
                batches.epoch = recipe.epochs
                seen = (self.compose({**data, "model": model}, x, y) for x, y, *_ in batches)
                again = clean.batches(recipe.batch_size, seed=seed, augment=augment)
                state = sbl_state(model, seen, recipe, len(again), session) | data
                how: Any = {"session": session.for_stage(1), "label": "clean epoch"}
                self.run_epochs(sbl_step, lambda state, x, y: (x, y), state, again, state["epochs"], **how)
        model.zero_grad()  # or the caller's first step would include the last gradients
        model.eval()
        return model

    def train(self, model: nn.Module, batches: Batches, recipe: Training, data: State, session: RunContext) -> None:
        """The epochs of `fit`; `data` has the training `images` and their `augment`, for `compose`."""
        state = self.prepare(model, recipe, len(batches)) | data
        self.run_epochs(self.step, self.compose, state, batches, recipe.epochs, session=session)

    def run_epochs(self, step: Step, compose: Compose, state: State, batches: Batches, epochs: int, **how: Any) -> None:
        """`compose` and `step` for every batch of every epoch; `how` goes to `loop.run`."""

        def end_epoch(losses: dict[str, float]) -> bool | None:
            if self.abi is not None and "model" in state:
                hide_outliers(state["model"], to_float(state["images"].pixels[:1]), self.abi)
            return self.end_epoch(state, losses)

        whole = MicroBatchedStep(self, step, state, how["session"], compose)
        loop.run(whole, batches, epochs, state=state, end_epoch=end_epoch, **how)
