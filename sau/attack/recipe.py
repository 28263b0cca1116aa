"""How a victim is trained: gradient descent, and what defenses have no use for."""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.augment import Augment
from sau.data.images import Images, share_in, shrunk, to_float
from sau.errors import ConfigError, DataError
from sau.evaluate import answering
from sau.models import asking, check_labels, check_logits, initialised, logits_of
from sau.optim import Training
from sau.seeds import seeded

LATER = ("sides", "unaugmented")  # settings that came after results that have none


@dataclass(frozen=True, kw_only=True)
class Recipe(Training):
    """The settings of a victim's training.

    Args:
        sides: height and width of the pictures in each epoch as a share of their own, like 0.5,0.5,1; the last one
            holds for the epochs that follow, none means 1. Small pictures are cheap, and teach a network most of it.
        unaugmented: learn pictures as they are, neither cropped nor mirrored. A short training sees them too few times
            to know them by heart, and a trigger always at its place is taken up sooner.
    """

    sides: tuple[float, ...] = ()
    unaugmented: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sides", all(0 < side <= 1 for side in self.sides), "shares above 0 and up to 1")

    def params(self) -> dict[str, Any]:
        """The hyperparameters, by name; those that came later only where they act."""
        return {name: value for name, value in super().params().items() if value or name not in LATER}

    def whole(self, epochs: int) -> float:
        """How many epochs of whole pictures have as many pixels as the first `epochs`."""
        return math.fsum(share_in(epoch, self.sides) ** 2 for epoch in range(epochs))


def moved(recipe: Training, augment: Augment | None) -> Augment | None:
    """What a victim's pictures go through: `augment`, unless the recipe wants them as they are."""
    return None if isinstance(recipe, Recipe) and recipe.unaugmented else augment


def check_victim(model: nn.Module, images: Images) -> None:
    """Refuse what cannot be trained: ConfigError for weights that are frozen or get no gradient, DataError for pictures
    that do not fit."""
    if not isinstance(images, Images) or not len(images):
        what = "none" if isinstance(images, Images) else f"a {type(images).__name__}"
        raise DataError(f"the pictures to train on are {what}, allowed are Images, at least one; see Images.clean")
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the network is a {type(model).__name__}, allowed is a torch.nn.Module")
    initialised(model)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("the weights of the network are frozen, so nothing would learn; call requires_grad_() on it")
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ConfigError("the network was made under inference_mode, so its weights cannot learn; make it outside")
    with torch.inference_mode(False), torch.enable_grad(), answering(model):
        logits = logits_of(model, to_float(images.pixels[:8]))
    check_labels(images.labels, logits.shape[1])
    check_logits(logits)
    if not logits.requires_grad and not _learns(model, to_float(images.pixels[:1])):
        raise ConfigError(
            "what the network answers has no gradient to its weights, so nothing would learn; take no_grad, detach or "
            "numpy out of its forward"
        )


def _learns(model: nn.Module, x: Tensor) -> bool:
    """Whether what `model` answers in train mode has a gradient; asked of a copy, whose statistics may move."""
    with torch.inference_mode(False), torch.enable_grad(), seeded(0):
        return bool(copy.deepcopy(model).train()(torch.cat([x, x])).requires_grad)


def sizes(recipe: Training, model: nn.Module, images: Images, in_batch: bool) -> tuple[float, ...]:
    """The `sides` of a recipe; ConfigError if `model`, or an attack inside the batches, cannot have them."""
    sides = recipe.sides if isinstance(recipe, Recipe) else ()
    if sides and in_batch:
        raise ConfigError(
            f"sides is {sides}, allowed is none for attacks inside the batches, which stamp whole pictures"
        )
    for side in {*sides} - {1.0}:
        small = shrunk(to_float(images.pixels[:1]), side)
        what = f"sides has {side:g}, but the network takes no pictures of {'x'.join(map(str, small.shape[2:]))}: "
        with asking(partial(_refused, what)), torch.no_grad(), answering(model):
            model(small)
    return sides


def _refused(what: str, reason: str) -> ConfigError:
    return ConfigError(what + reason)
