"""What an attack is given to make a trigger from."""

from dataclasses import dataclass

from torch import nn

from sau.data.augment import Augment
from sau.data.images import Images
from sau.optim import Training
from sau.session import Session


@dataclass(frozen=True, eq=False)
class Making:
    """The arguments of `Attack.forge`.

    Args:
        images: clean training pictures, on the device to work on.
        blank: an untrained network like the victim, for triggers that are made against one; it is left as it is.
        recipe: how the victim is trained.
        augment: how its training pictures are augmented.
        seed: of what is drawn.
        session: progress; None prints it.
    """

    images: Images
    blank: nn.Module
    recipe: Training
    augment: Augment | None = None
    seed: int = 0
    session: Session | None = None
