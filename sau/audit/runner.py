"""An audit: what it is asked, the networks and images that it looks at, and rows of its parts.

A row has `part`, `curve`, `network`, `x`, `seed`, and shares of images. `x` is what the attacker spent: poisoned images
(relearn), the radius eps (white); or the share of the way from the attacked weights (path).
"""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sau.attack import attack_from_config
from sau.attack.triggers import network_digest
from sau.audit import measure
from sau.config import check, param
from sau.data.batches import generator
from sau.data.images import BACKDOOR, Augment, Images, sample, to_float
from sau.data.sources import fingerprint, source
from sau.errors import ConfigError, DataError, RecordError, require
from sau.evaluate import figures, proportions, reestimate_statistics, score
from sau.grid.store import find
from sau.models import Normalized
from sau.record import attack_result
from sau.record.folder import Record, as_json
from sau.report.results import NONE, marked

Part = Literal["statistics", "relearn", "path", "white", "bec"]
Augmented = Literal["released", "fresh"]
PARTS: tuple[Part, ...] = get_args(Part)
CONTROL = "control"  # the network that was trained without a backdoor; `none` is the attacked one
STAMPED = 5000  # training images that are stamped anew where a record's own poisons carry their true labels
RESULT = "audit.json"
Found = tuple[str, float, int, dict[str, Any]]  # curve, x, seed, and what was measured there


@dataclass(frozen=True, kw_only=True)
class AuditConfig:
    """The parts of an audit, and what the attacker may spend in each."""

    parts: tuple[Part, ...] = param(PARTS, "some of statistics, relearn, path, white, bec")
    shots: tuple[int, ...] = param((1, 2, 5, 10, 50), "poisoned images to re-learn from; 0 is always among them", ge=0)
    epochs: int = param(5, "epochs of re-learning", ge=1)
    augmented: tuple[Augmented, ...] = param(
        ("released", "fresh"), "released: the images of re-learning are augmented once; fresh: in every batch"
    )
    share: float = param(0.02, "share of the training images that the attacker has for this", gt=0, le=1)
    eps: tuple[float, ...] = param((0.01, 0.02, 0.05), "rising L-infinity radii of universal perturbations", gt=0, lt=1)
    steps: int = param(100, "gradient steps for each radius", ge=1)
    images: int = param(1000, "triggered training images that a perturbation is fitted to", ge=1)
    seeds: tuple[int, ...] = param((0,), "seeds of the attacker's draws, which are repeated for each", ge=0, lt=2**63)

    def __post_init__(self) -> None:
        check(self, " of the audit")
        for name in ("parts", "shots", "augmented", "eps", "seeds"):
            values = getattr(self, name)
            require(f"{name} of the audit", values, 0 < len(values) == len(set(values)), "one or more, each once")
        require("eps of the audit", self.eps, tuple(sorted(self.eps)) == self.eps, "rising numbers")


@dataclass(frozen=True, eq=False)
class Case:
    """A record with its networks, the attacker's training images, and the test images that figures come from."""

    name: str  # of the record
    networks: dict[str, Normalized]  # frozen, in eval mode: `none`, defenses (marked where test data chose), `control`
    train: Images  # all clean training images; the attacker draws from them
    poisons: Images  # triggered training images whose target label is not their true one
    test: Images  # clean test images
    triggered: Images  # triggered ones, the target class left out; `index` is the place in `test`
    augment: Augment  # how training images are augmented
    notes: tuple[str, ...]  # what there is to say about the images, like that they are a subset
    about: dict[str, Any]  # data set, network and settings of the attack: all but the seed

    @cached_property
    def channels(self) -> measure.Channels:
        return measure.top_tac_channels(self.networks[NONE], self.untriggered, self.triggered)

    @property
    def untriggered(self) -> Images:
        """The test images that `triggered` was made from, in its order."""
        return self.test[self.triggered.index]

    def most_shots(self, share: float) -> int:
        """The most poisons that the attacker's draw, a `share` of the training images, can have."""
        return min(round(share * len(self.train)), len(self.poisons))

    def score(self, model: nn.Module) -> dict[str, Any]:
        return score(model, self.test, self.triggered).summary()


