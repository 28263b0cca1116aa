"""BackdoorBench's result folders, `attack_result.pt` and the PNG files beside it: read and written.

Nothing in the file is run, weights are matched by name, and images are opened only in the folders `bd_...` and
`cross_...` beside the file, wherever the attack had stored them.
"""

import io
import re
import reprlib
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sau import files
from sau.compat import torch_file, weights
from sau.compat.torch_file import Array
from sau.data.images import BACKDOOR, CROSS, Images
from sau.data.readers import read_images
from sau.data.sources import DATA_FOLDER, OFFICIAL, source
from sau.errors import RecordError, SauError
from sau.models import build, state_dict_spec
from sau.record import attack_result
from sau.record.attack_result import BACKDOORBENCH, AttackResult
from sau.record.folder import Record

NETWORKS = ("preactresnet18", "vgg19", "vgg19_bn")  # that BackdoorBench builds as we do
_PATH = re.compile(r"(?:.*[/\\])?((?:bd|cross)_[a-z_]+)[/\\]([0-9]{1,9})[/\\]([0-9]{1,9})\.png")
_MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)  # what wrong content raises


def read(folder: Path) -> AttackResult:
    """Read `attack_result.pt` of a folder and the images that it lists; clean images are not among them.

    Images of a folder `cross_...` have role CROSS. WaNet and its like store covers among the others, which then have
    role BACKDOOR and labels equal to true_labels. Changes of the file on purpose are not noticed: its only checksum is
    the archive's CRC-32.

    Raises:
        RecordError: one line that names the file and what is wrong.
    """
    path = folder / BACKDOORBENCH
    content, digest = torch_file.load(path)
    try:
        return _attack_result(content, folder, digest)
    except SauError as error:
        raise RecordError(f"{path}: {error}") from None
    except KeyError as error:
        raise RecordError(f"{path} lacks {reprlib.repr(error.args[0])}") from None
    except _MALFORMED as error:
        raise RecordError(f"{path} is not as BackdoorBench writes it: {str(error)[:200]}") from None


def blank(name: str, classes: int, shape: tuple[int, int, int]) -> dict[str, Tensor]:
    """The state dict of the published network, without memory for its values; ConfigError if there is none."""
    return state_dict_spec(lambda: build(name, classes, shape=shape, mean=(0.0,) * 3, std=(1.0,) * 3).net)


def _attack_result(content: Any, folder: Path, digest: str) -> AttackResult:
    dataset, name = content["clean_data"], content["model_name"]
    _require("clean_data", dataset, isinstance(dataset, str) and dataset in OFFICIAL, ", ".join(OFFICIAL))
    _require("model_name", name, isinstance(name, str), "a text")
    official, origin = OFFICIAL[dataset], source(dataset)
    classes, size = official.classes, origin.size
    _require("num_classes", content["num_classes"], content["num_classes"] == classes, f"{classes}, as {dataset} has")
    _require("img_size", content["img_size"], list(content["img_size"]) == [size, size, 3], f"({size}, {size}, 3)")
    tensors = weights.collect(folder / BACKDOORBENCH, content["model"]).of(blank(name, classes, (3, size, size)))
    triggered, test_length = _Split(folder, "bd_test", classes, size, official.test).read(content["bd_test"])
    poisoned, train_length = None, None
    if content["bd_train"] is not None:  # None where the attack stored none (Blind, LIRA)
        split = _Split(folder, "bd_train", classes, size, official.train[0])
        poisoned, train_length = split.read(content["bd_train"])
    network = {"name": name, "classes": classes, "width": None, "shape": [3, size, size]}
    return AttackResult(
        path=folder,
        network={**network, "mean": list(origin.mean), "std": list(origin.std)},
        weights=tensors,
        triggered=triggered,
        poisoned=poisoned if poisoned is not None and len(poisoned) else None,
        dataset=dataset,
        dataset_path=DATA_FOLDER,
        recipe=None,
        fingerprints=None,
        lengths=(train_length, test_length),
        digest=digest,
    )


def _require(what: str, got: Any, ok: bool, allowed: str) -> None:
    if not ok:
        raise RecordError(f"{what} is {reprlib.repr(got)}, allowed is {allowed}")


