"""What an audit is asked: its parts, and how much the attacker may spend in each."""

from dataclasses import dataclass
from typing import Literal, get_args

from sau.config import check, param
from sau.errors import require

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
    """The settings of an audit."""

    parts: tuple[Part, ...] = param(PARTS, "some of relearn, path, white, transfer, bec")
    shots: tuple[int, ...] = param(
        (1, 2, 5, 10, 50), "poisoned images that the attacker re-learns from; 0 is always among them", ge=0
    )
    epochs: int = param(5, "epochs of re-learning", ge=1)
    share: float = param(
        0.02, "share of the training images that the attacker draws for it and for the path's statistics", gt=0, le=1
    )
    eps: tuple[float, ...] = param(
        (0.01, 0.02, 0.05), "L-infinity radii of universal perturbations in [0, 1] pixels, rising", gt=0, lt=1
    )
    steps: int = param(100, "gradient steps for each radius", ge=1)
    pictures: int = param(1000, "triggered training images that a perturbation is fitted to", ge=1)
    seeds: tuple[int, ...] = param(
        (0,), "seeds of the attacker's draws; everything that draws is repeated for each", ge=0, lt=2**63
    )

    def __post_init__(self) -> None:
        check(self, " of the audit")
        rising = bool(self.eps) and tuple(sorted(set(self.eps))) == self.eps
        rules = (
            ("parts", bool(self.parts), f"some of {', '.join(PARTS)}"),
            ("shots", bool(self.shots), "one number or more"),
            ("eps", rising, "rising numbers"),
            ("seeds", bool(self.seeds) and len(set(self.seeds)) == len(self.seeds), "one seed or more, each once"),
        )
        for name, fine, allowed in rules:
            require(f"{name} of the audit", getattr(self, name), fine, allowed)

    def idle(self) -> dict[str, str]:
        """Settings that none of the parts looks at, each with those that would."""
        unread = {name: readers for name, readers in READERS.items() if not {*readers} & {*self.parts}}
        return {name: f"it is for {', '.join(readers)} of --parts" for name, readers in unread.items()}
