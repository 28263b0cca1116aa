"""Which pictures are poisoned and where their trigger leads: what all attacks share."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sau.config import Method, param
from sau.data.images import Images
from sau.errors import ConfigError, DataError
from sau.formatting import at_most
from sau.types import Labels


@dataclass(frozen=True, kw_only=True)
class Labelling(Method):
    """A label rule."""

    in_batch: ClassVar[bool] = False  # poisons inside the training batches, so that the training set stays as it is
    clean_label: ClassVar[bool] = False  # poisons pictures of the target class alone and leaves their labels

    attack_target: int = param(
        0, "class that triggered images shall be given (all2one)", ge=0, aliases=("target_label",)
    )
    attack_label_trans: Literal["all2one", "all2all", "map"] = param(
        "all2one",
        "all2one (every trigger leads to the target), all2all (class y leads to y + shift) or map (class y leads "
        "to the y-th entry of attack_label_map)",
    )
    attack_label_shift_amount: int = param(1, "the shift of all2all")
    attack_label_map: tuple[int, ...] = param(
        (), "one class for each class, like 1,0,2; a class that leads to itself is not attacked"
    )
    pratio: float = param(0.1, "poisoned share of the whole training set", ge=0, le=1, aliases=("poison_ratio",))

    def __post_init__(self) -> None:
        super().__post_init__()
        rule, given = self.attack_label_trans, bool(self.attack_label_map)
        self.require("attack_label_map", given == (rule == "map"), "a list of classes with attack_label_trans map only")
        alone = f"all2one, as {self.name} leaves labels as they are and so can lead to one class only"
        self.require("attack_label_trans", rule == "all2one" or not self.clean_label, alone)

    def relabel(self, labels: Labels, num_classes: int) -> Labels:
        """The labels that the attacker wants for triggered pictures of these classes."""
        if self.attack_label_trans == "all2one":
            return torch.full_like(labels, self.attack_target)
        if self.attack_label_trans == "map":
            return labels.new_tensor(self.attack_label_map)[labels]
        return (labels + self.attack_label_shift_amount) % num_classes

    def check_labels(self, images: Images) -> None:
        """ConfigError if the rule does not fit the classes of `images`, DataError if they are no `Images`."""
        if not isinstance(images, Images):
            raise DataError(f"pictures are a {type(images).__name__}, allowed are Images; see Images.clean")
        classes, rule = images.num_classes, self.attack_label_trans
        for name, labels in (("attack_target", (self.attack_target,)), ("attack_label_map", self.attack_label_map)):
            self.require(name, all(0 <= label < classes for label in labels), f"0..{classes - 1}")
        whole = rule != "map" or len(self.attack_label_map) == classes
        self.require("attack_label_map", whole, f"{classes} classes, one for each")
        stays = rule == "map" and list(self.attack_label_map) == list(range(classes))
        self.require("attack_label_map", not stays, "a map that leads some class elsewhere")
        self.require("attack_label_trans", rule != "all2all" or classes > 1, "all2one where there is one class alone")
        moves = rule != "all2all" or self.attack_label_shift_amount % classes != 0
        self.require("attack_label_shift_amount", moves, f"no multiple of the number of classes, {classes}")

    def candidates(self, images: Images) -> Tensor:
        """Indices of the pictures that may be poisoned: all of them, the target class included; of a clean-label attack
        those of the target class, of a map those that it leads elsewhere."""
        labels = images.true_labels
        if self.clean_label:
            return (labels == self.attack_target).nonzero().flatten()
        if self.attack_label_trans == "map":
            return (self.relabel(labels, images.num_classes) != labels).nonzero().flatten()
        return torch.arange(len(images), device=labels.device)

    def check(self, images: Images) -> int:
        """How many of these training pictures are poisoned before training; ConfigError if they cannot be."""
        self.check_labels(images)
        if self.attack_label_trans == "all2one":
            present = bool((images.true_labels == self.attack_target).any())
            self.require("attack_target", present, "a class that has training pictures")
        candidates, count = len(self.candidates(images)), 0 if self.in_batch else round(self.pratio * len(images))
        if count > candidates:
            raise ConfigError(
                f"pratio is {self.pratio}, which is {count} of {len(images)} pictures, but {self.name} may poison "
                f"{candidates} of them; allowed is up to {at_most(candidates / len(images)) if candidates else 0}"
            )
        return count
