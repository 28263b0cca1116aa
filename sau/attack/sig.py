"""SIG: a faint wave on images of the target class; labels stay (Barni, Kallas, Tondi, "A new backdoor attack in
CNNs by training set corruption without label poisoning", ICIP 2019).
"""

import math

import torch

from sau.attack.base import Attack
from sau.config import param
from sau.types import Pixels


class SIG(Attack):
    """x'(i, j) = x(i, j) + delta sin(2 pi j f / width), for every row i, column j and channel, clipped."""

    name = "sig"
    cifar10_gate = 95.0
    remedy = "a larger --sig_delta or more --epochs"
    clean_label = True

    sig_delta: float = param(40.0, "height of the wave in grey levels", gt=0, le=255)
    sig_f: float = param(6.0, "waves across the image; half its width in pixels and more cannot be drawn", gt=0)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        width = x.shape[-1]
        self.require("sig_f", 2 * self.sig_f < width, f"below {width / 2:g} for images {width} pixels wide")
        columns = torch.arange(width, dtype=x.dtype, device=x.device)
        return (x + self.sig_delta / 255 * torch.sin(2 * math.pi * self.sig_f / width * columns)).clamp(0, 1)
