"""BadNets: a small patch in a corner (Gu, Dolan-Gavitt, Garg, "BadNets", 2017)."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from sau.attack.base import Attack
from sau.attack.triggers import ImageTrigger, TriggerContext, load_image, trigger_image
from sau.config import param
from sau.data.decode import image_to_tensor
from sau.errors import ConfigError
from sau.types import Pixels


@dataclass(frozen=True, kw_only=True)
class BadNet(Attack):
    """x' = t where the patch image t is above 0, elsewhere x."""

    name: ClassVar[str] = "badnet"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 92.0}
    files: ClassVar[tuple[str, ...]] = ("patch_mask_path",)
    trigger_class: ClassVar[type[nn.Module]] = ImageTrigger

    patch_mask_path: str | None = param(
        None,
        "image of the patch on black, resized to the data set's size; none means a white square of 3x3 (in 32x32) "
        "in the bottom right corner",
    )

    def make_trigger(self, context: TriggerContext) -> nn.Module | None:
        """The image of a file; the default patch needs none."""
        if self.patch_mask_path is None:
            return None
        patch = load_image(self.patch_mask_path, context.images.pixels)
        covers_all = bool((patch > 0).any(0).all())
        self.require("patch_mask_path", not covers_all, "a whole image, black except for the patch")
        return ImageTrigger(patch)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        patch = trigger_image(self.trigger, self.patch_mask_path, white_corner, x)
        return torch.where(patch > 0, patch, x)


@cache
def white_corner(height: int, width: int) -> Tensor:
    """The default patch [3, H, W]. Resizing the image, not the coordinates, gives the benchmark's soft border."""
    image = Image.new("RGB", (32, 32))
    ImageDraw.Draw(image).rectangle((29, 29, 31, 31), fill="white")
    if 3 * min(height, width) < 32:
        raise ConfigError(
            f"the images are {height} x {width}, in which the patch (3 of 32 pixels) is narrower than a pixel; "
            "allowed are sides of 11 and more, or a patch of your own in patch_mask_path"
        )
    return image_to_tensor(image, height, width) / 255
