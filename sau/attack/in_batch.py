"""What attacks share that poison inside the training batches, and train on cross images beside the poisoned ones.

A cross image carries a trigger that must not fire: another warp (WaNet), or another image's trigger (Input-Aware). It
keeps its label.
"""

from abc import abstractmethod
from dataclasses import field, replace
from typing import ClassVar

import torch

from sau.attack.base import Attack
from sau.data.batches import generator, quantise, seeded, to_float
from sau.data.images import CROSS, Images
from sau.types import Pixels

BLOCK = 128  # `poisoned_samples` takes images in blocks of this size, as the benchmark does


class InBatchAttack(Attack):
    """Poisons int(pratio * size) images of each batch; `cross_ratio` times as many that follow are cross images."""

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

    def describe(self, trained_on: Images, batch_size: int) -> str:
        share = self.pratio * batch_size
        which = f"{int(share)} images poisoned" if share >= 1 else f"one image poisoned with probability {share:.3g}"
        cross = int(max(1, int(share)) * self.cross_ratio)
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
        beside = ((place >= n) & (place < n + (n * self.cross_ratio).long())).nonzero().flatten()
        beside = beside if len(beside) > 1 else beside[:0]  # one alone would be its own other, so it is left out
        both = poisoned.concat(self.cross_test_set(trained_on[beside]))
        return both[both.index.argsort()]
