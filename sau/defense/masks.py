"""Masks on the channels of batch norms: how ANP and RNP learn them and prune by them."""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sau import loop
from sau.config import param
from sau.defense import pruning
from sau.defense.base import Defense
from sau.defense.inputs import rebatch, stack_batches
from sau.loop import RunContext
from sau.optim import Training
from sau.types import Batched, Labels, Logits, Pixels

Losses = Callable[[Tensor, Pixels, Labels], dict[str, Tensor]]  # (mask [C], x, y) -> what to report, with `loss`


class MaskedNorms:
    """`model` as a function of masks and perturbations of its batch norms, all of them side by side [C].

    Its weights are fixed and its buffers are copies, so `model` stays as it is. Weights that are loaded into `model`
    later count, as those of a checkpoint.
    """

    def __init__(self, model: nn.Module, norms: pruning.Norms) -> None:
        self.model, self.norms = model, norms
        self.fixed = {name: weight.detach() for name, weight in model.named_parameters()}
        self.fixed |= {name: buffer.clone() for name, buffer in model.named_buffers()}
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
class MaskPruning(Defense):
    """Learn a mask for every channel of the batch norms, and prune the lowest ones: ANP and RNP.

    Pruning sets the batch norm's scale to 0; its shift stays.
    """

    augment: bool = param(True, "crop and flip the clean images as in training")
    pruning_number: float | None = param(None, "fixed threshold (or number) to prune by; none searches for it", ge=0)
    pruning_max: float = param(0.90, "highest threshold (or number) that is tried", gt=0)
    pruning_step: float = param(0.05, "step of the search, which begins with 0", ge=0.001)
    acc_ratio: float = param(0.1, "share of the accuracy that the search may lose", ge=0, le=1)
    select: Literal["defender", "oracle"] = param("defender")
    held_back: float = param(
        0.2, "share of each class's clean images for the choice; the masks do not learn from it", gt=0, lt=1
    )

    @abstractmethod
    def learn(self, model: nn.Module, clean: pruning.Clean, batches: Batched, session: RunContext) -> dict[str, Tensor]:
        """The masks [C] of each batch norm, by name. `clean` are the images to learn from in the order of the first
        pass, not augmented; `batches` are the same, augmented. Weights stay as they are."""

    @abstractmethod
    def level(self, masks: dict[str, Tensor], value: float) -> pruning.PruningLevel:
        """The channels that go at a threshold."""

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        pruning.batch_norms(model, self.name)  # refuses a network without any before it trains
        clean, held, fixed = stack_batches(batches), None, self.pruning_number
        if fixed is None and self.select == "defender":
            clean, held = pruning.hold_out(*clean, self.held_back)
            batches = rebatch(*clean, self.batch_size, batches)
        masks = self.learn(model, clean, batches, session)
        prune = partial(pruning.apply, model.eval(), shift=False)
        if fixed is not None and self.select == "defender":
            pruning.prune_fixed(self.level(masks, fixed), prune, session)
            return
        count = int(self.pruning_max / self.pruning_step + 1e-9) + 1
        values = (round(i * self.pruning_step, 10) for i in range(count))  # without the rounding of the multiplication
        pruning.choose(model, [self.level(masks, value) for value in values], prune, held, self.acc_ratio, session)
