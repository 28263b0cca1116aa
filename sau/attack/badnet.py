"""BadNets: a small patch in a corner (Gu, Dolan-Gavitt, Garg, "BadNets", 2017)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sau.attack.base import Attack
from sau.attack.making import Making, Picture, coloured, pictured
from sau.data.pictures import fit
from sau.errors import ConfigError
from sau.types import Pixels


@dataclass(frozen=True, kw_only=True)
class BadNet(Attack):
    """x' = t where the patch picture t is above 0, elsewhere x.

    Args:
        patch_mask_path: picture of the patch on black, resized to the data set's size; none means a white square of 3x3
            (in 32x32) in the bottom right corner.
    """

    name: ClassVar[str] = "badnet"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 92.0}

    patch_mask_path: str | None = None

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
        return _put(self._patch(x), x)

    def neighbours(self) -> dict[str, Callable[[Pixels], Pixels]]:
        """The patch moved towards the top left, and in other sizes with its bottom right corner where it was."""
        places = {f"moved {n} px": partial(torch.roll, shifts=(-n, -n), dims=(-2, -1)) for n in (1, 2, 4, 8, 16)}
        sizes = {f"size {n}/3": partial(_sized, thirds=n) for n in (1, 2, 4, 5)}
        return {name: partial(self._changed, change) for name, change in {**places, **sizes}.items()}

    def _changed(self, change: Callable[[Tensor], Tensor], x: Pixels) -> Pixels:
        return _put(change(self._patch(x)), x)

    def _patch(self, x: Tensor) -> Tensor:
        """[3, H, W] for pictures like `x`; resizing the picture, not the coordinates, gives the benchmark's soft border
        at other resolutions."""
        return pictured(self.trigger, self.patch_mask_path, _white_corner, x)


def _put(patch: Tensor, x: Pixels) -> Pixels:
    patch = coloured(patch, x)
    return torch.where(patch > 0, patch, x)


@cache
def _white_corner(height: int, width: int) -> Tensor:
    picture = Image.new("RGB", (32, 32))
    ImageDraw.Draw(picture).rectangle((29, 29, 31, 31), fill="white")
    if 3 * min(height, width) < 32:
        raise ConfigError(
            f"the pictures are {height} x {width}, in which the patch (3 of 32 pixels) is narrower than a pixel; "
            "allowed are sides of 11 and more, or a patch of your own in patch_mask_path"
        )
    return fit(picture, height, width) / 255


def _sized(patch: Tensor, thirds: int) -> Tensor:
    if not (patch > 0).any():
        return patch
    (top, bottom), (left, right) = (
        (int(where[0]), int(where[-1]) + 1) for where in (patch.amax((0, n)).nonzero()[:, 0] for n in (2, 1))
    )
    box = patch[:, top:bottom, left:right]
    height, width = min(bottom, _third(bottom - top, thirds)), min(right, _third(right - left, thirds))
    changed = torch.zeros_like(patch)
    changed[:, bottom - height : bottom, right - width : right] = F.interpolate(box[None], (height, width))[0]
    return changed


def _third(side: int, thirds: int) -> int:
    return max(1, round(side * thirds / 3))
