"""An attacked network and its pictures, to and from a result folder: all that a defense needs, without trigger code."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sau.compat import backdoorbench
from sau.data import readers, sources
from sau.data.images import Images
from sau.data.sources import subset_note
from sau.errors import DataError, RecordError
from sau.models import Normalized, build, layout
from sau.models.polarizer import make_room
from sau.record import schema
from sau.record.folder import Record
from sau.record.pictures import load_images
from sau.settings.run import Run


@dataclass(frozen=True, eq=False)
class AttackResult:
    """What an attack left, read from our record or from BackdoorBench's folder.

    Args:
        path: the folder.
        network: how to build the network: name, classes, width, shape, mean, std.
        weights: its state dict.
        triggered: the test set of ASR and R-ACC, or None for a clean network.
        poisoned: the poisoned training pictures; None if there are none or the attack kept none.
        dataset: the data set of the attack.
        dataset_path: where the attack found it.
        recipe: the recipe of the attack; None if the folder does not say.
        fingerprints: of the clean training and test pictures; None if the folder does not say.
        lengths: training and test pictures that the attack saw; None means all.
        digest: tells attacks apart.
        settings: of the attack, by name, its own name as `attack`; None if the folder does not say.
        trigger: the tensors of what stamps further pictures; None where a formula does, or where the attack kept none.
        amp: whether the attack's network ran in bf16; None if the folder does not say.
        gate: the ASR that the attack had to reach and whether it did, as in `summary.json`; None if there is no gate,
            or the folder does not say.
    """

    path: Path
    network: dict[str, Any]
    weights: dict[str, torch.Tensor]
    triggered: Images | None
    poisoned: Images | None
    dataset: str
    dataset_path: str
    recipe: str | None
    fingerprints: dict[str, str] | None
    lengths: tuple[int | None, int | None]
    digest: str
    settings: dict[str, Any] | None = None
    trigger: dict[str, torch.Tensor] | None = None
    amp: bool | None = None
    gate: dict[str, Any] | None = None

    def offers(self, needs: Literal["clean", "poisoned"]) -> Literal["clean", "poisoned"]:
        """What a defense that `needs` such pictures gets: nothing of a clean network's pictures is poisoned.

        RecordError if an attack did not keep what it poisoned.
        """
        poisons = self.settings is None or self.settings.get("pratio", 0) > 0
        if needs == "poisoned" and self.poisoned is None and poisons:
            raise RecordError(f"{self.path} holds no poisoned training pictures, as this defense needs; take another")
        return needs if self.poisoned is not None else "clean"

    def given(self, train: Images, kind: str) -> Images:
        """`train` as a defense of this `kind` is given it: for `poisoned` with what was poisoned in its place."""
        bad = self.poisoned
        return train.replace_rows(bad, bad.index) if kind == "poisoned" and bad is not None else train

    def model(self) -> Normalized:
        """The attacked network, on the CPU, in eval mode; RecordError if the weights are not those of the named one."""
        model = self.blank()
        model.net.load_state_dict(self.weights)
        return model.eval()

    def blank(self) -> Normalized:
        """A new network like the attacked one, which has to take its weights: a record may claim any size.

        ConfigError if there is none of the kind, RecordError if the weights are another's.
        """
        rest = {key: self.network[key] for key in ("width", "shape", "mean", "std")}
        make = partial(build, self.network["name"], self.network["classes"], **rest)
        _compare(layout(lambda: make().net), self.weights, self.path, self.network["name"])
        return make()

    def pictures(self, dataset_path: str | None = None) -> tuple[Images, Images, list[str]]:
        """The clean pictures that the attack saw, train and test, and what there is to say about them.

        They are below `dataset_path`; None is where the attack found them, but whatever folder a record names, nothing
        is downloaded there. Raises RecordError if there are other pictures than the attack saw.
        """
        place = dataset_path or self.dataset_path
        if dataset_path is None and place != Run.dataset_path and readers.needs_download(self.dataset, Path(place)):
            raise DataError(f"no {self.dataset} under {place}, where the attack found it; give its --dataset_path")
        train, test = sources.load(self.dataset, place, self.network["shape"][1])
        seen = {"train": sources.fingerprint(train), "test": sources.fingerprint(test)} if self.fingerprints else None
        if self.fingerprints != seen:
            raise RecordError(f"{place} holds other {self.dataset} pictures than the attack saw; mend --dataset_path")
        notes = [note] if (note := subset_note(self.dataset, train, test)) else []
        splits = []
        for name, images, length in zip(("training", "test"), (train, test), self.lengths, strict=True):
            if length is not None and length > len(images):
                raise RecordError(f"the attack saw {length} {name} pictures, but {place} has {len(images)}")
            if length is not None and length < len(images):
                notes.append(f"the attack saw the first {length} of {len(images)} {name} pictures; this run sees those")
                images = images[torch.arange(length)]
            splits.append(images)
        train, test = splits
        bad = self.triggered
        inside = bad is None or int(bad.index.max()) < len(test)
        if bad is not None and not (inside and torch.equal(test.labels[bad.index], bad.true_labels)):
            raise RecordError(f"{self.path}: its pictures are in another order than those under {place}")
        if self.poisoned is not None and int(self.poisoned.index.max()) >= len(train):
            raise RecordError(f"{self.path}: its poisoned pictures are none of the {len(train)} under {place}")
        return train, test, notes


def save(
    record: Record, model: Normalized, poisoned: Images, triggered: Images, trigger: nn.Module | None = None
) -> None:
    """Store the weights, the poisoned training pictures, the triggered test set and what stamps further pictures."""
    record.save_tensors("model", model.net.state_dict())
    for part, images in (("poisoned", poisoned), ("triggered", triggered)):
        if len(images):
            record.save_tensors(part, images.tensors())
    if trigger is not None:
        record.save_tensors("trigger", trigger.state_dict())


def load(path: Path) -> AttackResult:
    """Read a finished attack of ours, after checking it, or a folder with BackdoorBench's `attack_result.pt`."""
    if (path / backdoorbench.RESULT).is_file() and not (path / "config.yaml").is_file():
        return _foreign(path)
    record = Record(path)
    try:
        return _ours(record, record.check())
    except (KeyError, TypeError) as error:
        raise RecordError(f"{path / 'config.yaml'} lacks {error}; make the folder again") from None


