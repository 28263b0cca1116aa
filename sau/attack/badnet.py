"""BadNets: a small patch in a corner (Gu, Dolan-Gavitt, Garg, "BadNets", 2017)."""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sau.attack.base import Attack
from sau.data.pictures import fit, read_picture
from sau.types import Pixels


@dataclass(frozen=True, kw_only=True)
class BadNet(Attack):
    """x' = t where the patch picture t is above 0, elsewhere x.

    Args:
        patch_mask_path: picture of the patch on black, resized to the data set's size; none means a white square of 3x3
            (in 32x32) in the bottom right corner.
    """

    name: ClassVar[str] = "badnet"

    patch_mask_path: str | None = None

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        patch = _patch(self.patch_mask_path, x.shape[-2], x.shape[-1]).to(x)
        return torch.where(patch > 0, patch, x)


@cache
def _patch(path: str | None, height: int, width: int) -> Tensor:
    # Resizing the picture, not the coordinates, gives the benchmark's soft border at other resolutions.
    return fit(read_picture(path) if path else _white_corner(), height, width) / 255


def _white_corner() -> Image.Image:
    picture = Image.new("RGB", (32, 32))
    ImageDraw.Draw(picture).rectangle((29, 29, 31, 31), fill="white")
    return picture
