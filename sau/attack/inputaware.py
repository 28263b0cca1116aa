"""Input-Aware: every picture gets a trigger of its own (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS
2020), drawn by two generators, P for the pattern and M for where it goes:

    g(u) = tanh(u) / 2 + 1/2,   h(v) = tanh(20 v - 10) / 2 + 1/2,   x' = x + (g(P(x)) - x) h(g(M(x)))

1. the masks:  min_M  lambda_norm mean relu(m - density) + lambda_div mean_i [ |x_i - z_i| / |m(x_i) - m(z_i)| ]
2. jointly:    min_{C, P}  CE(C([x'; x + (p(z) - x) m(z); x]), [target; y; y])
                           + lambda_div mean_i [ |x_i - z_i| / |p(x_i) - p(z_i)| ]

with |d| the root mean square of a difference of normalised pictures, and z other training pictures, whose triggers on x
(the cross pictures) keep the labels: a trigger works only on the picture it was drawn for.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.base import Attack
from sau.attack.batchwise import attacked_first, count, covered, examples, plan
from sau.attack.making import Making
from sau.config import param
from sau.data.augment import Augment, to_device_async
from sau.data.images import Batches, Images, to_float
from sau.errors import ConfigError
from sau.evaluate import percent_right
from sau.loop import Session
from sau.models.generator import TriggerGenerators
from sau.optim import Training, adam
from sau.runtime.graphs import MicroBatchedStep
from sau.seeds import seeded
from sau.types import Labels, Pixels, Scalar


@dataclass(frozen=True, kw_only=True)
class InputAware(Attack):
    """Train trigger generators with the classifier. Epochs count both stages, as in the authors' code."""

    name: ClassVar[str] = "inputaware"
    graph_safe: ClassVar[bool] = True
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 95.0}
    remedy: ClassVar[str] = "more --epochs or a smaller --batch_size"
    in_batch: ClassVar[bool] = True
    trains_trigger: ClassVar[bool] = True
    training_aliases: ClassVar[dict[str, str]] = {
        "lr_C": "lr", "C_lr_scheduler": "lr_scheduler", "schedulerC_milestones": "steplr_milestones",
        "schedulerC_lambda": "steplr_gamma",
    }  # fmt: skip

    pratio: float = param(0.1, "poisoned share of each batch; as many cross images come with them", le=0.5)
    clean_train_epochs: int = param(25, "how many of the epochs train the mask generator alone", ge=0)
    lr_G: float = param(0.01, "learning rate of the pattern generator (Adam)", gt=0)
    lr_M: float = param(0.01, "learning rate of the mask generator (Adam)", gt=0)
    schedulerG_milestones: tuple[int, ...] = param((200, 300, 400, 500), "joint epochs at which lr_G drops")
    schedulerM_milestones: tuple[int, ...] = param((10, 20), "mask epochs at which lr_M drops")
    schedulerG_lambda: float = param(0.1, "factor of a drop of lr_G", gt=0, le=1)
    schedulerM_lambda: float = param(0.1, "factor of a drop of lr_M", gt=0, le=1)
    lambda_div: float = param(1.0, "weight of diversity", ge=0)
    lambda_norm: float = param(100.0, "weight of the size of the masks", ge=0)
    mask_density: float = param(0.032, "value of a mask up to which a pixel of it costs nothing", ge=0, le=1)
    EPSILON: float = param(1e-7, "keeps divisions from dividing by 0", gt=0)
    double_tanh: bool = param(
        False,
        "send the generators' outputs through tanh twice, as the benchmark does: patterns then lie between 0.119 "
        "and 0.881",
    )
    accumulate: bool = param(False, "never clear the pattern generator's gradients, as both public codes do")

    def make_trigger(self, given: Making) -> nn.Module | None:
        """The generators, untrained; `fit` trains them, anew for each classifier."""
        _, channels, *sides = given.images.pixels.shape
        if min(sides) < 16:
            raise ConfigError(f"the pictures are {min(sides)} pixels wide or high, inputaware asks for 16 and more")
        epochs = given.recipe.epochs
        if 0 < epochs <= self.clean_train_epochs:
            raise ConfigError(
                f"epochs is {epochs}, of which clean_train_epochs is {self.clean_train_epochs}, so that nothing would "
                "train the classifier; give more --epochs or fewer --clean_train_epochs"
            )
        with seeded(given.seed):
            return TriggerGenerators(channels, given.blank, 2 if self.double_tanh else 1, self.EPSILON).eval()

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return self.made().eval()(x.float())[0].clamp(0, 1).to(x.dtype)

    def train(
        self, model: nn.Module, images: Images, batches: Batches, recipe: Training, augment: Augment | None,
        session: Session,
    ) -> None:  # fmt: skip
        joint, seen = self.classifier_epochs(recipe), {"images": images, "augment": augment}
        parts = partial(MicroBatchedStep, session=session, supports_microbatch=False, graph_safe=self.graph_safe)
        masks = self.prepare_masks(model, len(batches)) | seen
        loop.run(
            parts(self.mask_step, masks, compose=self.compose_masks), batches, recipe.epochs - joint, state=masks,
            end_epoch=partial(self.end_epoch, masks), session=session, label="mask epoch", rate="lr_M",
        )  # fmt: skip
        both = self.prepare(model, recipe, len(batches)) | seen
        loop.run(
            parts(self.step, both, compose=self.compose), batches, joint, state=both,
            end_epoch=partial(self.end_epoch, both), session=session.for_stage(1), rate="lr or --lr_G",
        )  # fmt: skip
        self.made().eval()

    def classifier_epochs(self, recipe: Training) -> int:
        return max(0, recipe.epochs - self.clean_train_epochs)

    def prepare_masks(self, model: nn.Module, steps: int) -> dict[str, Any]:
        """The state of the first stage."""
        artist = cast(TriggerGenerators, self.made()).restarted().requires_grad_(True)
        artist.graph_safe = getattr(model, "graph_safe", True)
        artist.pattern_net.amp = artist.mask_net.amp = getattr(model, "amp", False)
        masks = self._adam(self.lr_M, self.schedulerM_milestones, self.schedulerM_lambda)
        return {"artist": artist, "descent": masks.descent(artist.mask_net.parameters(), steps)}

    def prepare(self, model: nn.Module, recipe: Training, steps: int) -> dict[str, Any]:
        artist = cast(TriggerGenerators, self.made())
        training = self._adam(self.lr_G, self.schedulerG_milestones, self.schedulerG_lambda)
        patterns = training.descent(artist.pattern_net.parameters(), steps)
        patterns.keeps = self.accumulate
        schedule = recipe.lr_scheduler or "MultiStepLR"  # the benchmark's default
        classifier = replace(recipe, epochs=self.classifier_epochs(recipe), lr_scheduler=schedule)
        descent = classifier.descent(model.parameters(), steps)
        return {"model": model, "artist": artist, "descent": descent, "patterns": patterns}

    def compose_masks(self, state: dict[str, Any], x: Pixels, y: Labels) -> tuple[Tensor, Labels]:
        """The batch of `mask_step`: the pictures, and as many others behind them."""
        return torch.cat([x, self._others(state, len(x))]), y

    def mask_step(self, state: dict[str, Any], x: Tensor, y: Labels) -> dict[str, Tensor]:
        """One update of the mask generator from a batch of `compose_masks`."""
        artist, (x, z) = state["artist"].train(), x.chunk(2)
        m, m_z = artist.mask(x), artist.mask(z)
        size = (m - self.mask_density).relu().mean()
        diverse = self._diversity((x - z) / artist.std, m - m_z)
        loss = self.lambda_norm * size + self.lambda_div * diverse
        state["descent"](loss)
        return {"loss": loss, "mask": m.mean(), "diversity": diverse}

    def compose(self, state: dict[str, Any], x: Pixels, y: Labels) -> tuple[Tensor, Labels]:
        """The batch of `step`: n pictures to poison, n for cross triggers, the clean ones, and, without labels, the n
        others that those triggers are drawn for."""
        classes = state["images"].num_classes
        x, y, able = attacked_first(self, x, y, classes)
        n, z = min(count(self.pratio, len(x)), len(x) // 2, able), self._others(state, len(x))
        return torch.cat([x, z[n : 2 * n]]), torch.cat([self.relabel(y[:n], classes), y[n:]])

    def step(self, state: dict[str, Any], x: Tensor, y: Labels) -> dict[str, Tensor]:
        model, artist = state["model"].train(), state["artist"].train()
        artist.mask_net.eval().requires_grad_(False)
        x, z, n = x[: len(y)], x[len(y) :], len(x) - len(y)
        poisoned, pattern = artist(x[:n]) if n else (z, z)
        cross, pattern_z = artist(x[n : 2 * n], z) if n else (z, z)
        logits = model(torch.cat([poisoned, cross, x[2 * n :]]))
        error = F.cross_entropy(logits, y)
        apart = (x[:n] - z) / artist.std, (pattern - pattern_z) / artist.std
        diverse = self._diversity(*apart) if n else error.new_zeros(())
        loss = error + self.lambda_div * diverse
        state["descent"](loss, state["patterns"])
        return {"loss": loss, "error": error, "diversity": diverse, "train_acc": percent_right(logits, y)}

    def end_epoch(self, state: dict[str, Any], losses: dict[str, float]) -> None:
        # By the classifier's own loss, where there is one: diversity says nothing of how it fares.
        for descent in (state[name] for name in ("descent", "patterns") if name in state):
            descent.end_epoch(losses.get("error", losses["loss"]))

    def plan(self, trained_on: Images, batch_size: int) -> str:
        return plan(self.pratio, batch_size, 1.0, "with another picture's trigger")

    def crossed(self, images: Images) -> Images:
        return covered(images, self._borrowed)

    def examples(self, trained_on: Images) -> Images:
        return examples(self, trained_on, 1.0, self._borrowed)

    def _borrowed(self, x: Pixels, others: Pixels) -> Pixels:
        return self.made().eval()(x, others)[0].clamp(0, 1)

    def _adam(self, lr: float, milestones: tuple[int, ...], gamma: float) -> Training:
        return adam(lr, "MultiStepLR", adam_betas=(0.5, 0.9), steplr_milestones=milestones, steplr_gamma=gamma)

    def _others(self, state: dict[str, Any], size: int) -> Pixels:
        """As many other training pictures, augmented; in place of a second loader in another order."""
        images = state["images"]
        pixels = images.pixels[to_device_async(torch.randint(len(images), (size,)), images.pixels.device)]
        return to_float(state["augment"](pixels, torch.default_generator) if state["augment"] else pixels)

    def _diversity(self, inputs: Tensor, outputs: Tensor) -> Scalar:
        """Mean of rms(inputs) / rms(outputs), both differences of two pictures [B, C, H, W]."""
        rms_in, rms_out = (
            torch.linalg.vector_norm(difference.flatten(1), dim=1) / difference[0].numel() ** 0.5
            for difference in (inputs, outputs)
        )  # a norm, unlike a square root, has a gradient at 0
        return (rms_in / (rms_out + self.EPSILON)).mean()
