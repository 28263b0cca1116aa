"""LF: a smooth, faint pattern added to the whole image (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks'
Triggers: A Frequency Perspective", ICCV 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sau.attack import lf_search
from sau.attack.base import Attack
from sau.attack.triggers import ImageTrigger, TriggerContext
from sau.config import param
from sau.data.decode import read_array
from sau.errors import DataError
from sau.types import Pixels

CENTRE, SPREAD = 0.42, 1 / 3  # of the glow, as shares of the image: a little above and left of the middle
GREY = 100  # grey levels; a pattern that begins here is an image around middle grey, not a change of one
COLOUR = (0.35, 0.0, 1.0)  # how strongly it shows in red, green and blue


@dataclass(frozen=True, kw_only=True)
class LF(Attack):
    """x' = clip(x + t). The default t is a soft violet glow, exp(-r^2 / 2 sigma^2), which needs no network and has the
    character of the published patterns: broad, not negative, at most 51 grey levels, one channel at zero."""

    name: ClassVar[str] = "lf"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 95.0}
    remedy: ClassVar[str] = "more --epochs or a larger --lf_strength"
    files: ClassVar[tuple[str, ...]] = ("lowFrequencyPatternPath", "lf_network")
    trigger_class: ClassVar[type[nn.Module]] = ImageTrigger

    lf_strength: float = param(0.2, "the largest value of the pattern, in [0, 1] pixels", gt=0, le=1)
    lowFrequencyPatternPath: str | None = param(
        None,
        "a .npy file with t in grey levels (0..255) instead: [H, W, C], [H, W], or the first entry of [N, H, W, C]",
    )
    lf_optimise: bool = param(
        False, "search t against a clean network, towards attack_target, as in the paper, with the settings below"
    )
    lf_network: str | None = param(
        None, "folder of a finished record of a clean network; none trains one like the victim first"
    )
    lf_images: int = param(100, "training images for the search", ge=1)
    lf_passes: int = param(50, "most passes over them", ge=1)
    lf_delta: float = param(0.8, "share of the predictions that t may leave unchanged", ge=0, lt=1)
    lf_deepfool_steps: int = param(200, "steps to lead one image to the target, at most", ge=1)
    lf_overshoot: float = param(0.02, "share by which they go beyond the border between two classes", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        no_file, one_class = self.lowFrequencyPatternPath is None, self.attack_label_trans == "all2one"
        self.require("lf_optimise", no_file or not self.lf_optimise, "false with lowFrequencyPatternPath")
        self.require("lf_optimise", one_class or not self.lf_optimise, "false unless attack_label_trans is all2one")
        self.require("lf_network", self.lf_network is None or self.lf_optimise, "none without lf_optimise")

    def make_trigger(self, context: TriggerContext) -> nn.Module | None:
        """The pattern of a file, or with lf_optimise the one that the search finds, or found before; else nothing."""
        if (path := self.lowFrequencyPatternPath) is not None:
            return ImageTrigger(read_pattern(path, tuple(context.images.pixels.shape[1:])))
        return lf_search.find_pattern(self, context) if self.lf_optimise else None

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        shape = tuple(x.shape[1:])
        if self.trigger is not None or self.lf_optimise:
            pattern = cast(ImageTrigger, self.require_trigger()).for_shape(shape)
        elif self.lowFrequencyPatternPath is not None:
            pattern = read_pattern(self.lowFrequencyPatternPath, shape)
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


def read_pattern(path: str, shape: tuple[int, ...]) -> Tensor:
    """The pattern of a file in [0, 1] pixels, [C, H, W]; DataError if it does not fit images of this shape."""
    array = read_array(Path(path))
    array = array[0] if array.ndim == 4 else array
    array = np.repeat(array[:, :, None], shape[0], 2) if array.ndim == 2 else array
    wanted = (shape[1], shape[2], shape[0])
    if array.shape != wanted:
        raise DataError(f"{path} holds a pattern of shape {array.shape}, the images are {wanted}; make one that fits")
    low, high = float(array.min()), float(array.max())
    if not -255 <= low <= high <= 255 or max(-low, high) <= 1 or low >= GREY:
        raise DataError(
            f"{path} ranges over {low:.3g}..{high:.3g}; allowed are grey levels to add to an image, within -255..255; "
            "multiply values of 0..1 by 255, subtract 127.5 from an image around middle grey"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 255
