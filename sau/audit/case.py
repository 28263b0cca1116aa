"""What an audit looks at: the networks of a record, and what its attacker has."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sau.attack import Attack, attack_from_config
from sau.attack.lf_search import load_clean
from sau.attack.triggers import network_digest
from sau.data.augment import Augment
from sau.data.images import BACKDOOR, Images, sample
from sau.data.sources import source
from sau.errors import ConfigError, DataError, RecordError
from sau.files import safe_join
from sau.formatting import marked
from sau.grid.store import defense_named
from sau.models import Normalized
from sau.record import attack_result, schema
from sau.record.folder import Record
from sau.seeds import generator

NONE, CONTROL = "none", "control"  # the attacked network itself; the one that was trained without a backdoor
STAMPED = 5000  # training pictures that are stamped anew where a record's own poisons carry their true labels


@dataclass(frozen=True, eq=False)
class Network:
    """One network under audit.

    Args:
        name: `none`, the name of a defense (marked where test data chose), `control`, or `control/` and such a name.
        model: frozen, in eval mode.
        digest: tells weights apart.
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
    """A record with its networks, the attacker's training pictures, and the test pictures that figures come from.

    Args:
        name: of the record.
        digest: of the record.
        attack: what stamps pictures; None if the record does not say.
        networks: by name: the attacked one, those of its defenses, the controls.
        train: all clean training pictures; the attacker draws from them.
        poisons: triggered training pictures whose wanted label is not their true one.
        test: clean test pictures.
        triggered: triggered ones, the target class left out; `index` is the place in `test`.
        augment: how training pictures are augmented.
        notes: what there is to say about the pictures, like that they are a subset.
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
    def controls(self) -> list[Network]:
        """The networks that never had a backdoor."""
        return [network for network in self.networks.values() if network.control]

    @property
    def purified(self) -> list[Network]:
        """The networks of the record's defenses."""
        return [network for network in self.networks.values() if network.name != NONE and not network.control]

    @property
    def untriggered(self) -> Images:
        """The test pictures that `triggered` was made from, in its order."""
        return self.test[self.triggered.index]


def open_case(
    place: Path,
    defenses: Sequence[str] = (),
    control: Path | None = None,
    control_defenses: Sequence[str] = (),
    *,
    dataset_path: str | None = None,
    samples: int = 2500,
    amp: bool | None = None,
    where: torch.device | str = "cpu",
) -> Case:
    """Read a record and the networks to compare.

    Args:
        place: folder of an attack, ours or BackdoorBench's.
        defenses: names of defenses in it; of a grid's folder, like sau_c0.05_0123456789, the first part is enough.
        control: folder of a `prototype` record, on the same pictures.
        control_defenses: names of defenses in that one.
        dataset_path: folder of the data sets; None is where the attack found them.
        samples: test pictures to measure on, drawn once and for all; more than there are means all.
        amp: whether networks run in bf16; None is as the attack's did.
        where: device to work on.

    Raises RecordError for a clean network, an attacked control or one of other pictures, and for want of poisons.
    """
    attacked, there = attack_result.load(place), torch.device(where)
    if attacked.triggered is None:
        raise RecordError(f"{place} is a clean network; name the record of an attack, and this one as --control")
    train, test, notes = attacked.pictures(dataset_path)
    attack = attack_from_config(attacked.settings, attacked.trigger) if attacked.settings else None
    networks = {}
    for name, model in _models(attacked, train, defenses, control, control_defenses).items():
        model.amp = bool(attacked.amp) if amp is None else amp
        networks[name] = Network(name, model.to(where).eval().requires_grad_(False), network_digest(model.net))
    clean, triggered = sample(test, attacked.triggered, samples)
    if triggered is None:
        raise DataError(f"none of {samples} test pictures has a triggered version; measure on more")
    return Case(
        name=attacked.path.name,
        digest=attacked.digest,
        attack=attack,
        networks=networks,
        train=train.to(there),
        poisons=_poisons(attacked, train, attack).to(there),
        test=clean.to(there),
        triggered=triggered.to(there),
        augment=source(attacked.dataset).augment,
        notes=tuple(notes),
        about=_about(attacked),
    )


def _about(attacked: attack_result.AttackResult) -> dict[str, Any]:
    network = {f"network_{key}": attacked.network[key] for key in ("name", "classes", "width")}
    return {"dataset": attacked.dataset, **network, **(attacked.settings or {})}


def _models(
    attacked: attack_result.AttackResult,
    train: Images,
    defenses: Sequence[str],
    control: Path | None,
    more: Sequence[str],
) -> dict[str, Normalized]:
    """The networks to compare, by name; `more` are defenses of the control."""
    models = {NONE: attacked.model()}
    for name in defenses:
        models |= _purified(attacked.model(), attacked.path, attacked.digest, name)
    if control is None and more:
        raise ConfigError("control_defense is given without control; name the record that it lies in")
    if control is not None:
        models[CONTROL] = _clean(control, attacked, train)
        for name in more:
            digest = Record(control).check(light=True)["digest"]
            models |= _purified(_clean(control, attacked, train), control, digest, name, f"{CONTROL}/")
    return models


def _purified(model: Normalized, attack: Path, digest: str, name: str, before: str = "") -> dict[str, Normalized]:
    """`model` with the weights that a defense left, under its name; where test data chose, that says so."""
    place = _place(attack, name)
    attack_result.load_weights(model, place)
    record = Record(place)
    if schema.belongs_to_other_attack(record.check(light=True), digest):
        raise RecordError(f"{place} purified another attack than the one that is there now; run the defense again")
    return {before + marked(name, record.summary().get("selection")): model}


def _place(attack: Path, name: str) -> Path:
    """The folder of a defense: the one called so, or the only one of a grid that is of the defense called so."""
    place = safe_join(attack / "defense", name)
    if place.is_dir():
        return place
    found = sorted(other.name for other in place.parent.glob("*") if defense_named(other.name)[0] == name)
    if len(found) > 1:
        raise RecordError(f"{attack} has several defenses {name}: {', '.join(found)}; name one of these folders")
    return place.with_name(found[0]) if found else place


def _clean(place: Path, attacked: attack_result.AttackResult, train: Images) -> Normalized:
    """A control, of the attacked network's architecture."""
    model = load_clean(place, train)
    wanted = {name: tensor.shape for name, tensor in attacked.weights.items()}
    if {name: tensor.shape for name, tensor in model.net.state_dict().items()} != wanted:
        raise RecordError(f"{place} holds another network than {attacked.path}; train the control like that one")
    return model


def _poisons(attacked: attack_result.AttackResult, train: Images, attack: Attack | None) -> Images:
    """Triggered training pictures that pull towards the attacker's label: the stored ones, or some stamped anew."""
    stored = attacked.poisoned
    if stored is not None:
        pulling = (stored.role == BACKDOOR) & (stored.labels != stored.true_labels)
        if pulling.any():
            return stored[pulling.nonzero()[:, 0]]
    if attack is None:
        raise RecordError(
            f"{attacked.path} has no poisoned pictures with a wrong label, and does not say how to make any"
        )
    order = torch.randperm(len(train), generator=generator(0))[:STAMPED]
    made = attack.poison(train[order])
    return made[(made.labels != made.true_labels).nonzero()[:, 0]]