@dataclass(frozen=True)
class _Split:
    """`bd_train` or `bd_test` (`name`) in `folder`, of a data set of `classes` and `length` images of `size` pixels."""

    folder: Path
    name: str
    classes: int
    size: int
    length: int

    def read(self, state: Any) -> tuple[Images, int]:
        """The images with a trigger, in the order of the attack, and the number of images that the attack saw."""
        table = state["bd_data_container"]["data_dict"]
        flags, order = (self._integers(state, key) for key in ("poison_indicator", "original_index_array"))
        n = len(flags)
        _require(f"the length of {self.name}", n, n <= self.length, f"up to {self.length:,}")
        if len(np.unique(order)) < len(order) or not ((order >= 0) & (order < n)).all():
            raise RecordError(f"{self.name}'s indices are not different numbers from 0 to {n - 1}")
        chosen = order[flags[order] != 0]
        if self.name == "bd_test" and not len(chosen) == len(order) > 0:
            raise RecordError(f"bd_test has {len(order)} images, {len(chosen)} of them triggered; all must be")
        entries = [self._entry(table[index], index) for index in chosen.tolist()]
        stored, true, role = torch.tensor([entry[1:] for entry in entries], dtype=torch.int64).view(-1, 3).unbind(1)
        pixels = torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)
        if entries:
            paths = [(str(file), label) for file, label, *_ in entries]
            pixels = read_images(f"BackdoorBench {self.name}", self.folder, paths, self.size, self.classes).pixels
        return Images(pixels, stored, true, role.to(torch.uint8), torch.from_numpy(chosen), self.classes), n

    def _integers(self, state: Any, key: str) -> np.ndarray:
        """int64 from a numpy array or a list of whole numbers."""
        given = state[key].values if isinstance(state[key], Array) else np.array(state[key])
        whole = given.ndim == 1 and given.dtype.kind in "biuf" and bool((np.abs(given.astype(float)) < 1e9).all())
        if not whole or (given != given.astype(np.int64)).any():
            raise RecordError(f"{key} of {self.name} is not a vector of whole numbers")
        return given.astype(np.int64)

    def _entry(self, value: Any, index: int) -> tuple[Path, int, int, int]:
        """The file of an image, its stored label, its true label and its role."""
        what, path, (stored, true) = f"{self.name}'s image {index}", value["path"], value["other_info"]
        for label in (stored, true):
            valid = type(label) is int and 0 <= label < self.classes
            _require(f"the label of {what}", label, valid, f"0 to {self.classes - 1}")
        found = _PATH.fullmatch(path)
        if found is None or int(found[3]) != index:
            allowed = f"bd_NAME/CLASS/{index}.png or cross_NAME/CLASS/{index}.png at the end of the path"
            raise RecordError(f"{what} is at {reprlib.repr(path)}; allowed is {allowed}")
        role = CROSS if found[1].startswith("cross_") else BACKDOOR
        usual = f"{self.name}_dataset/{true}/{index}.png"  # older versions store another path than they write to
        for below in (f"{found[1]}/{int(found[2])}/{index}.png", usual):
            file = self.folder / below
            if file.is_file() and file.resolve().is_relative_to(self.folder.resolve()):  # a link may lead out
                return file, stored, true, role
        raise RecordError(f"{self.folder / usual} is missing or no ordinary file; copy the folder as a whole")


# Writing


def exported_images(record: Record, data: str | None = None) -> tuple[Images, Images, Images, int]:
    """Clean training set, poisoned training images (maybe none), triggered test set, number of clean test images.

    `data` is the folder of the data sets; None is where the attack had them. RecordError if the record is of a clean
    network, or its data set has changed.
    """
    attacked = attack_result.load(record.path)
    if attacked.triggered is None:
        raise RecordError(f"{record.path} holds a clean network, so there are no images to export; name an attack")
    train, test, _ = attacked.images(data)
    poisoned = train[torch.arange(0)] if attacked.poisoned is None else attacked.poisoned
    return train, poisoned, attacked.triggered, len(test)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `target` at the end of the block, and is deleted on an error.

    RecordError if `target` exists or cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise RecordError(f"{target} exists; choose another folder")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            rmtree(temporary, ignore_errors=True)


