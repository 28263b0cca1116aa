"""Random crop, flip and rotation of a whole batch, one draw a picture."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """`x`, drawn on the CPU, on `device`; CUDA copies it from pinned memory, so that nothing waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Augment:
    """Zero-pad, crop back to size at a random place, flip left-right with probability 1/2; windows of a padded copy, so
    bytes stay bytes.

    Args:
        padding: pixels added on every side before the crop.
        flip: whether pictures are mirrored.
        one_draw: the same crop and flip for the whole batch.
    """

    padding: int = 4
    flip: bool = False
    one_draw: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        b, _, h, w = x.shape
        draws = 1 if self.one_draw else b
        corners = torch.randint(2 * self.padding + 1, (2, draws), generator=generator, device="cpu")
        top, left = sent(corners, x.device).expand(2, b)
        windows = F.pad(x, (self.padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, places, places, H, W], a view
        cropped = windows[torch.arange(b, device=x.device), :, top, left]
        if not self.flip:
            return cropped
        mirrored = sent(torch.rand(draws, 1, 1, 1, generator=generator, device="cpu") < 0.5, x.device)
        return torch.where(mirrored, cropped.flip(3), cropped)


def turn(x: Tensor, degrees: float, *, one_draw: bool = False) -> Tensor:
    """Rotate float pictures by angles from U(-degrees, degrees), bilinearly, zeros coming in at the corners.

    Args:
        x: float [B, C, H, W].
        degrees: the largest angle.
        one_draw: the same angle for the whole batch.
    """
    angle = (2 * torch.rand(1 if one_draw else len(x)) - 1) * math.radians(degrees)
    angle = sent(angle.to(x.dtype), x.device).expand(len(x))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[-2] / x.shape[-1]  # coordinates run from -1 to 1 along both sides, whatever their lengths
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
