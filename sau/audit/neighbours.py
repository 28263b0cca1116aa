"""Triggers near the one that a defense removed: fainter and stronger ones, and those that the attack has itself."""

from collections.abc import Iterator

import torch

from sau.attack.base import Attack
from sau.data.images import Images, quantise, to_float
from sau.types import Bytes

FAINTER, STRONGER = (0.25, 0.5, 0.75), (1.25, 1.5, 2.0)
ITSELF = "as it was"
BLOCK = 1000  # pictures stamped at a time


@torch.no_grad()
def neighbours(clean: Images, triggered: Images, attack: Attack | None) -> Iterator[tuple[str, Bytes]]:
    """(what is different, the pictures with that trigger), 8 bits deep, cut to [0, 1].

    With g the trigger, `strength a` is x + a (g(x) - x), for any attack, and `as it was` stands at a = 1; the others
    are the attack's own, where it is known and has some.

    Args:
        clean: x.
        triggered: g(x), in the same order.
        attack: what stamps; None leaves the strengths.
    """
    x, g = to_float(clean.pixels), to_float(triggered.pixels)
    for strength in (*FAINTER, 1.0, *STRONGER):
        if strength == 1.0:
            yield ITSELF, triggered.pixels  # as they are stored, which no rounding changes
        else:
            yield f"strength {strength:g}", quantise(x + strength * (g - x))
    for name, stamp in attack.neighbours().items() if attack is not None else ():
        yield name, torch.cat([quantise(stamp(block)) for block in x.split(BLOCK)])
