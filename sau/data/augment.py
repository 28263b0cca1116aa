"""Random crop and flip of a whole batch, one draw a picture (attacks.md 2.2), by gathering from a padded copy."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Zero-pad, crop back to size at a random place, flip left-right with probability 1/2.

    Args:
        padding: pixels added on every side before the crop.
        flip: whether pictures are mirrored.
    """

    padding: int = 4
    flip: bool = False

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        b, c, h, w = x.shape
        top, left = torch.randint(2 * self.padding + 1, (2, b, 1), generator=generator)
        rows = top + torch.arange(h)
        columns = left + torch.arange(w)
        if self.flip:
            mirrored = torch.rand(b, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        rows, columns = rows.to(x.device), columns.to(x.device)
        padded = F.pad(x, (self.padding,) * 4)
        image = torch.arange(b, device=x.device).view(b, 1, 1, 1)
        channel = torch.arange(c, device=x.device).view(1, c, 1, 1)
        return padded[image, channel, rows.view(b, 1, h, 1), columns.view(b, 1, 1, w)]
