"""No attack: trains the clean network for comparison."""

from dataclasses import field

from sau.attack.base import Attack, LabelRule
from sau.data.images import Images
from sau.types import Pixels


class Prototype(Attack):
    """Clean training: nothing is poisoned and there is no triggered test set."""

    name = "prototype"
    retired = {}

    pratio: float = field(default=0.0, init=False)
    attack_target: int = field(default=0, init=False)
    attack_label_trans: LabelRule = field(default="all2one", init=False)
    attack_label_shift_amount: int = field(default=1, init=False)
    resilient_rho: float = field(default=0.0, init=False)
    abi: float | None = field(default=None, init=False)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        return x

    def poison_test(self, images: Images) -> Images:
        return images[images.labels[:0]]