def open_case(
    place: Path, defenses: Sequence[str] = (), control: Path | None = None, *, dataset_path: str | None = None,
    samples: int = 2500, amp: bool | None = None, device: torch.device | str = "cpu",
) -> Case:  # fmt: skip
    """Read the attack in the folder `place`, ours or BackdoorBench's, and the networks to compare.

    These are `defenses` in it, by name (of a grid's folder, like sau_c0.05_0123456789, the first part is enough), and
    `control`, the folder of a `prototype` record on the same images. Figures come from `samples` test images, drawn
    once. None means the data sets where the attack found them, and bf16 (`amp`) as the attack ran.

    Raises RecordError for a clean network, an attacked control or one of other images, and for want of poisons.
    """
    attacked, device = attack_result.load(place), torch.device(device)
    if attacked.triggered is None:
        raise RecordError(f"{place} is a clean network; name the record of an attack, and this one as --control")
    train, test, notes = attacked.images(dataset_path)
    notes += attacked.doubts
    networks = {NONE: attacked.model()}
    for name in defenses:
        folder, model = find(place / "defense", name), attacked.model()
        attack_result.load_weights(model, folder)
        record = Record(folder)
        if record.check(light=True).get("attacked") != attacked.digest:
            raise RecordError(f"{folder} purified another attack than the one that is there now; run the defense again")
        networks[marked(name, record.summary().get("selection"))] = model
    if control is not None:
        found = attack_result.load(control)
        if found.triggered is not None or found.poisoned is not None:
            raise RecordError(f"{control} holds an attacked network; name a record of attack/prototype.py")
        if found.fingerprints is not None and found.fingerprints["train"] != fingerprint(train):
            raise RecordError(f"{control} was trained on other {found.dataset} images; name a record of this data set")
        networks[CONTROL] = found.model()
        if not measure.connected(networks[NONE], networks[CONTROL]):
            raise RecordError(f"{control} holds another network than {place}; train the control like that one")
    for model in networks.values():
        model.amp = bool(attacked.amp) if amp is None else amp
        model.to(device).eval().requires_grad_(False)
    clean, triggered = sample(test, attacked.triggered, samples)
    if triggered is None:
        raise DataError(f"none of {samples} test images has a triggered version; measure on more")
    about = {f"network_{key}": attacked.network[key] for key in ("name", "classes", "width")}
    about = {"dataset": attacked.dataset, **about, **(attacked.settings or {})}
    images = train.to(device), _poisons(attacked, train).to(device), clean.to(device), triggered.to(device)
    return Case(attacked.path.name, networks, *images, source(attacked.dataset).augment, tuple(notes), about)


def _poisons(attacked: attack_result.AttackResult, train: Images) -> Images:
    """Triggered training images that pull towards the attacker's label: the stored ones, or some stamped anew."""
    if (stored := attacked.poisoned) is not None:
        pulling = stored[(stored.role == BACKDOOR) & (stored.labels != stored.true_labels)]
        if len(pulling):
            return pulling
    if not attacked.settings:
        raise RecordError(f"{attacked.path} has no poisoned images with a wrong label, nor settings to make any with")
    attack = attack_from_config(attacked.settings, attacked.trigger)
    # With the trigger of the test: what LC adds in training needs a network that is not loaded here.
    made = attack.poison(train, torch.randperm(len(train), generator=generator(0))[:STAMPED], test=True)
    return made[made.labels != made.true_labels]


def described(case: Case, config: AuditConfig) -> dict[str, Any]:
    """What `audit.json` says of the audit besides its results: record, attack, networks and settings."""
    return {
        "record": case.name, "attack": case.about.get("attack"),
        "networks": {name: network_digest(model.net) for name, model in case.networks.items()},
        "asked": as_json({**asdict(config), "samples": [len(case.test), len(case.triggered)]}),
        "about": as_json({**case.about, "test": fingerprint(case.test)}),
    }  # fmt: skip


