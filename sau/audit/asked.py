"""What an audit is asked: its parts, and how much the attacker may spend in each."""

from dataclasses import dataclass
from typing import Literal, get_args

from sau.errors import require
from sau.perturb import RADII, is_radius

Part = Literal["relearn", "path", "white", "transfer", "bec"]
PARTS: tuple[Part, ...] = get_args(Part)
READERS: dict[str, tuple[str, ...]] = {  # the parts that look at a setting
    "shots": ("relearn",),
    "epochs": ("relearn",),
    "share": ("relearn", "path"),
    "eps": ("white", "transfer"),
    "steps": ("white", "transfer"),
    "pictures": ("white", "transfer"),
    "seeds": ("relearn", "white", "transfer"),
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The settings of an audit.

    Args:
        parts: some of relearn, path, white, transfer, bec.
        shots: poisoned pictures that the attacker re-learns from; 0 is always among them.
        epochs: of re-learning.
        share: of the training pictures that the attacker draws for it, and for the statistics on the path.
        eps: L-infinity radii of universal perturbations in [0, 1] pixels, rising.
        steps: gradient steps for each radius.
        pictures: triggered training pictures that a perturbation is fitted to.
        seeds: of the attacker's draws; everything that draws is repeated for each.
    """

    parts: tuple[Part, ...] = PARTS
    shots: tuple[int, ...] = (1, 2, 5, 10, 50)
    epochs: int = 5
    share: float = 0.02
    eps: tuple[float, ...] = (0.01, 0.02, 0.05)
    steps: int = 100
    pictures: int = 1000
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        rising = bool(self.eps) and tuple(sorted(set(self.eps))) == self.eps
        rules = (
            ("parts", bool(self.parts) and set(self.parts) <= set(PARTS), f"some of {', '.join(PARTS)}"),
            ("shots", bool(self.shots) and min(self.shots) >= 0, "numbers, 0 and more"),
            ("epochs", self.epochs >= 1, "1 and more"),
            ("share", 0 < self.share <= 1, "above 0 and up to 1"),
            ("eps", rising and all(is_radius(eps, "L_inf") for eps in self.eps), f"rising numbers, {RADII}"),
            ("steps", self.steps >= 1, "1 and more"),
            ("pictures", self.pictures >= 1, "1 and more"),
            ("seeds", bool(self.seeds) and 0 <= min(self.seeds) <= max(self.seeds) < 2**63, "numbers, 0 to 2^63 - 1"),
            ("seeds", len(set(self.seeds)) == len(self.seeds), "each seed once"),
        )
        for name, fine, allowed in rules:
            require(f"{name} of the audit", getattr(self, name), fine, allowed)

    def idle(self) -> dict[str, str]:
        """Settings that none of the parts looks at, each with those that would."""
        unread = {name: readers for name, readers in READERS.items() if not {*readers} & {*self.parts}}
        return {name: f"it is for {', '.join(readers)} of --parts" for name, readers in unread.items()}
