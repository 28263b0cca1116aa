"""LF: a smooth, faint pattern added to the whole picture (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks'
Triggers: A Frequency Perspective", ICCV 2021).
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sau.attack.base import Attack
from sau.data.arrays import read_array
from sau.errors import DataError
from sau.types import Pixels

CENTRE, SPREAD = 0.42, 1 / 3  # of the glow, as shares of the picture: a little above and left of the middle
COLOUR = (0.35, 0.0, 1.0)  # how strongly it shows in red, green and blue


@dataclass(frozen=True, kw_only=True)
class LF(Attack):
    """x' = clip(x + t). The default t is a soft violet glow, exp(-r^2 / 2 sigma^2), which needs no network and has the
    character of the published patterns: broad, not negative, at most 51 grey levels, one channel at zero.

    Args:
        lf_strength: the largest value of the default pattern, in [0, 1] pixels.
        lowFrequencyPatternPath: a .npy file with t on the scale 0..255 in its place: [H, W, C], [H, W], or the first
            entry of [N, H, W, C].
    """

    name: ClassVar[str] = "lf"

    lf_strength: float = 0.2
    lowFrequencyPatternPath: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("lf_strength", 0 < self.lf_strength <= 1, "above 0 and up to 1")

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return (x + self._pattern((x.shape[1], x.shape[2], x.shape[3])).to(x)).clamp(0, 1)

    def _pattern(self, shape: tuple[int, int, int]) -> Tensor:
        if self.lowFrequencyPatternPath is not None:
            return _read(self.lowFrequencyPatternPath, shape)
        return self.lf_strength * _glow(*shape)


@cache
def _glow(channels: int, height: int, width: int) -> Tensor:
    rows, columns = (torch.arange(side) / side - CENTRE for side in (height, width))
    bump = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * SPREAD**2))
    colour = torch.tensor(COLOUR if channels == 3 else (1.0,) * channels)
    return colour.view(-1, 1, 1) * bump


@cache
def _read(path: str, shape: tuple[int, int, int]) -> Tensor:
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
            "smaller ones change no picture"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 255
