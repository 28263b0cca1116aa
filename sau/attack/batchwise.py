"""What attacks that poison inside the training batches share: how many pictures, and which ones a record keeps."""

from collections.abc import Callable
from dataclasses import replace

import torch

from sau.attack.base import Attack
from sau.data.images import COVER, Images, quantise, to_float
from sau.types import Pixels

BLOCK = 128  # the walk that makes the examples takes pictures in blocks of this size, as the benchmark does


def count(pratio: float, size: int) -> int:
    """Pictures to poison in a batch: int(pratio * size); where that is below 1, one with that probability."""
    share = pratio * size
    return int(share) if share >= 1 else int(float(torch.rand(())) < share)


def plan(pratio: float, size: int, ratio: float, how: str) -> str:
    """What a batch of `size` consists of, as text."""
    share = pratio * size
    n = str(int(share)) if share >= 1 else f"{share:.3g}"
    return f"of each batch of {size} {n} pictures poisoned and {int(int(share) * ratio)} {how}"


@torch.no_grad()
def examples(attack: Attack, images: Images, n: int, n_cover: int, cover: Callable[[Pixels], Pixels]) -> Images:
    """What one more walk through the training pictures, in their order, would make of them.

    Of each block the first `n` are poisoned, the next `n_cover` go through `cover` and keep their labels. They stand
    for the pictures that the network saw, which were drawn anew in every epoch.
    """
    place = torch.arange(len(images), device=images.labels.device) % BLOCK
    made = attack.poisoned(images[(place < n).nonzero().flatten()])
    covers = images[((place >= n) & (place < n + n_cover)).nonzero().flatten()]
    blocks = [quantise(cover(to_float(block))) for block in covers.pixels.split(1000)]
    pixels = torch.cat(blocks) if blocks else covers.pixels
    covers = replace(covers, pixels=pixels, role=torch.full_like(covers.role, COVER))
    both = {name: torch.cat([value, covers.tensors()[name]]) for name, value in made.tensors().items()}
    order = both["index"].argsort()
    return Images.restore({name: value[order] for name, value in both.items()}, images.num_classes) if n else made
