"""BadNets: a small patch in a corner (Gu, Dolan-Gavitt, Garg, "BadNets", 2017)."""

from functools import cache

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sau.attack.base import Attack
from sau.attack.triggers import TensorTrigger, TriggerContext, file_trigger, trigger_image
from sau.config import param
from sau.data.decode import image_to_tensor
from sau.errors import require
from sau.types import Pixels


class BadNet(Attack):
    """x' = t where the patch image t is above 0, elsewhere x."""

    name = "badnet"
    cifar10_gate = 92.0
    files = ("patch_mask_path",)

    patch_mask_path: str | None = param(None, "patch on black, resized; none: white, 3x3 of 32x32, bottom right")

    def make_trigger(self, context: TriggerContext) -> TensorTrigger | None:
        trigger = file_trigger(self.patch_mask_path, *context.images.pixels.shape[-2:])
        covers_all = trigger is not None and bool((trigger.values > 0).any(0).all())
        self.require("patch_mask_path", not covers_all, "a whole image, black except for the patch")
        return trigger

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        patch = trigger_image(self.trigger, self.patch_mask_path, white_corner, x)
        return torch.where(patch > 0, patch, x)


@cache
def white_corner(height: int, width: int) -> Tensor:
    """The default patch [3, H, W]. Resizing the image, not the coordinates, gives the benchmark's soft border."""
    wide = min(height, width) >= 11  # or the patch would be narrower than a pixel
    require("patch_mask_path", None, wide, f"an image where a side is below 11 pixels, as in {height} x {width}")
    image = Image.new("RGB", (32, 32))
    ImageDraw.Draw(image).rectangle((29, 29, 31, 31), fill="white")
    return image_to_tensor(image, height, width) / 255
