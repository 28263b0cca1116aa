"""Random crop, flip and rotation of a whole batch, one draw an image."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sau.config import check
from sau.errors import require


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """`x`, drawn on the CPU, on `device`; CUDA copies it from pinned memory, so that nothing waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Augment:
    """Zero-pad, crop back to size at a random place, flip left-right with probability 1/2; windows of a padded copy, so
    bytes stay bytes.

    Args:
        padding: pixels added on every side before the crop.
        flip: whether images are mirrored.
        one_draw: the same crop and flip for the whole batch.
    """

    padding: int = 4
    flip: bool = False
    one_draw: bool = False

    def __post_init__(self) -> None:
        check(self, " of the augmentation")
        require("padding of the augmentation", self.padding, self.padding >= 0, "0 and more")

    def __call__(self, x: Tensor, generator: torch.Generator, sizes: Sequence[int] | None = None) -> Tensor:
        """The batch `x`, or the batches of `sizes` one behind the other in it, each with draws of its own."""
        h, w = x.shape[-2:]
        draws = torch.cat([self._draw(size, generator) for size in sizes or [len(x)]], 1)
        top, left, mirrored = to_device_async(draws, x.device)
        windows = F.pad(x, (self.padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, places, places, H, W], a view
        cropped = windows[torch.arange(len(x), device=x.device), :, top, left]
        return torch.where(mirrored.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped) if self.flip else cropped

    def _draw(self, size: int, generator: torch.Generator) -> Tensor:
        """[3, size]: top, left and whether it is mirrored, of each image of a batch."""
        draws = 1 if self.one_draw else size
        corners = torch.randint(2 * self.padding + 1, (2, draws), generator=generator, device="cpu")
        if self.flip:
            mirrored = torch.rand(1, draws, generator=generator, device="cpu") < 0.5
        else:
            mirrored = torch.zeros(1, draws)
        return torch.cat([corners, mirrored.long()]).expand(3, size)


def random_rotate(x: Tensor, degrees: float, *, one_draw: bool = False) -> Tensor:
    """Rotate float images by angles from U(-degrees, degrees), bilinearly, zeros coming in at the corners.

    Args:
        x: float [B, C, H, W].
        degrees: the largest angle.
        one_draw: the same angle for the whole batch.
    """
    angle = (2 * torch.rand(1 if one_draw else len(x)) - 1) * math.radians(degrees)
    angle = to_device_async(angle.to(x.dtype), x.device).expand(len(x))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[-2] / x.shape[-1]  # coordinates run from -1 to 1 along both sides, whatever their lengths
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def cropped(x: Tensor) -> Augment:
    """A crop that suits images [B, C, H, W] of any size, padded by an eighth; no flip."""
    return Augment(padding=x.shape[-1] // 8)
