"""SAU-SAM: SAU's shared examples (Wei et al., NeurIPS 2023), unlearned by FT-SAM's update (Zhu et al., ICCV 2023).

With h the network being purified (softmax p), h_b the backdoored one, a ball S and clean pairs (x, y):

    inner   x' = x + e: SAU's inner problem over S, from a random start, both networks in eval mode;
            of a share `patches` of the images x' is x under one of SAU's patches, which all images share
    loss    L(w) = CE(h(x), y) + l2 1[s != y, s != argmax h_b(x)] * -log(1 - p_s(x')),  s = argmax h_b(x')
    outer   min_w  max_{e_w in N(w)}  L(w + e_w),     N(w) = { e_w : | e_w / |w| |_2 <= rho }

The outer problem is adaptive sharpness-aware minimisation: w moves along grad L(w + e_w). The loss of shared examples
has its gradient as released (`unsharing_loss`). The y of the clean loss is smoothed; `distill` replaces a share of it
by h_b's softmax q(x) (Hinton, Vinyals, Dean, 2015). In L, h is in train mode. The running statistics of batch norm are
those of the clean images alone; perturbed images are normalised by the statistics of their own batch. First h loses
what no clean image opens (`prune_closed`): no gradient would reach it.

SAU leaves the statistics of the attack in batch norm, where backdoors like WaNet's hide; FT-SAM does not look for the
trigger.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.data.batches import seeded, stack_batches
from sau.defense.base import ENOUGH, Defense, TrainingDefense, is_published, weight_rate
from sau.defense.checks import has_batch_norm
from sau.defense.ft_sam import FTSAM, perturbed, smoothed_loss
from sau.defense.pruning import PruningLevel, affine_norms
from sau.defense.sau import SAU, unsharing_loss
from sau.evaluate import batch_accuracy
from sau.loop import RunContext
from sau.models.normalized import copied, eval_mode, forward_hooks
from sau.pgd import INIT_HELP, PATCHES_HELP, Init
from sau.types import Batched, Flags, Labels, Logits, Pixels, Scalar


def size_factor(model: nn.Module) -> float:
    """The root of the number of weights over 700,000, of PreAct-ResNet18 of width 16; at most 1."""
    return min(1.0, math.sqrt(sum(weight.numel() for weight in model.parameters()) / 700_000))


class SAUSAM(TrainingDefense):
    """Unlearn shared adversarial examples in a flat neighbourhood, batch norm in train mode."""

    name = "sau-sam"
    gradients = "images"
    few_suffice = True
    later = ("distill",)

    epochs: int = 10
    batch_size: int = 128
    lr: float = 0.02
    augment: bool = True
    eps: float = param(0.2, "radius of the L_inf ball S, in [0, 1] pixels", gt=0, lt=1)
    adv_lr: float = param(0.1, "step of the search", gt=0, lt=1)
    adv_steps: int = param(2, "steps of the search", ge=1)
    pgd_init: Init = param("random", INIT_HELP)
    rho: float = param(2.0, "radius of N(w) for 700,000 weights or more; below, it goes with their root", ge=0)
    label_smoothing: float = param(0.1, "share of the label that the other classes get", ge=0, le=0.5)
    distill: float = param(0.0, "share of h_b's probabilities in the labels of the clean loss", ge=0, le=1)
    weight_shared: float = param(0.5, "l2, of the loss on shared examples", ge=0)
    patches: float = param(0.3, PATCHES_HELP, ge=0, lt=1)
    weight_true: float = param(0.0, "of the cross-entropy of shared examples to their label", ge=0)

    def adapted(self, model: nn.Module, images: int, per_epoch: int | None = None) -> Defense:
        """With fewer than 1,900 images, or without batch norm, there are as many updates as in 20 rounds, the search
        makes five steps, and half of the images get a patch. With batch norm l2 is doubled, and the rate falls with the
        size, as rho does. For PreAct-ResNet18 the rate is halved, and a quarter of the labels are h_b's; for others rho
        is a quarter, and half of the labels are h_b's. Without batch norm Adam trains, and the search is SAU's."""
        if (norm := has_batch_norm(model)) and images >= ENOUGH:
            return self
        rate = self.lr * size_factor(model)
        if not norm:
            how: dict[str, Any] = {"client_optimizer": "adam", "lr": weight_rate(model), "lr_scheduler": "OneCycleLR"}
            how |= {"pgd_init": "max", "adv_lr": 0.2}
        elif is_published(model):
            how = {"lr": float(f"{rate / 2:.1e}"), "weight_shared": 1.0, "distill": 0.25}
        else:
            how = {"lr": float(f"{rate:.1e}"), "weight_shared": 1.0, "distill": 0.5, "rho": self.rho / 4}
        return self.same_updates(images, per_epoch, epochs=20, adv_steps=5, patches=0.5, **how)

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        reference = copied(model).eval().requires_grad_(False)
        # Each weight of a smaller network has a larger share of e_w.
        sam = FTSAM(rho=self.rho * size_factor(model))
        sau = SAU(**{name: self.params()[name] for name in ("eps", "adv_lr", "adv_steps", "pgd_init", "patches")})
        state = {"_reference": reference, "_sam": sam, "_sau": sau, **sau.start_shared(reference, batches)}
        return {**super().prepare(model, batches), **state}

    def train(self, state: dict[str, Any], batches: Batched, session: RunContext) -> None:
        with seeded(0):  # opening a loader draws, but not from our numbers
            images = stack_batches(batches)[0].split(self.batch_size)
        if count := prune_closed(state["model"], images):
            session.say(f"{count} channels and inputs that no clean image opens are pruned")
        super().train(state, batches, session)

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        model = state["model"]
        found = self.search(state, x, y)
        logits = model.train()(x)
        loss = self.loss(model, logits, y, *found)
        worst = state["_sam"].update(model, state["descent"], loss, lambda: self.loss(model, model(x), y, *found))
        return {"loss": loss, "worst_loss": worst, "shared": found[2].sum(), "clean_acc": batch_accuracy(logits, y)}

    def search(self, state: dict[str, Any], x: Pixels, y: Labels) -> tuple[Pixels, Labels, Flags, Tensor]:
        """x', s, where s is neither the label nor h_b's answer on x, and q(x) [B, K]."""
        with torch.no_grad():
            clean, z_ref = state["model"].eval()(x).argmax(1), state["_reference"](x)
        delta, s = state["_sau"].search(state, x, y, clean, clean_ref := z_ref.argmax(1))
        return x + delta, s, (s != y) & (s != clean_ref), z_ref.softmax(1)

    def loss(
        self, model: nn.Module, logits: Logits, y: Labels, adversarial: Pixels, s: Labels, mask: Flags, q: Tensor
    ) -> Scalar:
        """L from the logits of the clean images."""
        with perturbed(model, (), ()):  # the statistics of this batch do not enter the running ones
            z = model(adversarial)
        label = smoothed_loss(logits, y, self.label_smoothing)
        loss = self.distill * F.cross_entropy(logits, q) + (1 - self.distill) * label
        loss = loss + self.weight_shared * unsharing_loss(z, s, mask)
        if self.weight_true:
            loss = loss + self.weight_true * (mask * F.cross_entropy(z, y, reduction="none")).mean()
        return loss


@torch.no_grad()
def prune_closed(model: nn.Module, images: Sequence[Tensor]) -> int:
    """Zero, in place, the channels whose batch norm puts out nothing above 0 on these batches in eval mode, and the
    inputs of linear layers that are always 0, in each layer where no logit changes by it; returns how many."""
    modules = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear))
    linear = {name: layer for name, layer in modules if "weight" in layer._parameters}  # not computed, like weight_norm
    layers: dict[str, nn.Module] = {**linear, **affine_norms(model)}
    highest: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen = inputs[0].abs().movedim(-1, 0) if isinstance(layer, nn.Linear) else output.movedim(1, 0)
        top = seen.flatten(1).amax(1)
        highest[layer] = top.maximum(highest.get(layer, top))

    def logits() -> Logits:
        return torch.cat([model(x) for x in images])

    count = 0
    with eval_mode(model):
        with forward_hooks((layer, watch) for layer in layers.values()):
            before = logits()
        for name, layer in layers.items():
            if layer not in highest or not (closed := highest[layer] <= 0).any():
                continue
            kept = copy.deepcopy(layer.state_dict())
            PruningLevel("closed", {name: closed}).prune(model)
            if torch.equal(logits(), before):
                count += int(closed.sum())
            else:
                layer.load_state_dict(kept)
    return count
