"""What attacks that poison inside the training batches share: how many pictures, and which ones a record keeps."""

from collections.abc import Callable
from dataclasses import replace

import torch

from sau.attack.base import Attack
from sau.data.images import COVER, Images, quantise, to_float
from sau.seeds import generator
from sau.types import Labels, Pixels

Cover = Callable[[Pixels, Pixels], Pixels]  # pictures and as many others -> the first with what must do nothing
BLOCK = 128  # the walk that makes the examples takes pictures in blocks of this size, as the benchmark does


def count(pratio: float, size: int) -> int:
    """Pictures to poison in a batch: int(pratio * size); where that is below 1, one with that probability."""
    share = pratio * size
    return int(share) if share >= 1 else int(float(torch.rand(())) < share)


def plan(pratio: float, size: int, ratio: float, how: str) -> str:
    """What a batch of `size` consists of, as text."""
    share = pratio * size
    if share == 0:
        return f"no picture of a batch of {size} poisoned"
    if share < 1:
        return f"one picture in {share:.3g} of the batches of {size} poisoned, and {int(ratio)} more {how}"
    return f"of each batch of {size} {int(share)} pictures poisoned and {int(int(share) * ratio)} {how}"


def attacked_first(attack: Attack, x: Pixels, y: Labels, num_classes: int) -> tuple[Pixels, Labels, int]:
    """The batch with the pictures in front that the label rule leads anywhere, and how many those are.

    Only a map may leave classes out; under the other rules every picture is attacked, those of the target included.
    """
    if attack.attack_label_trans != "map":
        return x, y, len(y)
    stays = attack.relabel(y, num_classes) == y
    order = stays.int().argsort(stable=True)
    return x[order], y[order], len(y) - int(stays.sum())


@torch.no_grad()
def covered(images: Images, cover: Cover) -> Images:
    """`images` after `cover`, given another one for each, which is drawn; 8 bits deep, with their own labels."""
    ring = torch.randperm(len(images), generator=generator(0)).to(images.pixels.device)
    other = torch.empty_like(ring).scatter(0, ring, ring.roll(1))  # the one before it in the ring, so never itself
    pairs = zip(images.pixels.split(1000), images.pixels[other].split(1000), strict=True)
    blocks = [quantise(cover(to_float(block), to_float(others))) for block, others in pairs]
    return replace(images, pixels=torch.cat(blocks), role=torch.full_like(images.role, COVER))


@torch.no_grad()
def examples(attack: Attack, images: Images, ratio: float, cover: Cover) -> Images:
    """What one more walk through the training pictures, in their order, would make of them.

    Of each block the first int(pratio * BLOCK) are poisoned, but for those that a map leads nowhere, or where that is
    below 1 the first one of every so many blocks; `ratio` times as many that follow them are `covered`. They stand for
    the pictures that the network saw, which were drawn anew in every epoch.
    """
    index = torch.arange(len(images), device=images.labels.device)
    block, place, share = index // BLOCK, index % BLOCK, attack.pratio * BLOCK
    n = torch.full_like(place, int(share))
    if share < 1:
        n = ((block + 1) * share).long() - (block * share).long()
    able = torch.zeros_like(place, dtype=torch.bool)
    able[attack.candidates(images)] = True
    made = attack.poisoned(images[((place < n) & able).nonzero().flatten()])
    beside = ((place >= n) & (place < n + (n * ratio).long())).nonzero().flatten()
    beside = beside if len(beside) > 1 else beside[:0]  # one alone would be its own other, so it is left out
    covers = covered(images[beside], cover)
    both = made.concat(covers)
    return both[both.index.argsort()]
