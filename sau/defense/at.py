"""AT: vanilla adversarial training (Madry et al., 2018) as a purifier, the negative control of the SAU paper.

    min_h  a1 * CE(h(x), y) + a2 * max_{e in S} CE(h(x+e), y)

with SAU's ball, steps and optimiser, so that the two, with their published settings, differ only in what they unlearn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sau.config import param
from sau.defense.base import AdversarialTraining
from sau.graphs import fixed_norms, frozen_forward
from sau.pgd import pgd
from sau.types import Batched, Change, Labels, Pixels


class AT(AdversarialTraining):
    """Train on clean images and their adversarial examples.

    The usual robust training is
    `--weight_clean 0 --eps 0.0314 --adv_lr 0.0078 --adv_steps 10 --pgd_init random --clip_pixels true`.
    """

    name = "at"
    few_suffice = True
    graph_safe = True

    weight_clean: float = param(1.0, "a1, of the clean loss", ge=0)
    weight_adv: float = param(1.0, "a2, of the adversarial loss", ge=0)

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        return {**super().prepare(model, batches), "model": model.eval(), **frozen_forward(model)}

    def supports_microbatch(self) -> bool:
        return True

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        model = state["model"]  # in eval mode throughout: its running statistics stay those of the attack
        with fixed_norms(model, x):
            delta = self.search(state.get("frozen", model), x, y)
            clean, z_adv = F.cross_entropy(model(x), y), model(x + delta)
            adversarial = F.cross_entropy(z_adv, y)
            loss = self.weight_clean * clean + self.weight_adv * adversarial
            state["descent"](loss)
        fooled = (z_adv.argmax(1) != y).sum()
        return {"loss": loss, "clean_loss": clean, "adv_loss": adversarial, "fooled": fooled}

    def search(self, model: Callable[[Tensor], Tensor], x: Pixels, y: Labels) -> Change:
        """Sign ascent on CE(h(x+e), y) inside the ball."""
        ball, steps = self.ball, self.adv_steps
        loss = partial(F.cross_entropy, target=y, reduction="none")
        return pgd(lambda e: loss(model(x + e)), x, ball.start(x, self.pgd_init), ball, steps=steps, lr=self.adv_lr)
