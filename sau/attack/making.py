"""What an attack is given to make a trigger from, and a trigger that is a picture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from torch import Tensor, nn

from sau.data.augment import Augment
from sau.data.decode import image_to_tensor, read_image
from sau.data.images import Images
from sau.errors import DataError
from sau.loop import Session
from sau.optim import Training


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

    def say(self, text: str) -> None:
        """Show a line where the progress is shown."""
        (self.session or Session()).say(text)


class Picture(nn.Module):
    """A trigger that is a picture of the data set's size: what a file held, so that a record does without the file.

    Args:
        picture: [C, H, W], in [0, 1] pixels or, where it is added to others, in [-1, 1].
        figures: what was measured while it was made.
    """

    picture: Tensor

    def __init__(self, picture: Tensor, figures: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.figures = figures or {}
        self.register_buffer("picture", picture)

    def of(self, shape: tuple[int, ...]) -> Tensor:
        """The picture; DataError if it was made for others than pictures of this shape."""
        if self.picture.shape != shape:
            raise DataError(f"the trigger was made for pictures {tuple(self.picture.shape)}, these are {shape}")
        return self.picture


def coloured(picture: Tensor, x: Tensor) -> Tensor:
    """A picture [3, H, W] on the device of pictures `x`, as their channels have it: one is the mean of the three."""
    return (picture.mean(0, keepdim=True) if x.shape[1] == 1 else picture).to(x)


def pictured(trigger: nn.Module | None, path: str | None, own: Callable[[int, int], Tensor], x: Tensor) -> Tensor:
    """The picture of a trigger [3, H, W] for pictures like `x`: from `forge`, or before that from its file; without one
    `own`, made for H and W."""
    height, width = x.shape[-2:]
    if trigger is not None:
        return cast(Picture, trigger).of((3, height, width))
    if path is None:
        return own(height, width)
    picture = read_image(path)
    fitted, brightest = image_to_tensor(picture, height, width) / 255, int(np.asarray(picture).max())
    if 255 * float(fitted.max()) < brightest / 2:
        raise DataError(
            f"{path} is {picture.width}x{picture.height} pixels, and what it shows fades from {brightest} to "
            f"{255 * float(fitted.max()):.0f} grey levels at {width}x{height}; give one of that size"
        )
    return fitted
