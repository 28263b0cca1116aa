"""What an audit does, and what it looks at: the networks of a record, and what its attacker has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sau.attack import attack_from_config
from sau.attack.lf_search import load_clean
from sau.config import check, param
from sau.data.images import BACKDOOR, Augment, Images, sample
from sau.data.sources import source
from sau.errors import DataError, RecordError, require
from sau.files import safe_join
from sau.grid.store import defense_named
from sau.models import Normalized
from sau.record import attack_result
from sau.record.folder import Record
from sau.util import generator, marked

Part = Literal["relearn", "path", "white", "bec"]
PARTS: tuple[Part, ...] = get_args(Part)
NONE, CONTROL = "none", "control"  # the attacked network itself; the one that was trained without a backdoor
STAMPED = 5000  # training images that are stamped anew where a record's own poisons carry their true labels


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """The parts of an audit, and what the attacker may spend in each."""

    parts: tuple[Part, ...] = param(PARTS, "some of relearn, path, white, bec")
    shots: tuple[int, ...] = param(
        (1, 2, 5, 10, 50), "poisoned images that the attacker re-learns from; 0 is always among them", ge=0
    )
    epochs: int = param(5, "epochs of re-learning", ge=1)
    share: float = param(
        0.02, "share of the training images, for re-learning and for the statistics of the path", gt=0, le=1
    )
    eps: tuple[float, ...] = param(
        (0.01, 0.02, 0.05), "L-infinity radii of universal perturbations in [0, 1] pixels, rising", gt=0, lt=1
    )
    steps: int = param(100, "gradient steps for each radius", ge=1)
    images: int = param(1000, "triggered training images that a perturbation is fitted to", ge=1)
    seeds: tuple[int, ...] = param(
        (0,), "seeds of the attacker's draws; everything that draws is repeated for each", ge=0, lt=2**63
    )

    def __post_init__(self) -> None:
        check(self, " of the audit")
        for name in ("parts", "shots", "eps", "seeds"):
            values = getattr(self, name)
            require(f"{name} of the audit", values, 0 < len(values) == len(set(values)), "one or more, each once")
        require("eps of the audit", self.eps, tuple(sorted(self.eps)) == self.eps, "rising numbers")


@dataclass(frozen=True, eq=False)
class Case:
    """A record with its networks, the attacker's training images, and the test images that figures come from.

    Args:
        name: of the record.
        networks: frozen, in eval mode: `none`, the attacked one; those of its defenses by their names, marked where
            test data chose; and `control`.
        train: all clean training images; the attacker draws from them.
        poisons: triggered training images whose target label is not their true one.
        test: clean test images.
        triggered: triggered ones, the target class left out; `index` is the place in `test`.
        augment: how training images are augmented.
        notes: what there is to say about the images, like that they are a subset.
        about: data set, network and settings of the attack: all but the seed.
    """

    name: str
    networks: dict[str, Normalized]
    train: Images
    poisons: Images
    test: Images
    triggered: Images
    augment: Augment
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def untriggered(self) -> Images:
        """The test images that `triggered` was made from, in its order."""
        return self.test[self.triggered.index]


def open_case(
    place: Path, defenses: Sequence[str] = (), control: Path | None = None, *, dataset_path: str | None = None,
    samples: int = 2500, amp: bool | None = None, where: torch.device | str = "cpu",
) -> Case:  # fmt: skip
    """Read a record and the networks to compare.

    Args:
        place: folder of an attack, ours or BackdoorBench's.
        defenses: names of defenses in it; of a grid's folder, like sau_c0.05_0123456789, the first part is enough.
        control: folder of a `prototype` record, on the same images.
        dataset_path: folder of the data sets; None is where the attack found them.
        samples: test images to measure on, drawn once and for all; more than there are means all.
        amp: whether networks run in bf16; None is as the attack's did.
        where: device to work on.

    Raises RecordError for a clean network, an attacked control or one of other images, and for want of poisons.
    """
    attacked, there = attack_result.load(place), torch.device(where)
    if attacked.triggered is None:
        raise RecordError(f"{place} is a clean network; name the record of an attack, and this one as --control")
    train, test, notes = attacked.images(dataset_path)
    networks = {NONE: attacked.model(), **dict(_purified(attacked, name) for name in defenses)}
    if control is not None:
        networks[CONTROL] = load_clean(control, train)
        shapes = [{name: t.shape for name, t in networks[one].net.state_dict().items()} for one in (NONE, CONTROL)]
        if shapes[0] != shapes[1]:
            raise RecordError(f"{control} holds another network than {place}; train the control like that one")
    for model in networks.values():
        model.amp = bool(attacked.amp) if amp is None else amp
        model.to(there).eval().requires_grad_(False)
    clean, triggered = sample(test, attacked.triggered, samples)
    if triggered is None:
        raise DataError(f"none of {samples} test images has a triggered version; measure on more")
    network = {f"network_{key}": attacked.network[key] for key in ("name", "classes", "width")}
    return Case(
        attacked.path.name, networks, train.to(there), _poisons(attacked, train).to(there), clean.to(there),
        triggered.to(there), source(attacked.dataset).augment, tuple(notes),
        {"dataset": attacked.dataset, **network, **(attacked.settings or {})},
    )  # fmt: skip


def _purified(attacked: attack_result.AttackResult, name: str) -> tuple[str, Normalized]:
    """A defense, marked where test data chose, and the network that it left."""
    place = safe_join(attacked.path / "defense", name)
    if not place.is_dir():
        found = sorted(other.name for other in place.parent.glob("*") if defense_named(other.name)[0] == name)
        if len(found) > 1:
            raise RecordError(f"{attacked.path} has several defenses {name}: {', '.join(found)}; name one of these")
        place = place.with_name(found[0]) if found else place
    model, record = attacked.model(), Record(place)
    attack_result.load_weights(model, place)
    if attacked.digest is not None and record.check(light=True).get("attacked") != attacked.digest:
        raise RecordError(f"{place} purified another attack than the one that is there now; run the defense again")
    return marked(name, record.summary().get("selection")), model


def _poisons(attacked: attack_result.AttackResult, train: Images) -> Images:
    """Triggered training images that pull towards the attacker's label: the stored ones, or some stamped anew."""
    if (stored := attacked.poisoned) is not None:
        pulling = (stored.role == BACKDOOR) & (stored.labels != stored.true_labels)
        if pulling.any():
            return stored[pulling.nonzero()[:, 0]]
    if not attacked.settings:
        raise RecordError(f"{attacked.path} has no poisoned images with a wrong label, nor settings to make any with")
    attack = attack_from_config(attacked.settings, attacked.trigger)
    made = attack.poison(train[torch.randperm(len(train), generator=generator(0))[:STAMPED]])
    return made[(made.labels != made.true_labels).nonzero()[:, 0]]
