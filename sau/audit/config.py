"""What an audit does, and what it looks at: the networks of a record, and what its attacker has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from sau.attack import Attack, attack_from_config
from sau.attack.lf_search import load_clean
from sau.attack.triggers import network_digest
from sau.config import check, param
from sau.data.images import BACKDOOR, Augment, Images, sample
from sau.data.sources import source
from sau.errors import ConfigError, DataError, RecordError, require
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
        for name in ("parts", "shots", "eps", "seeds"):
            values = getattr(self, name)
            require(f"{name} of the audit", values, 0 < len(values) == len(set(values)), "one or more, each once")
        require("eps of the audit", self.eps, tuple(sorted(self.eps)) == self.eps, "rising numbers")


@dataclass(frozen=True, eq=False)
class Network:
    """One network under audit.

    Args:
        name: `none`, the name of a defense (marked where test data chose), `control`, or `control/` and such a name.
        model: frozen, in eval mode.
        digest: of its weights.
    """

    name: str
    model: Normalized
    digest: str

    @property
    def control(self) -> bool:
        """Whether it never had a backdoor."""
        return self.name.split("/")[0] == CONTROL


@dataclass(frozen=True, eq=False)
class Case:
    """A record with its networks, the attacker's training images, and the test images that figures come from.

    Args:
        name: of the record.
        digest: of the record.
        attack: what stamps images; None if the record does not say.
        networks: by name: the attacked one, those of its defenses, the controls.
        train: all clean training images; the attacker draws from them.
        poisons: triggered training images whose target label is not their true one.
        test: clean test images.
        triggered: triggered ones, the target class left out; `index` is the place in `test`.
        augment: how training images are augmented.
        notes: what there is to say about the images, like that they are a subset.
        about: data set, network and settings of the attack: all but the seed.
    """

    name: str
    digest: str
    attack: Attack | None
    networks: dict[str, Network]
    train: Images
    poisons: Images
    test: Images
    triggered: Images
    augment: Augment
    notes: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def purified(self) -> list[Network]:
        """The networks of the record's defenses."""
        return [network for network in self.networks.values() if network.name != NONE and not network.control]

    @property
    def untriggered(self) -> Images:
        """The test images that `triggered` was made from, in its order."""
        return self.test[self.triggered.index]


def open_case(
    place: Path, defenses: Sequence[str] = (), control: Path | None = None, control_defenses: Sequence[str] = (), *,
    dataset_path: str | None = None, samples: int = 2500, amp: bool | None = None, where: torch.device | str = "cpu",
) -> Case:  # fmt: skip
    """Read a record and the networks to compare.

    Args:
        place: folder of an attack, ours or BackdoorBench's.
        defenses: names of defenses in it; of a grid's folder, like sau_c0.05_0123456789, the first part is enough.
        control: folder of a `prototype` record, on the same images.
        control_defenses: names of defenses in that one.
        dataset_path: folder of the data sets; None is where the attack found them.
        samples: test images to measure on, drawn once and for all; more than there are means all.
        amp: whether networks run in bf16; None is as the attack's did.
        where: device to work on.

    Raises RecordError for a clean network, an attacked control or one of other images, and for want of poisons.
    """
    attacked, there = attack_result.load(place), torch.device(where)
    if attacked.triggered is None:
        raise RecordError(f"{place} is a clean network; name the record of an attack, and this one as --control")
    if control is None and control_defenses:
        raise ConfigError("control_defense is given without control; name the record that it lies in")
    train, test, notes = attacked.images(dataset_path)
    models = {NONE: attacked.model()}
    for name in defenses:
        models |= _purified(attacked.model(), attacked.path, attacked.digest, name)
    if control is not None:
        models[CONTROL] = _control(control, attacked, train)
        for name in control_defenses:
            digest = Record(control).check(light=True)["digest"]
            models |= _purified(_control(control, attacked, train), control, digest, name, f"{CONTROL}/")
    networks = {}
    for name, model in models.items():
        model.amp = bool(attacked.amp) if amp is None else amp
        networks[name] = Network(name, model.to(where).eval().requires_grad_(False), network_digest(model.net))
    clean, triggered = sample(test, attacked.triggered, samples)
    if triggered is None:
        raise DataError(f"none of {samples} test images has a triggered version; measure on more")
    attack = attack_from_config(attacked.settings, attacked.trigger) if attacked.settings else None
    network = {f"network_{key}": attacked.network[key] for key in ("name", "classes", "width")}
    return Case(
        attacked.path.name, attacked.digest, attack, networks,
        train.to(there), _poisons(attacked, train, attack).to(there), clean.to(there), triggered.to(there),
        source(attacked.dataset).augment, tuple(notes),
        {"dataset": attacked.dataset, **network, **(attacked.settings or {})},
    )  # fmt: skip


def _purified(model: Normalized, attack: Path, digest: str, name: str, before: str = "") -> dict[str, Normalized]:
    """`model` with the weights that a defense left, under its name; where test data chose, that says so."""
    place = safe_join(attack / "defense", name)
    if not place.is_dir():
        found = sorted(other.name for other in place.parent.glob("*") if defense_named(other.name)[0] == name)
        if len(found) > 1:
            raise RecordError(f"{attack} has several defenses {name}: {', '.join(found)}; name one of these folders")
        place = place.with_name(found[0]) if found else place
    attack_result.load_weights(model, place)
    record = Record(place)
    if digest is not None and record.check(light=True).get("attacked") != digest:
        raise RecordError(f"{place} purified another attack than the one that is there now; run the defense again")
    return {before + marked(name, record.summary().get("selection")): model}


def _control(place: Path, attacked: attack_result.AttackResult, train: Images) -> Normalized:
    """A control, of the attacked network's architecture."""
    model = load_clean(place, train)
    expected = {name: tensor.shape for name, tensor in attacked.weights.items()}
    if {name: tensor.shape for name, tensor in model.net.state_dict().items()} != expected:
        raise RecordError(f"{place} holds another network than {attacked.path}; train the control like that one")
    return model


def _poisons(attacked: attack_result.AttackResult, train: Images, attack: Attack | None) -> Images:
    """Triggered training images that pull towards the attacker's label: the stored ones, or some stamped anew."""
    stored = attacked.poisoned
    if stored is not None:
        pulling = (stored.role == BACKDOOR) & (stored.labels != stored.true_labels)
        if pulling.any():
            return stored[pulling.nonzero()[:, 0]]
    if attack is None:
        raise RecordError(f"{attacked.path} has no poisoned images with a wrong label, nor settings to make any with")
    made = attack.poison(train[torch.randperm(len(train), generator=generator(0))[:STAMPED]])
    return made[(made.labels != made.true_labels).nonzero()[:, 0]]
