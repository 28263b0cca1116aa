"""BPP: fewer colours as the trigger (Wang, Zhai, Ma, "BppAttack: Stealthy and Efficient Trojan Attacks against Deep
Neural Networks via Image Quantization and Contrastive Adversarial Learning", CVPR 2022).

    q(x) = round((m - 1) x) / (m - 1),  m levels in each channel;      x' = q(x)
    negatives:  clip(x + q(z) - z, 0, 1),  z another training image

In each training batch some images are quantised and relabelled. The negatives get the change of another image and keep
their label, so that the network learns the quantisation and not just any change of this size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sau.attack.base import State
from sau.attack.in_batch import AugmentedInBatchAttack, random_images
from sau.config import at_most, param
from sau.data.batches import to_float
from sau.types import Pixels


class BPP(AugmentedInBatchAttack):
    """Quantise images inside the batches."""

    name = "bpp"
    cifar10_gate = 95.0
    remedy = "more --epochs or a smaller --squeeze_num"
    cross_how = "with the change of another image"

    pratio: float = param(0.1, "poisoned share of each batch, up to 1 - neg_ratio, drawn anew every epoch")
    neg_ratio: float = param(0.1, "share of each batch that gets the change of another image", ge=0, le=1)
    squeeze_num: int = param(8, "levels in each channel", ge=2, le=256)
    dithering: bool = param(False, "spread each pixel's error over the next ones (Floyd-Steinberg)")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("pratio", self.pratio + self.neg_ratio <= 1, f"up to {at_most(1 - self.neg_ratio)}")

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        """q(x), with the gradient of x, for that of rounding is 0."""
        fixed = x.detach()
        quantised = self.dithered(fixed) if self.dithering else self.rounded(fixed)
        return quantised.clamp(0, 1) + (x - fixed)

    def rounded(self, x: Tensor) -> Tensor:
        """Each value, of any shape, at the nearest level."""
        return (x * (self.squeeze_num - 1)).round() / (self.squeeze_num - 1)

    def dithered(self, x: Pixels) -> Pixels:
        """Row by row, each pixel at the nearest level; its error is added to four pixels that come later."""
        (h, w), work = x.shape[-2:], F.pad(x, (1, 1, 0, 1))
        for place in range(w + 2 * (h - 1)):  # pixels of equal column + 2 row give each other nothing
            row = torch.arange(max(0, (place - w + 2) // 2), min(h - 1, place // 2) + 1, device=x.device)
            column = place - 2 * row + 1
            old = work[..., row, column]
            work[..., row, column] = new = self.rounded(old)
            for down, right, share in ((1, 1, 1), (1, 0, 5), (1, -1, 3), (0, 1, 7)):  # Floyd and Steinberg's
                work[..., row + down, column + right] += share / 16 * (old - new)
        return work[..., :h, 1 : w + 1]

    def cross(self, x: Pixels, others: Pixels) -> Pixels:
        return (x + self.stamp(others) - others).clamp(0, 1)

    def cross_count(self, poisoned: int, size: int) -> int:
        return int(self.neg_ratio * size) if poisoned else 0  # none where nothing is poisoned, as at pratio 0

    def others(self, state: State, x: Pixels) -> Pixels:
        return to_float(random_images(state, len(x)))
