"""What an audit looks at: the networks of a record, and what its attacker has."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from sau import victim
from sau.attack.base import Attack
from sau.attack.lf_network import recorded
from sau.attack.recall import recall
from sau.attack.workshop import fingerprint
from sau.data.augment import Augment
from sau.data.images import BACKDOOR, Images
from sau.data.sources import source
from sau.errors import ConfigError, DataError, RecordError
from sau.files import folder
from sau.models import Normalized
from sau.report.names import defense_named
from sau.risk import sample
from sau.seeds import generator

NONE, CONTROL = "none", "control"  # the attacked network itself; the one that was trained without a backdoor
STAMPED = 5000  # training pictures that are stamped anew where a record's own poisons carry their true labels


@dataclass(frozen=True, eq=False)
class Network:
    """One network under audit.

    Args:
        name: `none`, the name of a defense, `control`, or `control/` and the name of a defense.
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


def _network(name: str, model: Normalized, bf16: bool) -> Network:
    model.amp = bf16
    return Network(name, model.eval().requires_grad_(False), fingerprint(model.net))


def _purified(attacked: Callable[[], Normalized], place: Path, defenses: Sequence[str]) -> dict[str, Normalized]:
    """The networks of the defenses, called by their method where the folder of a grid says more, if that is unique."""
    short = [defense_named(name)[0] for name in defenses]
    found = {}
    for name, one in zip(defenses, short, strict=True):
        model = found[one if short.count(one) == 1 else name] = attacked()
        victim.load_weights(model, folder(place / "defense", name))
    return found


def _controls(clean: Callable[[], Normalized], place: Path, defenses: Sequence[str]) -> dict[str, Normalized]:
    again = _purified(clean, place, defenses)
    return {CONTROL: clean(), **{f"{CONTROL}/{name}": model for name, model in again.items()}}


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
        defenses: names of defenses in it.
        control: folder of a `prototype` record, on the same pictures.
        control_defenses: names of defenses in that one.
        dataset_path: folder of the data sets; None is where the attack found them.
        samples: test pictures to measure on, drawn once and for all; more than there are means all.
        amp: whether networks run in bf16; None is as the attack's did.
        where: device to work on.

    Raises RecordError for a clean network, for a control that was attacked or saw other pictures, and for a record
    without poisoned training pictures to learn from.
    """
    if control is None and control_defenses:
        raise ConfigError("control_defense is given without control; name the record that it lies in")
    attacked = victim.load(place)
    if attacked.triggered is None:
        raise RecordError(f"{place} is a clean network; name the record of an attack, and this one as --control")
    train, test, _ = attacked.pictures(dataset_path or attacked.dataset_path)
    attack = recall(attacked.settings, attacked.trigger) if attacked.settings else None
    models = {NONE: attacked.model(), **_purified(attacked.model, attacked.path, defenses)}
    if control is not None:
        models |= _controls(partial(_clean, control, attacked, train), control, control_defenses)
    there, bf16 = torch.device(where), bool(attacked.amp) if amp is None else amp
    clean, triggered = sample(test, attacked.triggered, samples)
    if triggered is None:
        raise DataError(f"none of {samples} test pictures has a triggered version; measure on more")
    given = {"train": train.to(there), "test": clean.to(there), "triggered": triggered.to(there)}
    return Case(
        name=attacked.path.name,
        digest=attacked.digest,
        attack=attack,
        networks={name: _network(name, model.to(there), bf16) for name, model in models.items()},
        poisons=_poisons(attacked, train, attack).to(there),
        **given,
        augment=source(attacked.dataset).augment,
    )


def _clean(place: Path, attacked: victim.Victim, train: Images) -> Normalized:
    """A control, of the attacked network's architecture."""
    model = recorded(place, train)
    wanted = {name: tensor.shape for name, tensor in attacked.weights.items()}
    if {name: tensor.shape for name, tensor in model.net.state_dict().items()} != wanted:
        raise RecordError(
            f"{place} holds another network than {attacked.path}; train the control like the attacked one"
        )
    return model


def _poisons(attacked: victim.Victim, train: Images, attack: Attack | None) -> Images:
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
    made = attack.poisoned(train[order])
    return made[(made.labels != made.true_labels).nonzero()[:, 0]]
