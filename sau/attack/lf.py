"""LF: a smooth, faint pattern added to the whole picture (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks'
Triggers: A Frequency Perspective", ICCV 2021).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sau.attack import clean_network, lf_search, workshop
from sau.attack.base import Attack
from sau.attack.making import Making, Picture
from sau.config import param
from sau.data.decode import read_array
from sau.data.sources import fingerprint
from sau.errors import DataError
from sau.types import Pixels

CENTRE, SPREAD = 0.42, 1 / 3  # of the glow, as shares of the picture: a little above and left of the middle
GREY = 100  # a pattern that begins here is no change of a picture but a picture of it, around middle grey
COLOUR = (0.35, 0.0, 1.0)  # how strongly it shows in red, green and blue


@dataclass(frozen=True, kw_only=True)
class LF(Attack):
    """x' = clip(x + t). The default t is a soft violet glow, exp(-r^2 / 2 sigma^2), which needs no network and has the
    character of the published patterns: broad, not negative, at most 51 grey levels, one channel at zero."""

    name: ClassVar[str] = "lf"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 95.0}
    remedy: ClassVar[str] = "more --epochs or a larger --lf_strength"
    files: ClassVar[tuple[str, ...]] = ("lowFrequencyPatternPath", "lf_network")

    lf_strength: float = param(0.2, "the largest value of the pattern, in [0, 1] pixels", gt=0, le=1)
    lowFrequencyPatternPath: str | None = param(
        None,
        "a .npy file with t on the scale 0..255 in its place: [H, W, C], [H, W], or the first entry of [N, H, W, C]",
    )
    lf_optimise: bool = param(
        False, "search t against a clean network, towards attack_target, as in the paper; the rest is for this"
    )
    lf_network: str | None = param(
        None, "folder of a finished record of a clean network; none trains one like the victim first"
    )
    lf_images: int = param(100, "training images that t is made from", ge=1)
    lf_passes: int = param(50, "walks through them, at most", ge=1)
    lf_delta: float = param(0.8, "share of the network's predictions that t may leave as they are", ge=0, lt=1)
    lf_deepfool_steps: int = param(200, "steps to lead one image to the target, at most", ge=1)
    lf_overshoot: float = param(0.02, "share by which they go beyond the border between two classes", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        alone = self.lowFrequencyPatternPath is None or not self.lf_optimise
        self.require("lf_optimise", alone, "false with a pattern in lowFrequencyPatternPath")
        alone = self.attack_label_trans == "all2one" or not self.lf_optimise
        self.require("lf_optimise", alone, "false unless all pictures lead to one class, for that is what it searches")
        self.require("lf_network", self.lf_network is None or self.lf_optimise, "none without lf_optimise")

    def make_trigger(self, given: Making) -> nn.Module | None:
        """The pattern of a file, or with lf_optimise the one that the search finds, or found before; else nothing."""
        if self.lowFrequencyPatternPath is not None:
            return Picture(self._pattern(tuple(given.images.pixels.shape[1:])))
        if not self.lf_optimise:
            return None
        images = given.images
        if self.lf_network is not None:
            network: nn.Module = clean_network.recorded(Path(self.lf_network), images)
        else:
            network = clean_network.trained(given)
        limits = lf_search.Limits(
            target=self.attack_target, images=self.lf_images, passes=self.lf_passes, delta=self.lf_delta,
            steps=self.lf_deepfool_steps, overshoot=self.lf_overshoot, strength=self.lf_strength,
        )  # fmt: skip
        made_from = {"network": workshop.fingerprint(network), "data": fingerprint(images), "seed": given.seed}
        made_from["device"] = images.pixels.device.type
        search = partial(lf_search.optimise, network, images, limits, given.seed)
        found, figures = workshop.made("lf", {**made_from, **vars(limits)}, search, given.session)
        return Picture(found["pattern"], figures)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return (x + self._pattern(tuple(x.shape[1:])).to(x)).clamp(0, 1)

    def _pattern(self, shape: tuple[int, ...]) -> Tensor:
        if self.trigger is not None or self.lf_optimise:
            return cast(Picture, self.made()).of(shape)
        if self.lowFrequencyPatternPath is not None:
            return _read(self.lowFrequencyPatternPath, shape)
        return self.lf_strength * _glow(*shape)


@cache
def _glow(channels: int, height: int, width: int) -> Tensor:
    rows, columns = (torch.arange(side) / side - CENTRE for side in (height, width))
    bump = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * SPREAD**2))
    colour = torch.tensor(COLOUR if channels == 3 else (1.0,) * channels)
    return colour.view(-1, 1, 1) * bump


def _read(path: str, shape: tuple[int, ...]) -> Tensor:
    """The pattern of a file in [0, 1] pixels, [C, H, W]; DataError if it does not fit pictures of this shape."""
    array = read_array(Path(path))
    array = array[0] if array.ndim == 4 else array
    array = np.repeat(array[:, :, None], shape[0], 2) if array.ndim == 2 else array
    wanted = (shape[1], shape[2], shape[0])
    if array.shape != wanted:
        raise DataError(f"{path} holds a pattern of shape {array.shape}, the pictures are {wanted}; make one that fits")
    low, high = float(array.min()), float(array.max())
    if not -255 <= low <= high <= 255 or max(-low, high) <= 1:
        raise DataError(
            f"{path} ranges over {low:.3g}..{high:.3g}; allowed are grey levels, within -255..255 and beyond 1, for "
            "smaller ones change no picture; multiply values of 0..1 by 255"
        )
    if low >= GREY:
        raise DataError(
            f"{path} ranges over {low:.3g}..{high:.3g}, like the public search's v * 255 + 127.5; allowed is what is "
            "added to a picture; subtract 127.5"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 255
