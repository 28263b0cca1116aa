"""Reading BackdoorBench's result folders: `attack_result.pt` and the PNG files beside it.

Nothing in the file is run, weights are matched by name, and images are opened only in the folders `bd_...` and
`cross_...` beside the file, wherever the attack had stored them.
"""

import re
import reprlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sau.compat import torch_file, weights
from sau.compat.torch_file import Array
from sau.data.decode import cached, read_image
from sau.data.images import BACKDOOR, CROSS, Images
from sau.data.sources import DATA_FOLDER, OFFICIAL, source
from sau.errors import RecordError, SauError
from sau.models import build, state_dict_spec
from sau.record.attack_result import BACKDOORBENCH, AttackResult

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
    triggered, test_length = _Split(folder, "bd_test", classes, size, official.test, digest).read(content["bd_test"])
    poisoned, train_length = None, None
    if content["bd_train"] is not None:  # None where the attack stored none (Blind, LIRA)
        split = _Split(folder, "bd_train", classes, size, official.train[0], digest)
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
    """`bd_train` or `bd_test` (`name`) of the file with this `digest` in `folder`.

    Of the data set there are `classes`, `size` (height and width of an image) and `length` (images of the split).
    """

    folder: Path
    name: str
    classes: int
    size: int
    length: int
    digest: str
    checked: set[Path] = field(default_factory=set)  # folders of images that are known to lie in `folder`

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
            raise RecordError(f"bd_test has {len(order)} pictures, {len(chosen)} of them triggered; all must be")
        entries = [self._entry(table[index], index) for index in chosen.tolist()]
        pixels = self._pixels([file for file, *_ in entries])
        stored, true, role = torch.tensor([entry[1:] for entry in entries], dtype=torch.int64).view(-1, 3).unbind(1)
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
        what, path, (stored, true) = f"{self.name}'s picture {index}", value["path"], value["other_info"]
        for label in (stored, true):
            valid = type(label) is int and 0 <= label < self.classes
            _require(f"the label of {what}", label, valid, f"0 to {self.classes - 1}")
        found = _PATH.fullmatch(path)
        if found is None or int(found[3]) != index:
            allowed = f"bd_NAME/CLASS/{index}.png or cross_NAME/CLASS/{index}.png at the end of the path"
            raise RecordError(f"{what} is at {reprlib.repr(path)}; allowed is {allowed}")
        role = CROSS if found[1].startswith("cross_") else BACKDOOR
        usual = f"{self.name}_dataset/{true}/{index}.png"  # older versions store another path than they write to
        return self._file(f"{found[1]}/{int(found[2])}/{index}.png", usual), stored, true, role

    def _file(self, *below: str) -> Path:
        """The first of these files that is there; RecordError if none is, or a link leads out of the folder."""
        for file in (self.folder / path for path in below):
            if file.parent not in self.checked and not file.parent.resolve().is_relative_to(self.folder.resolve()):
                raise RecordError(f"{file.parent} is a link that leads out of the folder")
            self.checked.add(file.parent)
            if file.is_file() and not file.is_symlink():
                return file
        raise RecordError(f"{self.folder / below[0]} is missing or no ordinary file; copy the folder as a whole")

    def _pixels(self, files: list[Path]) -> Tensor:
        """uint8 [N, 3, size, size], kept in the cache of decoded images if there are any."""

        def decode() -> dict[str, Tensor]:
            pixels = torch.empty(len(files), 3, self.size, self.size, dtype=torch.uint8)
            bar = tqdm(files, desc=self.name, unit="image", disable=None, leave=False)
            for slot, file in zip(pixels, bar, strict=True):
                image = np.asarray(read_image(file))
                if image.shape != (self.size, self.size, 3):
                    raise RecordError(f"{file} has {image.shape[1]}x{image.shape[0]} pixels, not {self.size}")
                slot.copy_(torch.from_numpy(image.transpose(2, 0, 1).copy()))
            return {"pixels": pixels}

        if not files:
            return decode()["pixels"]
        stats = ((file.relative_to(self.folder), file.stat()) for file in files)
        parts = (f"{path} {info.st_size} {info.st_mtime_ns}" for path, info in stats)
        return cached([f"BackdoorBench {self.digest} {self.name} {self.size}", *parts], decode)["pixels"]
