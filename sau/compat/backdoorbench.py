"""BackdoorBench's result folders: what they hold, and reading one as the victim of our defenses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sau.compat import torch_file
from sau.compat.backdoorbench_images import Part, fields, show
from sau.compat.weights import dense, fit
from sau.data.images import Images
from sau.data.sources import OFFICIAL, source
from sau.errors import RecordError, SauError
from sau.models import build, layout

RESULT = "attack_result.pt"
KEYS = ("model_name", "num_classes", "model", "img_size", "clean_data", "bd_train", "bd_test")


@dataclass(frozen=True, eq=False)
class Foreign:
    """A BackdoorBench attack, every part of it checked.

    Args:
        dataset: name of the data set, one of `OFFICIAL`.
        model_name: the network.
        num_classes: its logits, those of the data set.
        shape: channels, height and width of a picture.
        weights: state dict on the CPU with the names and in the order of a network built here; float32 and int64.
        triggered: the test set of ASR and R-ACC; labels are the wanted ones, index is the position in the test split.
        poisoned: poisoned training pictures, or None if the attack stored none (Blind, LIRA). Those from a folder
            `cross_...` have role COVER. WaNet and its like keep covers among the others, which then have role
            BACKDOOR and labels equal to true_labels.
        test_length: pictures of the test split that the attack saw.
        train_length: the same of the training split, None without `poisoned`.
        digest: SHA-256 of `attack_result.pt`.
    """

    dataset: str
    model_name: str
    num_classes: int
    shape: tuple[int, int, int]
    weights: dict[str, Tensor]
    triggered: Images
    poisoned: Images | None
    test_length: int
    train_length: int | None
    digest: str


def read(folder: Path) -> Foreign:
    """Read `attack_result.pt` of a folder and the pictures that it lists; clean pictures are not among them.

    Nothing in the file is run (`torch_file`), weights are matched by name, never by position, and pictures are opened
    only in the folders `bd_...` and `cross_...` beside the file, wherever the attack had stored them. A file carries
    no checksum of its own beside the archive's CRC-32, so who changes it on purpose is not noticed.

    Raises:
        RecordError: one line that names the file and what is wrong.
    """
    path = folder / RESULT
    content, digest = torch_file.load(path)
    try:
        return _checked(content, folder, digest)
    except SauError as error:
        raise RecordError(f"{path}: {error}") from None


def blank(name: str, classes: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The state dict of the published network, without memory for its values; ConfigError if there is none."""
    return layout(lambda: build(name, classes, shape=shape, mean=(0.0,) * 3, std=(1.0,) * 3).net)


def _checked(content: Any, folder: Path, digest: str) -> Foreign:
    top = fields(content, KEYS, "the file")
    dataset, name = (_text(top[key], key) for key in ("clean_data", "model_name"))
    if dataset not in OFFICIAL:
        raise RecordError(f"clean_data is {dataset!r}; data sets of these folders are {', '.join(OFFICIAL)}")
    whole, size = OFFICIAL[dataset], source(dataset).size
    classes, train, test = whole.classes, whole.train[0], whole.test
    if type(top["num_classes"]) is not int or top["num_classes"] != classes:
        raise RecordError(f"num_classes is {show(top['num_classes'])}, but {dataset} has {classes}")
    sides = top["img_size"]
    if not isinstance(sides, list | tuple) or [show(side) for side in sides] != [str(size), str(size), "3"]:
        raise RecordError(f"img_size is not ({size}, {size}, 3), as {dataset} has it")
    shape = (3, size, size)
    weights = _weights(top["model"], blank(name, classes, shape), name)
    triggered, test_length = Part(folder, "bd_test", digest, classes, size, test).read(top["bd_test"])
    poisoned, train_length = None, None
    if top["bd_train"] is not None:
        poisoned, train_length = Part(folder, "bd_train", digest, classes, size, train).read(top["bd_train"])
        poisoned = poisoned if len(poisoned) else None  # the network of a poisoning ratio of 0
    return Foreign(dataset, name, classes, shape, weights, triggered, poisoned, test_length, train_length, digest)


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str) or len(value) > 500 or not value.isprintable():
        raise RecordError(f"{what} is {show(value)}; allowed is a text of up to 500 printable characters")
    return value


def _weights(given: Any, own: dict[str, Tensor], network: str) -> dict[str, Tensor]:
    """The tensors under the names of `own`, which must be theirs but for `module.` (training on several GPUs)."""
    found: dict[str, Any] = {}
    for key, value in fields(given, (), "model").items():
        name = _text(key, "a name in model").removeprefix("module.")
        if name in found:
            raise RecordError(f"model has {name!r} twice, with and without 'module.'")
        found[name] = value
    for name in {**own, **found}:
        if (name in own) != (name in found):
            fault = "lacks" if name in own else "has an unknown"
            raise RecordError(f"model {fault} {name!r}: its names are not those of {network}, {len(own)} tensors")
    return {name: _tensor(found[name], wanted, name) for name, wanted in own.items()}


def _tensor(given: Any, own: Tensor, name: str) -> Tensor:
    """A tensor of the shape of `own`, finite; narrower floats become its type."""
    if (value := dense(given)) is None:
        raise RecordError(f"{name} is {show(given)}, allowed is a dense tensor on the CPU")
    if value.shape != own.shape:
        raise RecordError(f"{name} has shape {list(value.shape)[:8]}, but the network has {list(own.shape)}")
    return fit(value, own, name)
