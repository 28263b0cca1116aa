"""What every defense does: check, copy, repair the copy, give it back."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.config import param
from sau.data.batches import SMALLEST_BATCH, Augment, Batches, clean_batches, count_batches, first_batch, seeded
from sau.data.images import Images
from sau.defense import checks
from sau.errors import require
from sau.evaluate import batch_accuracy
from sau.graphs import MicroBatchedStep
from sau.loop import RunContext
from sau.models import Normalized, PreActResNet18
from sau.models.normalized import grad_enabled, statistics
from sau.optim import Method, Optimizer, Schedule, Training
from sau.pgd import INIT_HELP, Ball, Init, Norm, require_radius
from sau.types import Batched, Labels, Loader, Pixels

PUBLISHED = 2500  # clean images that published settings were made for, 5 % of CIFAR-10
ENOUGH = 1900  # from here on they hold; 5 % of GTSRB's 39,209 are 1,960
EASY, EASY_ENOUGH = 0.95, 100  # a network that is right on more has an easy task, like digits, where 100 images do
UPDATES = 250  # of SAU and AT where their published settings do not hold
JUDGED = "defender, or oracle with `RunContext(judge=...)`, which scores a network on the test sets"
Select = Literal["defender", "oracle"]


def is_published(model: nn.Module) -> bool:
    """Whether it is PreAct-ResNet18, for which published settings were made."""
    return any(isinstance(module, PreActResNet18) for module in model.modules())


def weight_rate(model: nn.Module) -> float:
    """0.08 of the typical weight (root mean square, median over layers), 1e-4 to 3e-3: a rate for Adam."""
    scales = [p.detach().square().mean().sqrt() for p in model.parameters() if p.ndim > 1]
    typical = float(torch.stack(scales).median()) if scales else 0.0
    return float(f"{min(3e-3, max(1e-4, 0.08 * typical)):.1e}")


class Defense(Method, ABC):
    """A defense is its `run`; `purify` is the same for all."""

    data_use: ClassVar[Literal["none", "clean", "poisoned"]] = "clean"  # which images decide; poisoned: the attacker's
    gradients: ClassVar[Literal["none", "weights", "images"]] = "weights"  # images: also of the logits to the images
    few_suffice: ClassVar[bool] = False  # in an easy task: 143 removed BadNets and Blended in docs/results/digits.md
    lengths: ClassVar[tuple[str, ...]] = ()  # settings that count epochs

    batch_size: int = param(256, "images in a batch", ge=1)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> "Defense":
        """These settings for another network or clean set than PreAct-ResNet18 and the published 2,500 images.

        Here: with fewer than 1,900 images as many updates as published (`same_updates`). Methods with other rules have
        this method on their page.

        Args:
            model: the network to purify, unchanged.
            images: how many clean images there are.
            per_epoch: batches an epoch, where the caller makes them.
        """
        return self.same_updates(images, per_epoch) if images < ENOUGH else self

    def same_updates(self, images: int, per_epoch: int | None, **settings: Any) -> "Defense":
        """With these `settings`, smaller batches (of at least 32) and longer `lengths`: about as many updates as
        published."""
        if not self.lengths:
            return self
        size = self.batch_of(images, PUBLISHED)
        grow = -(-PUBLISHED // self.batch_size) / (per_epoch or count_batches(images, size))
        published = {**self.params(), **settings}
        lengths = {name: math.ceil(published[name] * grow) for name in self.lengths}
        return replace(self, **{**settings, **lengths, "batch_size": size})

    def batch_of(self, images: int, published: int) -> int:
        """As large a share of the `images` as a published batch is of `published` ones, but at least 32."""
        return min(self.batch_size, max(SMALLEST_BATCH, -(-images * self.batch_size // published)))

    def fitted(
        self, given: Mapping[str, Any], model: nn.Module, images: int, say: Callable[[str], None],
        per_epoch: int | None = None,
    ) -> "Defense":  # fmt: skip
        """`adapted`, but `self` if the user set a rate, schedule or optimiser, or anything that `adapted` changes; says
        which. A batch size of the user's stays, and the rest adapts to it. `given` are the settings that the user gave,
        by name, with the values that they would have otherwise."""
        rates, sized = {"lr", "min_lr", "lr_scheduler", "client_optimizer"}, "batch_size" in given
        plain = replace(self, **{name: given[name] for name in given.keys() & {*rates, "batch_size"}})
        batches = per_epoch or (count_batches(images, self.batch_size) if sized else None)
        adapted, before = plain.adapted(model, images, batches), plain.params()
        changed = {name: value for name, value in adapted.params().items() if value != before[name]}
        if batches:  # the user's
            changed.pop("batch_size", None)
        kept, to = given.keys() & {*rates, *changed}, f"to {images:,} images and this network"
        if kept and any(self.params()[name] != value for name, value in changed.items()):
            why = f"no setting is adapted {to}, because you gave {', '.join(sorted(kept))}"
            say(f"warning: the backdoor may stay: {why}")
        elif changed:
            say(f"adapted {to}: {', '.join(f'{name} {value}' for name, value in changed.items())}")
        if kept:
            return self
        return replace(adapted, batch_size=self.batch_size) if sized else adapted

    def plan(self, images: int, batches: Batched, right: float) -> str:
        """The line after the accuracy: how many images there are, and how long and how fast it trains; `right` is the
        share of them that the network classifies correctly."""
        enough = EASY_ENOUGH if self.few_suffice and right > EASY else ENOUGH
        few = images < enough and self.data_use == "clean"
        theirs = f"the results of {self.name} are for {PUBLISHED:,}"
        why = f", which are few: {theirs}; the accuracy may fall, and the backdoor may stay"
        return f"{images:,} images" + (why if few else "")

    @property
    def selection(self) -> Select:
        """Who chooses: the clean images, or, where a method's `select` says so, the test sets that nobody has."""
        return getattr(self, "select", "defender")

    @abstractmethod
    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        """Repair `model` in place; it takes pixels in [0, 1], `batches` yields (pixels, labels) on its device."""

    @final
    def purify(
        self, model: nn.Module, data: Images | Loader | tuple[Tensor, Tensor], *, mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None, device: torch.device | str | None = None, augment: Augment | None = None,
        seed: int = 0, session: RunContext | None = None, progress: bool = True,
        settings: Literal["auto", "as_given"] = "auto",
    ) -> nn.Module:  # fmt: skip
        """A purified copy of `model`, in eval mode, on its device, and without wrappers of torch.compile.

        Args:
            model: any network [B, C, H, W] -> logits [B, K], with C 1 or 3 and weights of 32 or 64 bits.
            data: clean images with labels: `Images`, a DataLoader of (x, y, ...) or a pair of tensors. x is uint8, or
                float in [0, 1], which is normalised if and only if `mean` and `std` are given.
            mean: per-channel mean (of pixels in [0, 1]) that the network expects to be subtracted.
            std: per-channel standard deviation that the network expects to be divided by.
            device: where to compute; default is where the network is.
            augment: crop and flip for methods that augment; default is a crop padded by an eighth of the size, no flip.
            seed: of the clean images' order (a loader may have its own), augmentation and random numbers.
            session: output and checkpoints; default prints and keeps nothing. `select="oracle"` asks its `judge`.
            progress: print a line an epoch, with a bar in terminals and notebooks; False prints only warnings.
            settings: auto adapts published settings to clean set and network, and says so, unless you give one that
                would change (but the batch size), or a rate, schedule or optimiser; or as_given.

        Raises ConfigError for a wrong argument, an oracle without a judge and what is no network or lacks layers that
        are needed, DataError if images or labels are not as above, TrainingError if weights or losses are not finite.
        """
        session = (session or RunContext()) if progress else (session or RunContext()).quiet()
        session.findings.clear()
        require("settings", settings, settings in ("auto", "as_given"), "auto or as_given")
        require("select", self.selection, self.selection == "defender" or session.judge is not None, JUDGED)
        model, stats = checks.unwrap(model), statistics(mean, std)
        device = torch.device(device if device is not None else next(model.parameters()).device)
        with grad_enabled(device):
            mine = checks.copy_to(model, device)
            frozen = [parameter for parameter in mine.parameters() if not parameter.requires_grad]
            mine.requires_grad_(True)  # networks for inference are often frozen
            owned = mine if isinstance(mine, Normalized) else Normalized(mine, *stats).to(device)
            data = (data.pixels, data.labels) if isinstance(data, Images) else data
            batches: Any = clean_batches(data, self.batch_size, device, stats, seed)
            x, y = first_batch(batches)
            compiled, owned.compiled = owned.compiled, False  # or each size of a check's batch takes a graph
            with seeded(seed):  # the caller's random numbers stay the caller's, also those of opening a loader
                judged = checks.check_gradients(self, owned, x)
                right, images = checks.check_before(self, owned, batches, session)
            attacked = checks.copy_to(owned, device) if judged else None
            per_epoch = None if isinstance(batches, Batches) else len(batches)
            given = {one.name: one.default for one in fields(self) if getattr(self, one.name) != one.default}
            method = self if settings == "as_given" else self.fitted(given, owned, images, session.say, per_epoch)
            batches.size = method.batch_size
            batches.augment = (augment or Augment(x.shape[-1] // 8)) if getattr(method, "augment", False) else None
            session.say(method.plan(images, batches, right))
            with seeded(seed):
                twice = checks.check_cost(method, owned, x, batches, images, judged, session.say)
                owned.compiled = compiled
                method.run(owned, batches, session)
                checks.check_after(method, owned, batches, right, session)
            if attacked is not None and (found := checks.verdict_of(attacked, owned, x, y, session.say)):
                session.findings["verdict"] = found
            if twice:
                owned.net.set_grad_checkpointing(False)  # type: ignore[operator]
            return checks.restore(owned if owned is mine else owned.net, model, frozen)


class TrainingDefense(Training, Defense):
    """`prepare`, then `step` on every batch of every epoch; here they are plain fine-tuning."""

    lengths: ClassVar[tuple[str, ...]] = ("epochs",)
    graph_safe: ClassVar[bool] = True

    batch_size: int = 256
    augment: bool = param(False, "crop and flip the clean images as in training")

    def plan(self, images: int, batches: Batched, right: float) -> str:
        updates = f"{self.epochs * len(batches):,} updates at {self.lr:g} ({self.lr_scheduler or 'constant'})"
        # The search of SAU's patches takes a minute or two on a CPU, without a word.
        first = "; first, patches are searched" if getattr(self, "patches", 0) else ""
        return f"{updates}: {super().plan(images, batches, right)}{first}"

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        """What changes while it runs; an epoch goes through `batches`. Here: all weights, batch norm in train mode.

        A name that begins with `_` is of what a resumed run makes anew, so that checkpoints do not hold it.
        """
        return {"model": model.train(), "descent": self.descent(model.parameters(), len(batches))}

    def supports_microbatch(self) -> bool:
        return type(self).step is TrainingDefense.step

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        logits = state["model"](x)
        loss = F.cross_entropy(logits, y)
        state["descent"](loss)
        return {"loss": loss, "clean_acc": batch_accuracy(logits, y)}

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        # Without an update the network would be left with what `prepare` made of it, like a random classifier.
        fresh = session.limit is not None and session.last_checkpoint is None
        if fresh and session.time_is_up("round 1, before its first batch"):
            session.say("warning: no update was made, so the network is unchanged; give more --max_minutes")
        elif self.epochs:
            self.train(self.prepare(model, batches), batches, session)

    def train(self, state: dict[str, Any], batches: Batched, session: RunContext) -> None:
        """`step` on every batch of every epoch."""
        step = MicroBatchedStep(self, self.step, state, session)
        kept = {name: thing for name, thing in state.items() if not name.startswith("_")}
        end_epoch = partial(self.end_epoch, state)
        loop.run(step, batches, self.epochs, state=kept, end_epoch=end_epoch, session=session, label="round")


class AdversarialTraining(TrainingDefense):
    """Settings of a defense that trains on perturbed images x + e, e found by sign steps in a ball S: SAU and AT."""

    gradients = "images"
    compiles = True

    epochs: int = param(100, aliases=("n_rounds",))
    lr: float = 1e-4
    lr_scheduler: Schedule | None = "constant"
    client_optimizer: Optimizer = "adam"
    wd: float = 0.0
    eps: float = param(0.2, "radius of the ball S, in [0, 1] pixels; in L_inf below 1", gt=0, aliases=("trigger_norm",))
    norm: Norm = param("L_inf", "norm of the ball; Reg means no ball", aliases=("norm_type",))
    adv_lr: float = param(0.2, "step of the search, as `eps`; every norm uses sign steps", gt=0)
    adv_steps: int = param(5, "steps of the search", ge=1)
    pgd_init: Init = param("max", INIT_HELP)
    clip_pixels: bool = param(False, "keep x + e inside [0, 1], as SAU's paper has it; its release does not")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "adv_lr"):
            require_radius(name, getattr(self, name), self.norm)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> Any:
        """For another network or fewer than 1,900 images: 250 updates in batches of at least 32, at a rate that follows
        from the weights and falls to 0 (OneCycleLR); few images are augmented. The published 1,000 updates at 1e-4
        leave the backdoors of small networks in place."""
        few = images < ENOUGH
        if is_published(model) and not few:
            return self
        size = min(self.batch_size, max(SMALLEST_BATCH, images // 40))
        epochs = math.ceil(UPDATES / (per_epoch or count_batches(images, size)))
        changed: dict[str, Any] = {"lr": weight_rate(model), "lr_scheduler": "OneCycleLR", "augment": few}
        return replace(self, **changed, epochs=epochs, batch_size=size)

    @property
    def ball(self) -> Ball:
        return Ball(norm=self.norm, eps=self.eps, clip=self.clip_pixels)
