"""The clean network against which a trigger is made: trained like the victim, once, or from a record."""

import copy
from functools import partial
from pathlib import Path

from torch import nn

from sau import victim
from sau.attack import workshop
from sau.attack.prototype import Prototype
from sau.data.augment import Augment
from sau.data.images import Images
from sau.data.sources import fingerprint
from sau.errors import RecordError
from sau.optim import Training
from sau.seeds import seeded
from sau.session import Session


def trained(
    images: Images, blank: nn.Module, recipe: Training, augment: Augment | None, seed: int, session: Session | None
) -> nn.Module:
    """A copy of `blank` trained on clean pictures, from the workshop's cache if it was before; in eval mode."""
    network = copy.deepcopy(blank)
    identity = {
        **recipe.params(),
        "blank": workshop.fingerprint(blank),
        "data": fingerprint(images),
        "augment": str(augment),
        "seed": seed,
    }

    def build(how: Session) -> workshop.Made:
        fit = partial(Prototype().fit, augment=augment, seed=seed, session=how)
        return fit(network, images, recipe).state_dict(), {"epochs": float(recipe.epochs)}

    with seeded(seed):
        found = workshop.made("clean-network", identity, build, session)
    network.load_state_dict(found)
    return network.eval().requires_grad_(False)


def recorded(path: Path, images: Images) -> nn.Module:
    """The network of a finished record, in eval mode; RecordError unless it is clean and saw pictures like these."""
    found = victim.load(path)
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
