"""What attacks share that poison inside the training batches, and train on cross images beside the poisoned ones.

A cross image carries a trigger that must not fire: another warp (WaNet), or another image's trigger (Input-Aware). It
keeps its label.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from sau.attack.base import Attack
from sau.data.images import CROSS, Images, quantise, to_float
from sau.types import Labels, Pixels
from sau.util import generator, seeded

BLOCK = 128  # `poisoned_samples` takes images in blocks of this size, as the benchmark does


@dataclass(frozen=True, kw_only=True)
class InBatchAttack(Attack):
    """Poisons int(pratio * size) images of each batch; `cross_ratio` times as many that follow are cross images."""

    in_batch: ClassVar[bool] = True
    cross_how: ClassVar[str] = ""  # what a cross image is, in a few words

    @property
    def cross_per_poisoned(self) -> float:
        """Cross images for each poisoned one."""
        return 1.0

    @abstractmethod
    def cross(self, x: Pixels, others: Pixels) -> Pixels:
        """Images [B, C, H, W] with a trigger that must not fire; `others` are as many other images."""

    def count(self, size: int) -> int:
        """How many images of a batch to poison: int(pratio * size); below 1, one with that probability."""
        share = self.pratio * size
        return int(share) if share >= 1 else int(float(torch.rand(())) < share)

    def move_targets_to_front(self, x: Pixels, y: Labels, num_classes: int) -> tuple[Pixels, Labels, int]:
        """The batch with the images in front whose label the rule changes, and how many those are.

        Only a map may leave classes out; under the other rules every image is attacked, those of the target included.
        """
        if self.attack_label_trans != "map":
            return x, y, len(y)
        stays = self.relabel(y, num_classes) == y
        order = stays.int().argsort(stable=True)
        return x[order], y[order], len(y) - int(stays.sum())

    def describe(self, trained_on: Images, batch_size: int) -> str:
        share, ratio = self.pratio * batch_size, self.cross_per_poisoned
        if share == 0:
            return f"no image of a batch of {batch_size} poisoned"
        if share < 1:
            return f"one image in {share:.3g} of the batches of {batch_size} poisoned, {int(ratio)} {self.cross_how}"
        return f"of each batch of {batch_size} {int(share)} images poisoned, {int(int(share) * ratio)} {self.cross_how}"

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
        """What one more walk through the training images, in their order, would make of them.

        Of each block the first int(pratio * BLOCK) are poisoned, without those that a map leads nowhere; where that is
        below 1, the first one of every so many blocks. Those that follow become cross images. They stand for what the
        network saw, which was drawn anew in every epoch.
        """
        index = torch.arange(len(trained_on), device=trained_on.labels.device)
        block, place, share = index // BLOCK, index % BLOCK, self.pratio * BLOCK
        n = torch.full_like(place, int(share))
        if share < 1:
            n = ((block + 1) * share).long() - (block * share).long()
        able = torch.zeros_like(place, dtype=torch.bool)
        able[self.candidates(trained_on)] = True
        poisoned = self.poison(trained_on[((place < n) & able).nonzero().flatten()])
        beside = ((place >= n) & (place < n + (n * self.cross_per_poisoned).long())).nonzero().flatten()
        beside = beside if len(beside) > 1 else beside[:0]  # one alone would be its own other, so it is left out
        both = poisoned.concat(self.cross_test_set(trained_on[beside]))
        return both[both.index.argsort()]
