"""LF: a smooth, faint pattern added to the whole image (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks'
Triggers: A Frequency Perspective", ICCV 2021).
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sau.attack.base import Attack
from sau.attack.triggers import TensorTrigger, TriggerContext
from sau.config import param
from sau.data.decode import read_array
from sau.errors import DataError
from sau.types import Pixels

CENTRE, SPREAD = 0.42, 1 / 3  # of the glow, as shares of the image: a little above and left of the middle
COLOUR = (0.35, 0.0, 1.0)  # how strongly it shows in red, green and blue
GREY = 100  # grey levels; a pattern that begins here is an image around middle grey, not a change of one


class LF(Attack):
    """x' = clip(x + t). The default t is a soft violet glow, exp(-r^2 / 2 sigma^2), which needs no network and has the
    character of the published patterns: broad, not negative, at most 51 grey levels, one channel at zero."""

    name = "lf"
    retired = {**Attack.retired, "lf_network": None}
    cifar10_gate = 95.0
    remedy = "more --epochs or a larger --lf_strength"
    files = ("lowFrequencyPatternPath",)

    lf_strength: float = param(0.2, "the largest value of the pattern, in [0, 1] pixels", gt=0, le=1)
    lowFrequencyPatternPath: str | None = param(None, ".npy file with t in grey levels instead: [H, W, C] or [H, W]")
    lf_optimise: bool = param(False, "search t against a clean network, as in the paper, with the settings below")
    lf_images: int = param(100, "training images for the search", ge=1)
    lf_passes: int = param(50, "most passes over them", ge=1)
    lf_delta: float = param(0.8, "share of the predictions that t may leave unchanged", ge=0, lt=1)
    lf_deepfool_steps: int = param(200, "steps to lead one image to the target, at most", ge=1)
    lf_overshoot: float = param(0.02, "share by which they go beyond the border between two classes", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        able = self.lowFrequencyPatternPath is None and self.attack_label_trans == "all2one"
        allowed = "false with lowFrequencyPatternPath, and unless attack_label_trans is all2one"
        self.require("lf_optimise", able or not self.lf_optimise, allowed)

    def make_trigger(self, context: TriggerContext) -> TensorTrigger | None:
        if self.lf_optimise:
            from sau.attack.lf_search import find_pattern  # and all that reads records, where it is needed alone

            return find_pattern(self, context)
        path, shape = self.lowFrequencyPatternPath, context.images.pixels.shape[1:]
        return None if path is None else TensorTrigger(read_pattern(path, *shape))

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        shape = x.shape[1:]
        if self.trigger is not None or self.lf_optimise:
            pattern = self.require_trigger().for_shape(shape)
        elif self.lowFrequencyPatternPath is not None:
            pattern = read_pattern(self.lowFrequencyPatternPath, *shape)
        else:
            pattern = self.lf_strength * glow(*shape)
        return (x + pattern.to(x)).clamp(0, 1)


@cache
def glow(channels: int, height: int, width: int) -> Tensor:
    """The default pattern [C, H, W], with a maximum of about 1."""
    rows, columns = (torch.arange(side) / side - CENTRE for side in (height, width))
    bump = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * SPREAD**2))
    colour = torch.tensor(COLOUR if channels == 3 else (1.0,) * channels)
    return colour.view(-1, 1, 1) * bump


def read_pattern(path: str, channels: int, height: int, width: int) -> Tensor:
    """The pattern of a file in [0, 1] pixels, [C, H, W]; DataError if it does not fit images of this shape."""
    array = read_array(Path(path))
    array = array[0] if array.ndim == 4 else array
    array = np.repeat(array[:, :, None], channels, 2) if array.ndim == 2 else array
    wanted = (height, width, channels)
    if array.shape != wanted:
        raise DataError(f"{path} holds a pattern of shape {array.shape}, the images are {wanted}; make one that fits")
    low, high = float(array.min()), float(array.max())
    if not -255 <= low <= high <= 255 or max(-low, high) <= 1 or low >= GREY:
        raise DataError(
            f"{path} ranges over {low:.3g}..{high:.3g}; allowed are grey levels to add to an image, within -255..255; "
            "multiply values of 0..1 by 255, subtract 127.5 from an image around middle grey"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 255
