"""What an attack leaves: the network and its images, written to and read from a result folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sau.data import readers, sources
from sau.data.images import Images
from sau.defense.npd import insert_polarizers
from sau.errors import MALFORMED, DataError, RecordError
from sau.files import is_number
from sau.models import Normalized, build, state_dict_spec
from sau.record.folder import ATTACK, CONFIG, Record, run_kind

BACKDOORBENCH = "attack_result.pt"  # the file in which BackdoorBench stores an attack
_NETWORK = ("name", "classes", "width", "shape", "mean", "std")
NOT_TAKEN = "the attack of this record did not take, so that its figures say nothing"


@dataclass(frozen=True, eq=False)
class AttackResult:
    """An attacked network and its images, read from our folder or from BackdoorBench's, which leaves what follows
    `digest` at None, and fingerprints and recipe, too."""

    path: Path
    network: dict[str, Any]  # how to build it: name, classes, width, shape, mean, std
    weights: dict[str, Tensor]  # its state dict
    triggered: Images | None  # the test set of ASR and R-ACC; None for a clean network
    poisoned: Images | None  # the poisoned training images; None if there are none or the attack kept none
    dataset: str
    dataset_path: str  # where the attack found it
    recipe: str | None
    fingerprints: dict[str, str] | None  # of the clean training and test images
    lengths: tuple[int | None, int | None]  # training and test images that the attack saw; None means all
    digest: str  # tells attacks apart
    settings: dict[str, Any] | None = None  # of the attack, by name, its own name as `attack`
    trigger: dict[str, Tensor] | None = None  # the tensors of what stamps further images; None where a formula does
    amp: bool | None = None  # whether the attack's network ran in bf16
    gate: dict[str, Any] | None = None  # as in `summary.json`; None without a gate

    def training_images(self, train: Images, needs: Literal["none", "clean", "poisoned"]) -> tuple[Images, str]:
        """`train` for a defense that `needs` such images, and their kind: `poisoned`, with the poisoned ones in their
        places, or `clean`, as all of a clean network are. RecordError if the attack did not keep the poisoned ones."""
        bad = self.poisoned
        if needs != "poisoned" or (bad is None and self.settings and not self.settings.get("pratio")):
            return train, "clean"
        if bad is None:
            raise RecordError(f"{self.path} holds no poisoned training images, as this defense needs; take another")
        return train.replace_rows(bad, bad.index), "poisoned"

    @property
    def doubts(self) -> list[str]:
        """A line if the attack did not pass its gate, so that nothing measured on it counts."""
        missed = self.gate is not None and not self.gate["passed"]
        return [NOT_TAKEN] if missed else []

    def model(self) -> Normalized:
        """The attacked network, new at each call, on the CPU, in eval mode. ConfigError for an unknown network,
        RecordError if the weights have other names or shapes, which is known before memory is allocated: a record may
        claim any size."""
        rest = {key: self.network[key] for key in ("width", "shape", "mean", "std")}
        make = partial(build, self.network["name"], self.network["classes"], **rest)
        check_state_dict(state_dict_spec(lambda: make().net), self.weights, self.path, self.network["name"])
        model = make()
        model.net.load_state_dict(self.weights)
        return model.eval()

    def images(self, dataset_path: str | None = None, download: bool = True) -> tuple[Images, Images, list[str]]:
        """The clean training and test images that the attack saw, and notes about them. `dataset_path` is where they
        are; None is where the attack found them, and nothing is downloaded there but into ./data, nor elsewhere without
        `download`. DataError if they are not there, RecordError if others are."""
        place = dataset_path or self.dataset_path
        download &= dataset_path is not None or place == sources.DATA_FOLDER
        if not download and readers.needs_download(self.dataset, Path(place)):
            raise DataError(f"there is no {self.dataset} under {place}; give its --dataset_path")
        every = sources.load(self.dataset, place, self.network["shape"][1])
        notes = sources.subset_note(self.dataset, *every)
        marks = dict(zip(("train", "test"), map(sources.fingerprint, every), strict=True))
        same, seen = self.fingerprints in (None, marks), list[Images]()
        parts = zip(("training", "test"), every, self.lengths, (self.poisoned, self.triggered), strict=True)
        for name, images, length, bad in parts:
            if length is not None and length < len(images):
                notes.append(f"the attack saw the first {length} of {len(images)} {name} images; this run sees those")
                images = images[torch.arange(length)]
            same = same and length in (None, len(images))
            if bad is not None:  # made from these images
                same = same and int(bad.index.max()) < len(images) and images.labels[bad.index].equal(bad.true_labels)
            seen.append(images)
        if not same:
            raise RecordError(f"{place} holds other {self.dataset} images than the attack saw; correct --dataset_path")
        return seen[0], seen[1], notes


def save(
    record: Record, model: Normalized, poisoned: Images, triggered: Images, trigger: nn.Module | None = None
) -> None:
    """Write the weights, the poisoned training images, the triggered test set and the trigger's tensors."""
    record.save_tensors("model", model.net.state_dict())
    for part, images in (("poisoned", poisoned), ("triggered", triggered)):
        if len(images):
            record.save_tensors(part, images.tensors())
    if trigger is not None:
        record.save_tensors("trigger", trigger.state_dict())


