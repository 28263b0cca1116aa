"""BadNets: a small patch in a corner (Gu, Dolan-Gavitt, Garg, "BadNets", 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sau.attack.base import Attack
from sau.attack.making import Making, Picture, coloured, pictured
from sau.config import param
from sau.data.decode import image_to_tensor
from sau.errors import ConfigError
from sau.types import Pixels


@dataclass(frozen=True, kw_only=True)
class BadNet(Attack):
    """x' = t where the patch picture t is above 0, elsewhere x."""

    name: ClassVar[str] = "badnet"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 92.0}

    patch_mask_path: str | None = param(
        None,
        "image of the patch on black, resized to the data set's size; none means a white square of 3x3 (in 32x32) "
        "in the bottom right corner",
    )

    files: ClassVar[tuple[str, ...]] = ("patch_mask_path",)

    def make_trigger(self, given: Making) -> nn.Module | None:
        """The picture of a file; our own patch needs no making."""
        if self.patch_mask_path is None:
            return None
        patch = self._patch(given.images.pixels)
        share = float((patch > 0).any(0).float().mean())
        what = f"{self.patch_mask_path} covers {100 * share:.0f} % of every picture, as what is not black is the patch"
        if share == 1:
            raise ConfigError(f"{what}; give a whole picture, black but for the patch")
        if share > 0.5:
            given.say(f"warning: {what}; paint the rest black")
        return Picture(patch)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        patch = coloured(self._patch(x), x)
        return torch.where(patch > 0, patch, x)

    def _patch(self, x: Tensor) -> Tensor:
        """[3, H, W] for pictures like `x`; resizing the picture, not the coordinates, gives the benchmark's soft border
        at other resolutions."""
        return pictured(self.trigger, self.patch_mask_path, _white_corner, x)


@cache
def _white_corner(height: int, width: int) -> Tensor:
    picture = Image.new("RGB", (32, 32))
    ImageDraw.Draw(picture).rectangle((29, 29, 31, 31), fill="white")
    if 3 * min(height, width) < 32:
        raise ConfigError(
            f"the pictures are {height} x {width}, in which the patch (3 of 32 pixels) is narrower than a pixel; "
            "allowed are sides of 11 and more, or a patch of your own in patch_mask_path"
        )
    return image_to_tensor(picture, height, width) / 255
