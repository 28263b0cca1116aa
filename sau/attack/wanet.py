"""WaNet: a slight, smooth warp as the trigger (Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack",
ICLR 2021).

    field = upsample(z / mean|z|),  z ~ U(-1, 1) [k, k, 2];   grid = clip((identity + s field / size) rescale, -1, 1)

In each training batch some images are warped by the grid and relabelled, and some more by the grid plus noise, which
keep their labels, so that the network learns this warp and not warping.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sau.attack.in_batch import AugmentedInBatchAttack
from sau.attack.triggers import TensorTrigger, TriggerContext
from sau.config import at_most, param
from sau.data.batches import generator
from sau.types import Pixels


class WaNet(AugmentedInBatchAttack):
    """Warp images inside the batches. The trigger is z / mean|z|, [1, 2, k, k]."""

    name = "wanet"
    remedy = "more --epochs or a larger --s"
    cross_how = "warped with noise"

    pratio: float = param(0.1, "poisoned share of each batch, up to 1 / (1 + cross_ratio), drawn anew every epoch")
    cross_ratio: float = param(2.0, "images warped with noise for each poisoned one", ge=0)
    s: float = param(0.5, "strength of the warp: about its largest shift in pixels; a third of that on average", gt=0)
    k: int = param(4, "control points along each side", ge=2)
    grid_rescale: float = param(1.0, "factor on the grid; less keeps strong warps inside the image", gt=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = f"up to {at_most(1 / (1 + self.cross_ratio))}"
        self.require("pratio", self.pratio * (1 + self.cross_ratio) <= 1, most)

    def make_trigger(self, context: TriggerContext) -> TensorTrigger:
        z = 2 * torch.rand(1, 2, self.k, self.k, generator=generator(context.seed)) - 1
        return TensorTrigger(z / z.abs().mean())

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return F.grid_sample(x, self.grid(x), align_corners=True).clamp(0, 1)  # rounding may leave [0, 1]

    def cross(self, x: Pixels, others: Pixels) -> Pixels:
        grid = self.grid(x)
        grid = (grid + in_grid(2 * torch.rand_like(grid) - 1)).clamp(-1, 1)
        return F.grid_sample(x, grid, align_corners=True).clamp(0, 1)

    def grid(self, x: Pixels) -> Tensor:
        """Where each pixel of `x` comes from, [B, H, W, 2] in [-1, 1], column before row."""
        ends = [torch.linspace(-1, 1, n, dtype=x.dtype, device=x.device) for n in (x.shape[3], x.shape[2])]
        identity = torch.stack(torch.meshgrid(*ends, indexing="xy"), -1)[None]
        points = self.require_trigger().values.to(x)
        field = F.interpolate(points, size=x.shape[-2:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
        grid = ((identity + in_grid(self.s * field)) * self.grid_rescale).clamp(-1, 1)
        return grid.expand(len(x), -1, -1, -1)


def in_grid(field: Tensor) -> Tensor:
    """Displacements [B, H, W, 2] of columns and rows, where 1 is half a pixel, in the units of a grid from -1 to 1."""
    return torch.stack([field[..., 0] / field.shape[2], field[..., 1] / field.shape[1]], -1)