def save_png(pixels: torch.Tensor, path: Path) -> None:
    """Write one image, uint8 [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def write(record: Record, target: Path, name: str, data: str | None = None) -> None:
    """Write a finished attack as a folder that BackdoorBench's `load_attack_result` reads, whole or not at all.

    Args:
        record: of an attack.
        target: the new folder.
        name: under which BackdoorBench will find it, as `record/<name>` in its own folder: the stored paths say so.
        data: see `exported_images`.

    Raises:
        RecordError: BackdoorBench has no such data set or network, or as in `exported_images` and `new_folder`.
    """
    config = record.check()
    files.safe_join(target.parent, name)  # refuses what is no plain name
    dataset, network = config["data"]["dataset"], config["model"]
    _check_expressible(dataset, network)
    train, poisoned, triggered, n_test = exported_images(record, data)
    official, size = OFFICIAL[dataset], source(dataset).size
    if (len(train), n_test) != (official.train[0], official.test):
        raise RecordError(
            f"the record saw a part of {dataset} ({len(train):,} and {n_test:,} images), in BackdoorBench it has "
            f"{official.train[0]:,} and {official.test:,} under other indices"
        )
    weights, order = record.load_tensors("model"), blank(network["name"], official.classes, (3, size, size))
    with new_folder(target) as folder:
        content = {
            "model_name": network["name"],
            "num_classes": official.classes,
            "model": OrderedDict((key, weights[key]) for key in order),
            "data_path": f"./data/{dataset}",
            "img_size": (size, size, 3),
            "clean_data": dataset,
            "bd_train": _split(poisoned, "train", np.arange(len(train)), len(train), folder, name),
            "bd_test": _split(triggered, "test", triggered.index.numpy(), n_test, folder, name),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.write(folder / BACKDOORBENCH, _for_numpy_1(buffer.getvalue()))


def _check_expressible(dataset: str, network: dict[str, Any]) -> None:
    """RecordError if BackdoorBench has no such data set or cannot build this network."""
    if dataset not in OFFICIAL:
        raise RecordError(f"BackdoorBench has no data set {dataset}; exported are {', '.join(OFFICIAL)}")
    origin = source(dataset)
    wanted: dict[str, tuple[Any, ...]] = {"name": NETWORKS, "width": (None, 64)}
    wanted |= {"shape": ([3, origin.size, origin.size],), "mean": (list(origin.mean),), "std": (list(origin.std),)}
    for key, allowed in wanted.items():
        if network[key] not in allowed:
            choices = " or ".join(map(str, allowed))
            raise RecordError(f"{key} of the network is {network[key]}; BackdoorBench has {choices} for {dataset}")


def _split(images: Images, split: str, order: np.ndarray, length: int, folder: Path, name: str) -> dict[str, Any]:
    """`bd_train` or `bd_test`, and its PNG files; covers get a folder of their own, by which they are recognised."""
    table = {}
    rows = zip(*(getattr(images, key).tolist() for key in ("index", "labels", "true_labels", "role")), strict=True)
    for pixels, (index, stored, true, role) in zip(images.pixels, rows, strict=True):
        path = f"{'cross' if role == CROSS else 'bd'}_{split}_dataset/{true}/{index}.png"
        save_png(pixels, folder / path)
        table[index] = {"path": f"./record/{name}/{path}", "other_info": [stored, true]}
    flags = np.zeros(length)
    flags[images.index.numpy()] = 1
    place = f"./record/{name}/bd_{split}_dataset"
    return {
        "bd_data_container": {"save_folder_path": place, "data_dict": table, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": order,
        "poison_indicator": flags,
        "save_folder_path": place,
    }


def _for_numpy_1(raw: bytes) -> bytes:
    """The archive with numpy's modules under their names in numpy 1, which both versions read.

    `.format_version` is left out: it promises distances between members that only torch's own writer keeps.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("/.format_version"):
                continue
            if member.filename.endswith("/data.pkl"):
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(member.filename, content)
    return out.getvalue()