def _ours(record: Record, made: dict[str, Any]) -> AttackResult:
    if (kind := schema.kind(made)) != schema.ATTACK:
        raise RecordError(f"{record.path} is the folder of {kind}; name that of an attack")
    schema.typed(made, record.path)
    return AttackResult(
        path=record.path,
        network={key: made["model"][key] for key in ("name", "classes", "width", "shape", "mean", "std")},
        weights=record.load_tensors("model"),
        triggered=load_images(record, "triggered"),
        poisoned=load_images(record, "poisoned"),
        dataset=made["data"]["dataset"],
        dataset_path=made["run"]["dataset_path"],
        recipe=made["run"]["recipe"],
        fingerprints={part: made["data"][part] for part in ("train", "test")},
        lengths=(None, None),
        digest=made["digest"],
        settings=made.get("method"),
        trigger=record.load_tensors("trigger") if (record.path / "trigger.safetensors").is_file() else None,
        amp=bool(made.get("amp")) if "amp" in made else None,
        gate=schema.gate(record.summary(), record.path),
    )


def load_weights(model: nn.Module, place: str | Path) -> None:
    """Give `model` the weights of a .safetensors file or of the folder of a finished run, ours.

    The names may be those of `model` or of the `net` inside it; where NPD put a polarizer, `model` is given room for
    it. Raises RecordError if the file is none, the folder damaged or unfinished, or the weights of another network.
    """
    place = Path(place)
    if place.is_dir():
        (record := Record(place)).check()
        weights = record.load_tensors("model")
    elif place.suffix == ".safetensors":
        weights = Record(place.parent).load_tensors(place.stem)
    else:
        raise RecordError(f"{place} is no folder of a finished run and no .safetensors file; give one of the two")
    make_room(model, [*weights, *(f"net.{name}" for name in weights)])
    own = model.state_dict()
    named = {f"net.{name}" if f"net.{name}" in own else name: tensor for name, tensor in weights.items()}
    _compare(own, named, place, "the network")
    model.load_state_dict(named)


def _compare(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], path: Path, whose: str) -> None:
    """RecordError unless names and shapes are the same."""
    for name in {**own, **weights}:
        got, wanted = (tuple(part[name].shape) if name in part else "nothing" for part in (weights, own))
        if got != wanted:
            raise RecordError(f"{path}: {name} has {got}, but {whose} needs {wanted}")


def _foreign(path: Path) -> AttackResult:
    found = backdoorbench.read(path)
    origin = sources.source(found.dataset)
    shape = {"name": found.model_name, "classes": found.num_classes, "width": None, "shape": list(found.shape)}
    return AttackResult(
        path=path,
        network={**shape, "mean": list(origin.mean), "std": list(origin.std)},
        weights=found.weights,
        triggered=found.triggered,
        poisoned=found.poisoned,
        dataset=found.dataset,
        dataset_path=Run.dataset_path,
        recipe=None,
        fingerprints=None,
        lengths=(found.train_length, found.test_length),
        digest=found.digest,
    )
