"""No attack: trains the clean network, for comparison and as the surrogate of attacks."""

import copy
from dataclasses import field
from typing import Any

import torch
from torch import nn

from sau.attack.base import Attack, LabelRule
from sau.attack.triggers import Made, TriggerContext, cached_trigger, network_digest
from sau.data.batches import to_float
from sau.data.images import Images
from sau.loop import RunContext
from sau.models.normalized import eval_mode, full_precision
from sau.types import Pixels


class Unpoisoned(Attack):
    """Poisons no training image; what other attacks are asked about poisoning and training is fixed."""

    poisons = False
    retired = {}

    pratio: float = field(default=0.0, init=False)
    attack_label_trans: LabelRule = field(default="all2one", init=False)
    attack_label_shift_amount: int = field(default=1, init=False)
    resilient_rho: float = field(default=0.0, init=False)
    abi: float | None = field(default=None, init=False)
    sbl: float = field(default=0.0, init=False)


class Prototype(Unpoisoned):
    """Clean training: nothing is poisoned and there is no triggered test set."""

    name = "prototype"

    attack_target: int = field(default=0, init=False)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return x

    def poison_test(self, images: Images) -> Images:
        return images[images.labels[:0]]


def train_clean(context: TriggerContext) -> nn.Module:
    """A copy of `context.model` trained on clean images, from the cache if it was before; in eval mode."""
    network, images, recipe = copy.deepcopy(context.model), context.images, context.recipe
    with torch.no_grad(), eval_mode(network), full_precision(network):
        logits = network(to_float(images.pixels[:1]))[0].tolist()  # they tell how the layers are put together
    identity = {"blank": network_digest(network), "answers": [f"{logit:.2e}" for logit in logits], **recipe.params()}
    identity |= {"augment": str(context.augment), "seed": context.seed}

    def build(session: RunContext) -> Made:
        how: Any = {"augment": context.augment, "seed": context.seed, "session": session}
        return Prototype().fit(network, images, recipe, **how).state_dict(), {"epochs": float(recipe.epochs)}

    weights, _ = cached_trigger("clean-network", identity, build, context)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)
