"""The clean network against which a trigger is made: trained like the victim, once, or from a record."""

import copy
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sau.attack import workshop
from sau.attack.making import Making
from sau.attack.prototype import Prototype
from sau.data.images import Images, to_float
from sau.data.sources import fingerprint
from sau.errors import RecordError
from sau.evaluate import answering
from sau.loop import Session
from sau.models import Normalized, full_precision
from sau.record import attack_result


def trained(given: Making) -> nn.Module:
    """A copy of `given.blank` trained on clean pictures, from the workshop's cache if it was before; in eval mode."""
    network, images, recipe = copy.deepcopy(given.blank), given.images, given.recipe
    identity = {
        **recipe.params(),
        "blank": workshop.fingerprint(given.blank),
        "answers": _answers(given.blank, images),
        "data": fingerprint(images),
        "device": images.pixels.device.type,
        "augment": str(given.augment),
        "seed": given.seed,
    }

    def build(how: Session) -> workshop.Made:
        fit = partial(Prototype().fit, augment=given.augment, seed=given.seed, session=how)
        return fit(network, images, recipe).state_dict(), {"epochs": float(recipe.epochs)}

    weights, _ = workshop.made("clean-network", identity, build, given.session)
    network.load_state_dict(weights)
    return network.eval().requires_grad_(False)


def _answers(network: nn.Module, images: Images) -> list[str]:
    """What `network` answers the first picture, in three digits: it tells how the layers are put together."""
    with torch.no_grad(), answering(network), full_precision(network):
        return [f"{logit:.2e}" for logit in network(to_float(images.pixels[:1]))[0].tolist()]


def recorded(path: Path, images: Images) -> Normalized:
    """The network of a finished record, in eval mode; RecordError unless it is clean and saw pictures like these."""
    found = attack_result.load(path)
    if found.triggered is not None or found.poisoned is not None:
        raise RecordError(f"{path} holds an attacked network; name a record of attack/prototype.py")
    here = (images.num_classes, list(images.pixels.shape[1:]))
    there = (found.network["classes"], list(found.network["shape"]))
    if here != there:
        raise RecordError(
            f"{path} has {there[0]} classes of pictures {there[1]}, here are {here[0]} of {here[1]}; name another one"
        )
    if found.fingerprints is not None and found.fingerprints["train"] != fingerprint(images):
        raise RecordError(f"{path} was trained on other {found.dataset} pictures; name a record of this data set")
    return found.model().to(images.pixels.device).requires_grad_(False)
