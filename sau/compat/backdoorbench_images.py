"""The pictures that a BackdoorBench file lists, from the folders beside it or from the file itself."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sau.compat.torch_file import Array, Picture
from sau.data.decode import cached, read_image
from sau.data.images import BACKDOOR, COVER, Images
from sau.errors import RecordError

_PATH = re.compile(r"(?:.*[/\\])?((?:bd|cross)_[a-z_]+)[/\\]([0-9]{1,9})[/\\]([0-9]{1,9})\.png")
Place = os.DirEntry[str] | Picture


def show(value: Any) -> str:
    """A value from a file, short and printable whatever it is; containers only by their type."""
    plain = isinstance(value, str | bytes | float | bool) or (isinstance(value, int) and abs(value) < 1 << 64)
    return ascii(value[:60] if isinstance(value, str | bytes) else value) if plain else f"a {type(value).__name__}"


def fields(value: Any, keys: tuple[str, ...], what: str) -> dict[Any, Any]:
    """A copy of a dictionary that has at least these keys; RecordError names the first that is missing."""
    if not isinstance(value, dict):
        raise RecordError(f"{what} is {show(value)}, not a dictionary")
    for key in keys:
        if key not in value:
            raise RecordError(f"{what} has no {key!r}")
    return dict(value)


@dataclass(frozen=True)
class Part:
    """`bd_train` or `bd_test` of a file.

    Args:
        folder: where the file lies.
        name: which of the two.
        digest: SHA-256 of the file.
        classes: of the data set.
        size: side of a picture in pixels.
        longest: pictures of the official split.
        listed: folders that were looked into.
    """

    folder: Path
    name: str
    digest: str
    classes: int
    size: int
    longest: int
    listed: dict[str, dict[str, os.DirEntry[str]]] = field(default_factory=dict, repr=False)

    def read(self, state: Any) -> tuple[Images, int]:
        """The pictures that carry a trigger, in the order of the attack, and the length of its split."""
        state = fields(state, ("bd_data_container", "original_index_array", "poison_indicator"), self.name)
        container = fields(state["bd_data_container"], ("data_dict",), f"{self.name}'s container")
        table = fields(container["data_dict"], (), f"{self.name}'s data_dict")
        flags, order = self._numbers(state, "poison_indicator"), self._numbers(state, "original_index_array")
        n = len(flags)
        if n > self.longest:
            raise RecordError(f"{self.name} has {n:,} flags, but the data set has {self.longest:,} pictures")
        if not ((order >= 0) & (order < n)).all() or len(np.unique(order)) < len(order):
            raise RecordError(f"{self.name}'s indices are not different numbers from 0 to {n - 1}")
        chosen = order[flags[order] != 0]
        if self.name == "bd_test" and (len(chosen) < len(order) or not len(order)):
            raise RecordError(f"bd_test has {len(order)} pictures, {len(chosen)} of them triggered; all must be")
        entries = [self._entry(table.get(index), index) for index in chosen.tolist()]
        pixels = self._pixels([entry[0] for entry in entries])
        stored, true, role = torch.tensor([entry[1:] for entry in entries], dtype=torch.int64).view(-1, 3).unbind(1)
        return Images(pixels, stored, true, role.to(torch.uint8), torch.from_numpy(chosen), self.classes), n

    def _numbers(self, state: dict[Any, Any], key: str) -> np.ndarray:
        """int64 from a numpy array or a list of whole numbers."""
        given = state[key].values.tolist() if isinstance(state[key], Array) else state[key]
        whole = isinstance(given, list) and all(type(x) in (int, float, bool) and abs(x) < 1e9 for x in given)
        if not whole or any(x != int(x) for x in given):
            raise RecordError(f"{key} of {self.name} is not a vector of whole numbers")
        return np.array(given, dtype=np.int64)

    def _entry(self, value: Any, index: int) -> tuple[Place, int, int, int]:
        """Where a picture is, its stored label, its true label, its role."""
        what = f"{self.name}'s picture {index}"
        if isinstance(value, tuple) and len(value) == 3:
            place, labels = value[0], list(value[1:])
        else:
            entry = fields(value, ("path", "other_info"), what)
            place, labels = entry["path"], entry["other_info"]
        if not isinstance(labels, list | tuple) or len(labels) != 2:
            raise RecordError(f"{what} has {show(labels)} for its labels, not a list of two")
        for label in labels:
            if type(label) is not int or not 0 <= label < self.classes:
                raise RecordError(f"{what} has label {show(label)}, allowed is 0..{self.classes - 1}")
        role = BACKDOOR
        if not isinstance(place, Picture):
            found = _PATH.fullmatch(place) if isinstance(place, str) else None
            if found is None or int(found[3]) != index:
                raise RecordError(
                    f"{what} is at {show(place)}; allowed is bd_NAME/CLASS/{index}.png or cross_NAME/CLASS/{index}.png "
                    "at the end of the path"
                )
            role = COVER if found[1].startswith("cross_") else BACKDOOR
            place = self._file(f"{found[1]}/{int(found[2])}", f"{self.name}_dataset/{labels[1]}", f"{index}.png")
        return place, labels[0], labels[1], role

    def _file(self, stored: str, usual: str, name: str) -> os.DirEntry[str]:
        """A PNG beside the file, in the folder where the attack had stored it or where it stores them usually."""
        for below in (stored, usual):
            if name in (files := self._files(below)):
                return files[name]
        raise RecordError(f"{self.folder / stored / name} is missing or no ordinary file; copy the folder as a whole")

    def _files(self, below: str) -> dict[str, os.DirEntry[str]]:
        """The ordinary files of a folder by name; looking them up one by one takes seconds for 50,000."""
        if below not in self.listed:
            place = self.folder / below
            if not place.resolve().is_relative_to(self.folder.resolve()):
                raise RecordError(f"{place} is a link that leads out of the folder")
            entries = os.scandir(place) if place.is_dir() else ()
            self.listed[below] = {entry.name: entry for entry in entries if entry.is_file(follow_symlinks=False)}
        return self.listed[below]

    def _pixels(self, places: list[Place]) -> Tensor:
        """uint8 [N, 3, size, size]; those from PNG files from the cache of decoded pictures if they are there."""

        def decode() -> dict[str, Tensor]:
            pixels = torch.empty(len(places), 3, self.size, self.size, dtype=torch.uint8)
            bar = tqdm(places, desc=self.name, unit="picture", disable=None, leave=False)
            for slot, place in zip(pixels, bar, strict=True):
                picture = place.pixels if isinstance(place, Picture) else np.asarray(read_image(place.path))
                if picture.shape != (self.size, self.size, 3):
                    where = "a picture in the file" if isinstance(place, Picture) else place.path
                    raise RecordError(f"{where} has {picture.shape[1]}x{picture.shape[0]} pixels, not {self.size}")
                slot.copy_(torch.from_numpy(picture.transpose(2, 0, 1).copy()))
            return {"pixels": pixels}

        files = [place for place in places if not isinstance(place, Picture)]
        if not files or len(files) < len(places):
            return decode()["pixels"]
        stats = ((file.path, file.stat(follow_symlinks=False)) for file in files)
        parts = (f"{os.path.relpath(path, self.folder)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
        return cached([f"BackdoorBench {self.digest} {self.name} {self.size}", *parts], decode)["pixels"]
