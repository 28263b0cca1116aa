"""What every attack does: choose pictures, stamp and relabel them, train the victim."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.data.augment import Augment
from sau.data.images import BACKDOOR, Images, quantise, to_float
from sau.method import Method
from sau.optim import Training
from sau.session import Session
from sau.types import Labels, Pixels


@dataclass(frozen=True, kw_only=True)
class Attack(Method, ABC):
    """An attack is its `stamp`; the rest is common.

    Args:
        pratio: poisoned share of the whole training set, 0 to 1.
        attack_target: class that triggered pictures shall be given (all2one).
        attack_label_trans: all2one (every trigger leads to the target) or all2all (class y leads to y + shift).
        attack_label_shift_amount: the shift of all2all.
    """

    aliases: ClassVar[dict[str, str]] = {"poison_ratio": "pratio", "target_label": "attack_target"}

    pratio: float = 0.1
    attack_target: int = 0
    attack_label_trans: Literal["all2one", "all2all"] = "all2one"
    attack_label_shift_amount: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("pratio", 0 <= self.pratio <= 1, "0 to 1")
        self.require("attack_target", self.attack_target >= 0, "a class, counted from 0")

    @abstractmethod
    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        """Put the trigger on every picture: [0, 1] in and out, differentiable, `x` left as it was.

        Args:
            x: pictures [B, C, H, W] at the network's resolution, before augmentation.
            test: the trigger of the test set, where an attack has another one there.
        """

    def relabel(self, labels: Labels, num_classes: int) -> Labels:
        """The labels that the attacker wants for triggered pictures of these classes."""
        if self.attack_label_trans == "all2one":
            return torch.full_like(labels, self.attack_target)
        return (labels + self.attack_label_shift_amount) % num_classes

    def candidates(self, images: Images) -> Tensor:
        """Indices of the pictures that may be poisoned: all of them, the target class included (attacks.md 0.3)."""
        return torch.arange(len(images))

    def poison_train(self, images: Images, seed: int) -> Images:
        """Stamp and relabel round(pratio * N) pictures; the same ones for the same seed, as in the benchmark."""
        self._check(images)
        candidates = self.candidates(images)
        order = np.random.RandomState(seed).permutation(len(candidates))  # the benchmark's generator and its draw
        picked = candidates[torch.from_numpy(order[: round(self.pratio * len(images))])].to(images.labels.device)
        if len(picked) == 0:
            return images
        pixels, labels, role = images.pixels.clone(), images.labels.clone(), images.role.clone()
        pixels[picked] = self._stamp_all(images.pixels[picked], test=False)
        labels[picked] = self.relabel(images.true_labels[picked], images.num_classes)
        role[picked] = BACKDOOR
        return replace(images, pixels=pixels, labels=labels, role=role)

    def poison_test(self, images: Images) -> Images:
        """The test set of ASR and R-ACC: triggered and relabelled, without pictures that have that label already."""
        self._check(images)
        wanted = self.relabel(images.true_labels, images.num_classes)
        kept = images[(wanted != images.true_labels).nonzero().flatten()]
        return replace(
            kept,
            pixels=self._stamp_all(kept.pixels, test=True),
            labels=self.relabel(kept.true_labels, images.num_classes),
            role=torch.full_like(kept.role, BACKDOOR),
        )

    def prepare(self, model: nn.Module, recipe: Training, steps: int) -> dict[str, Any]:
        """What changes during training; `steps` updates make an epoch."""
        return {"model": model, "descent": recipe.descent(model.parameters(), steps)}

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """Plain supervised learning of whatever labels the pictures carry."""
        logits = state["model"](x)
        loss = F.cross_entropy(logits, y)
        state["descent"](loss)
        return {"loss": loss, "train_acc": 100 * (logits.argmax(1) == y).float().mean()}

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
    ) -> nn.Module:
        """Train `model` in place on pictures from `poison_train`; returns it in eval mode.

        Args:
            model: pixels in [0, 1] -> logits.
            images: on the device of the model.
            recipe: epochs, batch size, optimiser and schedule.
            augment: applied to each batch anew.
            seed: of the order and the augmentation; weights and dropout are the caller's to seed.
            session: progress and checkpoints.
        """
        batches = images.batches(recipe.batch_size, seed=seed, augment=augment, drop_last=True)
        state = self.prepare(model.train(), recipe, len(batches))
        loop.run(
            partial(self.step, state),
            batches,
            recipe.epochs,
            state=state,
            end_epoch=partial(self.end_epoch, state),
            session=session or Session(),
        )
        self.finish(state, model)
        return model.eval()

    def _stamp_all(self, pixels: Tensor, *, test: bool) -> Tensor:
        blocks = [quantise(self.stamp(to_float(block), test=test)) for block in pixels.split(1000)]
        return torch.cat(blocks) if blocks else pixels.clone()

    def _check(self, images: Images) -> None:
        self.require("attack_target", self.attack_target < images.num_classes, f"0..{images.num_classes - 1}")
