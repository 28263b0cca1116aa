"""SIG: a faint wave on pictures of the target class, whose labels stay (Barni, Kallas, Tondi, "A new backdoor attack in
CNNs by training set corruption without label poisoning", ICIP 2019).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from sau.attack.base import Attack
from sau.types import Pixels


@dataclass(frozen=True, kw_only=True)
class SIG(Attack):
    """x'(i, j) = x(i, j) + delta sin(2 pi j f / width), for every row i, column j and channel, clipped.

    Args:
        sig_delta: height of the wave in grey levels, above 0 and up to 255.
        sig_f: waves across the picture; half its width in pixels and more cannot be drawn.
    """

    name: ClassVar[str] = "sig"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 95.0}
    remedy: ClassVar[str] = "a larger --sig_delta or more --epochs"
    clean_label: ClassVar[bool] = True

    sig_delta: float = 40.0
    sig_f: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("sig_delta", 0 < self.sig_delta <= 255, "above 0 and up to 255")
        self.require("sig_f", self.sig_f > 0, "above 0")

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return self._waved(x, self.sig_f, 0)

    def neighbours(self) -> dict[str, Callable[[Pixels], Pixels]]:
        """The wave moved to the left, and longer ones."""
        moved = {f"moved {n} px": partial(self._waved, frequency=self.sig_f, shift=n) for n in (1, 2)}
        longer = {
            f"frequency x {a:g}": partial(self._waved, frequency=a * self.sig_f, shift=0) for a in (0.5, 0.7, 0.9)
        }
        return {**moved, **longer}

    def _waved(self, x: Pixels, frequency: float, shift: int) -> Pixels:
        width = x.shape[-1]
        self.require("sig_f", 2 * frequency < width, f"below {width / 2:g} for pictures {width} pixels wide")
        columns = torch.arange(shift, width + shift, dtype=x.dtype, device=x.device)
        wave = self.sig_delta / 255 * torch.sin(2 * math.pi * frequency / width * columns)
        return (x + wave).clamp(0, 1)