def run_audit(case: Case, config: AuditConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is asked, print a line for each row, and return what `audit.json` holds.

    Raises ConfigError for BEC without a control.
    """
    if "bec" in config.parts and CONTROL not in case.networks:
        raise ConfigError("bec needs a network without a backdoor; give --control, or leave bec out of --parts")
    rows, seconds, notes = list[dict[str, Any]](), dict[str, float](), [*case.notes]
    if "relearn" in config.parts and (most := case.most_shots(config.share)) < max(config.shots):
        notes.append(f"the attacker has {most} poisoned images at most")
    apart = [name for name, model in case.networks.items() if not measure.connected(case.networks[NONE], model)]
    notes += [f"no path leads to {name}, which has other layers" for name in apart if "path" in config.parts]
    parts = ["before", *(part for part in PARTS if part in config.parts)]
    if "bec" in parts and not measure.layers(case.networks[NONE]):
        parts.remove("bec")
        notes.append("no bec, which needs a network with at least two convolutions")
    for note in notes:
        say(f"note: {note}")
    for part in parts:
        started = time.monotonic()
        for name, model in case.networks.items():
            for curve, x, seed, found in WORK[part](case, config, name, model):
                rows.append({"part": part, "network": name, "curve": curve, "x": x, "seed": seed, **found})
                figure = f"ASR {found['asr']:.1f} %" if "asr" in found else f"s {found['s']:.3f}"
                say(f"{part:11}{name:16} {curve:20} {x:<6g} {figure}")
        seconds[part] = round(time.monotonic() - started, 2)
    return {**described(case, config), "seconds": seconds, "notes": notes, "rows": rows}


def before(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """ACC, ASR and R-ACC of a network as it is."""
    yield "", 0, 0, case.score(model)


def statistics(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """The same with statistics of batch norm estimated anew on clean images, where a backdoor may hide."""
    images, again = measure.mixture(case.train, case.poisons, 0, share=config.share, seed=0), copy.deepcopy(model)
    reestimate_statistics(again, images, case.augment)
    yield "", 0, 0, case.score(again)


def relearn(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """The same after RA with so many poisons; 0 is always among them."""
    shots = sorted({min(k, case.most_shots(config.share)) for k in (0, *config.shots)})
    for curve, seed, k in product(config.augmented, config.seeds, shots):
        first, later = (None, case.augment) if curve == "fresh" else (case.augment, None)
        images = measure.mixture(case.train, case.poisons, k, share=config.share, seed=seed, augment=first)
        again = measure.relearn(model, images, epochs=config.epochs, seed=seed, augment=later)
        yield curve, k, seed, case.score(again)


def path(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """The same along the path from the attacked network to a purified one of its layers, with statistics of batch norm
    from in between, or estimated anew."""
    start = case.networks[NONE]
    if name in (NONE, CONTROL) or not measure.connected(start, model):
        return
    images = measure.mixture(case.train, case.poisons, 0, share=config.share, seed=0)
    for curve, s in product(("statistics between", "statistics anew"), measure.STEPS):
        there = measure.interpolate(start, model, s)
        if curve == "statistics anew":
            reestimate_statistics(there, images, case.augment)
        yield curve, s, 0, case.score(there)


def white(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """ASR and R-ACC with D, fitted to the network itself, on triggered images or on clean ones alone.

    With the trigger also: noise of the same size, and the same D on the control.
    """
    control = case.networks.get(CONTROL)
    for curve, seed in product(("trigger + D", "D alone"), config.seeds):
        order = torch.randperm(len(case.poisons), generator=generator(seed))
        fitted, shown = case.poisons[order[: config.images]], case.triggered
        if curve == "D alone":  # clean images with the labels that the attacker wants for them
            fitted = replace(fitted, pixels=case.train.pixels[fitted.index])
            shown = replace(shown, pixels=case.untriggered.pixels)
        yield curve, 0.0, seed, _shifted(model, shown)
        for eps, delta in measure.universal(model, fitted, config.eps, steps=config.steps, seed=seed):
            yield curve, eps, seed, _shifted(model, shown, delta)
            if curve == "trigger + D":
                yield "trigger + noise", eps, seed, _shifted(model, shown, measure.noise(shown, eps, generator(seed)))
                if name != CONTROL and control is not None:
                    yield f"same D on {CONTROL}", eps, seed, _shifted(control, shown, delta)


def _shifted(model: nn.Module, shown: Images, delta: Tensor | float = 0.0) -> dict[str, Any]:
    pixels = (to_float(shown.pixels) + delta).clamp(0, 1)
    asr, racc = proportions(model, pixels, shown.labels, shown.true_labels)
    return figures({"asr": asr, "racc": racc})


def bec(case: Case, config: AuditConfig, name: str, model: Normalized) -> Iterator[Found]:
    """How alike a network's reaction to the trigger is to the attacked one's: `s`, the mean of `layers`, and BEC."""
    layers, clean = (measure.similarity(case.networks[NONE], network, case.triggered, case.channels)
                     for network in (model, case.networks[CONTROL]))  # fmt: skip
    s, lowest = (sum(found.values()) / len(found) for found in (layers, clean))
    yield "", 0, 0, {"s": s, "layers": layers, "bec": measure.bec(s, lowest)}


WORK: dict[str, Callable[[Case, AuditConfig, str, Normalized], Iterator[Found]]] = {
    "before": before, "statistics": statistics, "relearn": relearn, "path": path, "white": white, "bec": bec,
}  # fmt: skip
