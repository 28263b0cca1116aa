"""What attacks share that poison inside the training batches, and train on cross images beside the poisoned ones.

A cross image carries a trigger that must not fire: another warp (WaNet), or another image's trigger (Input-Aware, BPP).
It keeps its label.
"""

import math
from abc import abstractmethod
from dataclasses import field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sau.attack.base import Attack, State
from sau.config import param
from sau.data.batches import Augment, generator, quantise, seeded, to_device_async, to_float
from sau.data.images import CROSS, Images
from sau.models import Normalized
from sau.types import Bytes, Labels, Pixels

BLOCK = 128  # `poisoned_samples` takes images in blocks of this size, as the benchmark does


class InBatchAttack(Attack):
    """Poisons int(pratio * size) images of each batch; the `cross_count` images that follow are cross images."""

    in_batch = True
    cross_how: ClassVar[str] = ""  # what a cross image is, in a few words

    cross_ratio: float = field(default=1.0, init=False)  # cross images for each poisoned one

    @abstractmethod
    def cross(self, x: Pixels, others: Pixels) -> Pixels:
        """Images [B, C, H, W] with a trigger that must not fire; `others` are as many other images."""

    def poisoned_count(self, size: int) -> int:
        """How many images of a batch of `size` to poison; below one image, one with that probability."""
        share = self.pratio * size
        return int(share) if share >= 1 else int(float(torch.rand(())) < share)

    def cross_count(self, poisoned: int, size: int) -> int:
        """How many cross images a batch of `size` has beside so many poisoned ones."""
        return int(poisoned * self.cross_ratio)

    def describe(self, trained_on: Images, batch_size: int) -> str:
        share = self.pratio * batch_size
        which = f"one image poisoned with probability {share:.3g}" if 0 < share < 1 else f"{int(share)} images poisoned"
        cross = self.cross_count(int(share) or math.ceil(share), batch_size)
        return f"of each batch of {batch_size} {which}, {cross} {self.cross_how}"

    @torch.no_grad()
    def cross_test_set(self, images: Images) -> Images:
        """All of these images as cross images, with their own labels; the same ones each time."""
        ring = torch.randperm(len(images), generator=generator(0)).to(images.pixels.device)
        other = torch.empty_like(ring).scatter(0, ring, ring.roll(1))  # the one before it in the ring, so never itself
        pairs = zip(images.pixels.split(1000), images.pixels[other].split(1000), strict=True)
        with seeded(0):
            blocks = [quantise(self.cross(to_float(block), to_float(others))) for block, others in pairs]
        return replace(images, pixels=torch.cat(blocks), role=torch.full_like(images.role, CROSS))

    @torch.no_grad()
    def poisoned_samples(self, trained_on: Images) -> Images:
        """What one more walk through the training images, in their order, would make of them, for what the network saw
        was drawn anew in every epoch.

        Of each block the first int(pratio * BLOCK) are poisoned; where that is below 1, the first one of every so many
        blocks. Those that follow become cross images.
        """
        index, share = torch.arange(len(trained_on), device=trained_on.labels.device), self.pratio * BLOCK
        block, place = index // BLOCK, index % BLOCK
        n = ((block + 1) * share).long() - (block * share).long() if share < 1 else torch.full_like(place, int(share))
        poisoned = self.poison(trained_on, (place < n).nonzero().flatten())
        end = n + self.cross_count(max(1, int(share)), BLOCK) * (n > 0)
        beside = ((place >= n) & (place < end)).nonzero().flatten()
        beside = beside if len(beside) > 1 else beside[:0]  # one alone would be its own other, so it is left out
        both = poisoned.concat(self.cross_test_set(trained_on[beside]))
        return both[both.index.argsort()]


class AugmentedInBatchAttack(InBatchAttack):
    """Augments a batch after its triggers are on: WaNet and BPP."""

    augments_in_compose = True

    random_crop: int = param(5, "padding in pixels of the random crop, which 8 of 10 batches go through", ge=0)
    random_rotation: float = param(10.0, "largest rotation in degrees, which 5 of 10 batches go through", ge=0)
    one_draw: bool = param(False, "one crop, angle and flip for a whole batch, as the benchmark draws them")

    def others(self, state: State, x: Pixels) -> Pixels:
        """What `cross` takes beside `x`."""
        return x

    def compose(self, state: State, x: Pixels, y: Labels) -> tuple[Pixels, Labels]:
        """n triggered images with the attacker's labels, cross images, clean ones; augmented afterwards."""
        n = self.poisoned_count(len(x))
        end = n + self.cross_count(n, len(x))
        x = torch.cat([self.stamp(x[:n]), self.cross(x[n:end], self.others(state, x[n:end])), x[end:]])
        return self.augmented(state, x), torch.cat([self.relabel(y[:n], state["images"].num_classes), y[n:]])

    def augmented(self, state: State, x: Pixels) -> Pixels:
        """Crop, rotate and flip; whether a batch is cropped (8 of 10) or rotated (5 of 10) is one draw; the border is
        the mean colour."""
        given, model = state["augment"], state["model"]
        if given is None:
            return x
        centre = model.mean if isinstance(model, Normalized) and model.mean is not None else 0.0
        crop, rotate = (torch.rand(2) < torch.tensor([0.8, 0.5])).tolist()
        moved = Augment(self.random_crop * crop, given.flip, self.one_draw)(x - centre, torch.default_generator)
        if rotate and self.random_rotation:
            moved = random_rotate(moved, self.random_rotation, one_draw=self.one_draw)
        return (moved + centre).clamp(0, 1)


def random_images(state: State, size: int) -> Bytes:
    """`size` training images, drawn anew from all of them, [size, C, H, W]."""
    images = state["images"]
    return images.pixels[to_device_async(torch.randint(len(images), (size,)), images.pixels.device)]


def random_rotate(x: Tensor, degrees: float, *, one_draw: bool = False) -> Tensor:
    """Rotate images [B, C, H, W] by angles (or `one_draw`) from U(-degrees, degrees), with zeros at the corners."""
    angle = (2 * torch.rand(1 if one_draw else len(x)) - 1) * math.radians(degrees)
    angle = to_device_async(angle.to(x.dtype), x.device).expand(len(x))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[-2] / x.shape[-1]  # coordinates run from -1 to 1 along both sides, whatever their lengths
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)
