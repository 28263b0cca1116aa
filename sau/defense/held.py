"""Clean pictures that a method holds back to choose by, and whether an accuracy on them can choose anything."""

from typing import NamedTuple

from torch import Tensor

from sau.data.sources import last_of_each
from sau.loop import Session


class Held(NamedTuple):
    """Clean pictures to choose by: pixels [N, C, H, W], labels [N], and whether the method learns from others alone."""

    x: Tensor
    y: Tensor
    apart: bool = True


def hold_back(x: Tensor, y: Tensor, share: float, session: Session) -> tuple[tuple[Tensor, Tensor], Held]:
    """Split clean pictures into those to work with, as (x, y), and the last `share` of each class, to choose by.

    Every class keeps at least one picture to work with; if nothing can be held back (one picture a class), both parts
    are all pictures, and `session` says so.
    """
    held = last_of_each(y, share)
    if not held.any():
        session.say(
            "warning: no class has a second picture to hold back, so the choice is by the pictures it learns from"
        )
        return (x, y), Held(x, y, apart=False)
    return (x[~held], y[~held]), Held(x[held], y[held])


def guesses(held: Held, acc: float, least: float, session: Session) -> bool:
    """Whether an accuracy is no more than chance, `least`, which is said."""
    if acc > least:
        return False
    text = f"warning: nothing is pruned: {named(held)} {acc} % is no more than chance ({least:.4g} %)"
    session.say(f"{text}, so it cannot say how much may go")
    return True


def named(held: Held | None) -> str:
    """What the accuracy is called that chooses."""
    if held is None:
        return "test ACC"
    return "held-back ACC" if held.apart else "ACC on the pictures it learns from"


def chance(held: Held) -> float:
    """The accuracy, in percent, of one who always names the commonest class."""
    return 100 * int(held.y.bincount().max()) / len(held.y)