def load(path: Path) -> AttackResult:
    """Read a finished attack of ours, after checking it, or a folder with BackdoorBench's `attack_result.pt`."""
    if (path / BACKDOORBENCH).is_file() and not (path / CONFIG).is_file():
        from sau.compat import backdoorbench  # which needs this module

        return backdoorbench.read(path)
    record = Record(path)
    config = record.check()
    if (kind := run_kind(config)) != ATTACK:
        raise RecordError(f"{path} is the folder of {kind}; name that of an attack")
    try:
        network = {key: config["model"][key] for key in _NETWORK}
        sizes = [network["classes"], network["width"] or 1, *network["shape"]]
        if len(sizes) != 5 or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"no network can be built of {network}")
        data, run = config["data"], config["run"]
        return AttackResult(
            path=path, network=network, weights=record.load_tensors("model"),
            triggered=load_images(record, "triggered"), poisoned=load_images(record, "poisoned"),
            dataset=str(data["dataset"]), dataset_path=str(run["dataset_path"]), recipe=run["recipe"],
            fingerprints={part: data[part] for part in ("train", "test")}, lengths=(None, None),
            digest=config["digest"], settings=config.get("method"),
            trigger=record.load_tensors("trigger") if (path / "trigger.safetensors").is_file() else None,
            amp=bool(config["amp"]) if "amp" in config else None, gate=gate(record.summary(), path),
        )  # fmt: skip
    except RecordError:
        raise
    except MALFORMED as error:
        raise RecordError(f"{path / CONFIG} is not complete ({error}); make the folder again") from None


def gate(summary: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """`gate` of a summary, `{"asr": least ASR in percent, "passed": bool}`, or None; RecordError for anything else."""
    found = summary.get("gate")
    if found is None:
        return None
    if isinstance(found, dict) and type(found.get("passed")) is bool:
        if is_number(least := found.get("asr")) and 0 <= least <= 100:
            return found
    raise RecordError(f"{folder}: gate is {str(found)[:60]!r}, allowed are asr, 0 to 100, and passed, true or false")


def load_images(record: Record, part: str) -> Images | None:
    """The `triggered` or `poisoned` images of a checked record; None for a clean network, which has none."""
    if not (record.path / f"{part}.safetensors").is_file():
        return None
    try:
        images = Images.restore(record.load_tensors(part), record.config["model"]["classes"])
    except DataError as error:
        raise RecordError(f"{record.path / part}.safetensors: {error}") from None
    if (got := list(images.pixels.shape[1:])) != (wanted := record.config["model"]["shape"]):
        raise RecordError(f"{record.path / part}.safetensors has images {got}, but the network takes {wanted}")
    return images


def load_weights(model: nn.Module, place: str | Path) -> None:
    """Load the weights of a .safetensors file, or of the folder of a finished run of ours, into `model`. Their names
    may be those of `model` or of the `net` inside it; where NPD put a polarizer, one is added to `model`. RecordError
    if it is no such file or folder, damaged, unfinished, or of another network."""
    place = Path(place)
    if place.is_dir():
        (record := Record(place)).check()
        weights = record.load_tensors("model")
    elif place.suffix == ".safetensors":
        weights = Record(place.parent).load_tensors(place.stem)
    else:
        raise RecordError(f"{place} is no folder of a finished run and no .safetensors file; give one of the two")
    insert_polarizers(model, [*weights, *(f"net.{name}" for name in weights)])
    own = model.state_dict()
    named = {f"net.{name}" if f"net.{name}" in own else name: tensor for name, tensor in weights.items()}
    check_state_dict(own, named, place, "the network")
    model.load_state_dict(named)


def check_state_dict(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path, whose: str) -> None:
    """RecordError unless names and shapes are the same."""
    for name in {**own, **weights}:
        got, wanted = (tuple(part[name].shape) if name in part else "nothing" for part in (weights, own))
        if got != wanted:
            raise RecordError(f"{path}: {name[:100]} has {got}, but {whose} needs {wanted}")
