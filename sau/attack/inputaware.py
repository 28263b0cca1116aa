"""Input-Aware: every image gets a trigger of its own (Nguyen, Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS
2020), drawn by two generators, P for the pattern and M for where it goes:

    g(u) = tanh(u) / 2 + 1/2,   h(v) = tanh(20 v - 10) / 2 + 1/2,   x' = x + (g(P(x)) - x) h(g(M(x)))

1. the masks:  min_M  lambda_norm mean relu(m - density) + lambda_div mean_i [ |x_i - z_i| / |m(x_i) - m(z_i)| ]
2. jointly:    min_{C, P}  CE(C([x'; x + (p(z) - x) m(z); x]), [target; y; y])
                           + lambda_div mean_i [ |x_i - z_i| / |p(x_i) - p(z_i)| ]

with |d| the root mean square of a difference of normalised images, and z other training images, whose triggers on x
(the cross images) keep the labels: a trigger works only on the image it was drawn for.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.attack.base import State
from sau.attack.in_batch import InBatchAttack, random_images
from sau.attack.triggers import TriggerContext
from sau.config import param
from sau.data.batches import Batches, seeded, to_float
from sau.errors import require
from sau.evaluate import batch_accuracy
from sau.loop import RunContext
from sau.models.normalized import require_tensor
from sau.models.triggers import TriggerGenerators
from sau.optim import Descent, Training, adam
from sau.types import Labels, Pixels, Scalar


class InputAware(InBatchAttack):
    """Train trigger generators with the classifier. Epochs count both stages, as in the authors' code; the
    lr_scheduler none is MultiStepLR at `steplr_milestones`."""

    name = "inputaware"
    graph_safe = True
    cifar10_gate = 95.0
    remedy = "more --epochs or a smaller --batch_size"
    trains_trigger = True
    cross_how = "with another image's trigger"
    training_aliases = {
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
    mask_density: float = param(0.032, "mask value up to which a pixel costs nothing", ge=0, le=1)
    EPSILON: float = param(1e-7, "added to divisors, against division by 0", gt=0)
    double_tanh: bool = param(False, "tanh twice, as the benchmark does: patterns lie between 0.119 and 0.881")
    accumulate: bool = param(False, "never clear the pattern generator's gradients, as both public codes do")

    def make_trigger(self, context: TriggerContext) -> TriggerGenerators:
        """The generators, untrained; `fit` trains them, anew for each classifier."""
        _, channels, *sides = context.images.pixels.shape
        require("side of the images", min(sides), min(sides) >= 16, "16 pixels and more for inputaware")
        epochs = context.recipe.epochs
        more = f"0, or more than clean_train_epochs, {self.clean_train_epochs}, for the rest trains the classifier"
        require("epochs", epochs, epochs == 0 or epochs > self.clean_train_epochs, more)
        with seeded(context.seed):
            return TriggerGenerators(channels, context.model, 2 if self.double_tanh else 1, self.EPSILON).eval()

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return self.require_trigger().eval()(x.float())[0].clamp(0, 1).to(x.dtype)

    def cross(self, x: Pixels, others: Pixels) -> Pixels:
        return self.require_trigger().eval()(x, others)[0].clamp(0, 1)

    def train(self, model: nn.Module, batches: Batches, recipe: Training, data: State, session: RunContext) -> None:
        joint = self.classifier_epochs(recipe)
        masks = self.prepare_masks(model, len(batches)) | data
        first = {"session": session, "label": "mask epoch", "rate": "lr_M"}
        self.run_epochs(self.mask_step, self.compose_masks, masks, batches, recipe.epochs - joint, **first)
        both = self.prepare(model, recipe, len(batches)) | data
        second = {"session": session.for_stage(1), "rate": "lr or --lr_G"}
        self.run_epochs(self.step, self.compose, both, batches, joint, **second)
        self.require_trigger().eval()

    def classifier_epochs(self, recipe: Training) -> int:
        return max(0, recipe.epochs - self.clean_train_epochs)

    # Stage 1: the masks

    def prepare_masks(self, model: nn.Module, steps: int) -> State:
        """The state of the first stage."""
        generators = self.require_trigger().restarted().requires_grad_(True)
        generators.graph_safe = getattr(model, "graph_safe", True)
        generators.pattern_net.amp = generators.mask_net.amp = getattr(model, "amp", False)
        descent = _descent(generators.mask_net, self.lr_M, self.schedulerM_milestones, self.schedulerM_lambda, steps)
        return {"generators": generators, "descent": descent}

    def compose_masks(self, state: State, x: Pixels, y: Labels) -> tuple[Tensor, Labels]:
        """The batch of `mask_step`: the images, and as many others behind them."""
        return torch.cat([x, _others(state, len(x))]), y

    def mask_step(self, state: State, x: Tensor, y: Labels) -> dict[str, Tensor]:
        """One update of the mask generator from a batch of `compose_masks`."""
        generators, (x, z) = state["generators"].train(), x.chunk(2)
        m, m_z = generators.mask(x), generators.mask(z)
        size = (m - self.mask_density).relu().mean()
        diverse = self.diversity((x - z) / generators.std, m - m_z)
        loss = self.lambda_norm * size + self.lambda_div * diverse
        state["descent"](loss)
        return {"loss": loss, "mask": m.mean(), "diversity": diverse}

    # Stage 2: patterns and classifier

    def prepare(self, model: nn.Module, recipe: Training, steps: int) -> State:
        generators, milestones = self.require_trigger(), self.schedulerG_milestones
        patterns = _descent(generators.pattern_net, self.lr_G, milestones, self.schedulerG_lambda, steps)
        patterns.keeps = self.accumulate
        schedule = recipe.lr_scheduler or "MultiStepLR"  # the benchmark's default
        classifier = replace(recipe, epochs=self.classifier_epochs(recipe), lr_scheduler=schedule)
        return super().prepare(model, classifier, steps) | {"generators": generators, "patterns": patterns}

    def compose(self, state: State, x: Pixels, y: Labels) -> tuple[Tensor, Labels]:
        """n images to poison, n for cross triggers, clean ones; without labels the n that those are drawn for."""
        n = min(self.poisoned_count(len(x)), len(x) // 2)
        z = _others(state, len(x))
        return torch.cat([x, z[n : 2 * n]]), torch.cat([self.relabel(y[:n], state["images"].num_classes), y[n:]])

    def step(self, state: State, x: Tensor, y: Labels) -> dict[str, Tensor]:
        model, generators = state["model"].train(), state["generators"].train()
        generators.mask_net.eval().requires_grad_(False)
        x, z, n = x[: len(y)], x[len(y) :], len(x) - len(y)
        poisoned, pattern = generators(x[:n]) if n else (z, z)
        cross, pattern_z = generators(x[n : 2 * n], z) if n else (z, z)
        logits = require_tensor(model, model(torch.cat([poisoned, cross, x[2 * n :]])))
        error = F.cross_entropy(logits, y)
        differences = (x[:n] - z) / generators.std, (pattern - pattern_z) / generators.std
        diverse = self.diversity(*differences) if n else error.new_zeros(())
        loss = error + self.lambda_div * diverse
        state["descent"](loss, state["patterns"])
        return {"loss": loss, "error": error, "diversity": diverse, "train_acc": batch_accuracy(logits, y)}

    def end_epoch(self, state: State, losses: dict[str, float]) -> None:
        # By the classifier's own loss, where there is one: diversity does not tell how well it learns.
        for name in state.keys() & {"descent", "patterns"}:
            state[name].end_epoch(losses.get("error", losses["loss"]))

    def diversity(self, inputs: Tensor, outputs: Tensor) -> Scalar:
        """Mean of rms(inputs) / rms(outputs), both differences of two images [B, C, H, W]."""
        # A norm, unlike a square root, has a gradient at 0.
        rms = [torch.linalg.vector_norm(d.flatten(1), dim=1) / d[0].numel() ** 0.5 for d in (inputs, outputs)]
        return (rms[0] / (rms[1] + self.EPSILON)).mean()


def _descent(net: nn.Module, lr: float, milestones: tuple[int, ...], gamma: float, steps: int) -> Descent:
    """Adam with betas (0.5, 0.9), as in the authors' code."""
    training = adam(lr, "MultiStepLR", adam_betas=(0.5, 0.9), steplr_milestones=milestones, steplr_gamma=gamma)
    return training.descent(net.parameters(), steps)


def _others(state: State, size: int) -> Pixels:
    """`size` other training images, augmented; in place of a second loader in another order."""
    pixels = random_images(state, size)
    return to_float(state["augment"](pixels, torch.default_generator) if state["augment"] else pixels)
