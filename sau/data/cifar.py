"""CIFAR-10 and CIFAR-100 from their official python files, which are pickles and so are read with care."""

import hashlib
import io
import pickle
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from sau import files
from sau.data.images import Images
from sau.data.official import OFFICIAL
from sau.errors import DataError, short_repr

# name: (folder, test file, key of the labels); these are downloaded where they are missing
_FILES = {
    "cifar10": ("cifar-10-batches-py", "test_batch", "labels"),
    "cifar100": ("cifar-100-python", "test", "fine_labels"),
}
DOWNLOADED = tuple(_FILES)
LARGEST = 1 << 28  # bytes of a file; CIFAR-100's training pictures are 155 million


def read(name: str, root: Path) -> tuple[Images, Images]:
    """Train and test [N, 3, 32, 32] of cifar10, or of cifar100 with the fine classes.

    Downloaded to `root`/`name` if they are nowhere under `root`. Raises DataError if a file is damaged or missing, or
    the download failed.
    """
    (_, _, label_key), whole = _FILES[name], OFFICIAL[name]
    folder, official = find(name, root), _official(name)

    def split(files: list[list[str]], pictures: int) -> Images:
        share = pictures // len(files)
        parts = [_cifar_batch(folder / file, md5, label_key, share, whole.classes) for file, md5 in files]
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]))
        return Images.clean(pixels, torch.tensor([y for _, labels in parts for y in labels]), whole.classes)

    return split(official.train_list, whole.train[0]), split(official.test_list, whole.test)


def find(name: str, root: Path) -> Path:
    """The folder of the files; downloaded as by `read`."""
    return _find(root, name) or _download(root / name, _official(name))


def here(name: str, root: Path) -> bool:
    """Whether a data set can be read from under `root` without a download."""
    return name not in DOWNLOADED or _find(root, name) is not None


def _official(name: str) -> Any:
    from torchvision import datasets  # parts, sums and address of the official files

    return getattr(datasets, name.upper())


def test_split(name: str, root: Path) -> Images | None:
    """The test pictures alone, for a quick look: no download (None if they are nowhere under `root`), no sum checked.

    Raises DataError if the file is damaged.
    """
    (_, file, label_key), classes = _FILES[name], OFFICIAL[name].classes
    folder = _find(root, name)
    if folder is None:
        return None
    pixels, labels = _cifar_batch(folder / file, None, label_key, classes=classes)
    return Images.clean(torch.tensor(pixels), torch.tensor(labels), classes)


class _Type:
    """In place of numpy's dtype, which takes on trust what a file says of it: bytes, or whole numbers for labels."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if code not in ("u1", "i8", "i4"):
            raise ValueError(f"an array of {short_repr(code)}, allowed is u1, and for labels i8 and i4")
        self.code: str = code

    def __setstate__(self, state: Any) -> None:
        if tuple(state) != (3, "|" if self.code == "u1" else "<", None, None, None, -1, -1, 0):
            raise ValueError("a numpy dtype that is not a plain one")


class _Array:
    """In place of numpy's array: its content is what the file holds of it."""

    def __init__(self, encode: Callable[[str, str], bytes]) -> None:
        self.encode = encode
        self.values: np.ndarray[Any, Any] = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Type):
            raise ValueError("an array without a type")
        if isinstance(content, str):  # bytes, by Python 2
            content = self.encode(content, "latin1")
        self.values = np.frombuffer(content, f"<{kind.code}").reshape(shape, order="F" if by_columns else "C")


class _ArraysOnly(pickle._Unpickler):  # Python's own: the one in C takes memory for any number of a memo
    """Unpickles dictionaries of arrays, byte strings and numbers, with texts for keys; refuses to import anything else,
    and to make more bytes than the file has."""

    def __init__(self, raw: bytes) -> None:
        super().__init__(io.BytesIO(raw), encoding="latin1")
        self.left = len(raw)
        self.allowed = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _Type, ("_codecs", "encode"): self._encode}
        self.allowed |= {
            (f"numpy.{core}.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(self._encode)
            for core in ("core", "_core")
        }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self.allowed[module, name]

    def _encode(self, text: str, how: str) -> bytes:
        self.left -= len(text)
        if how != "latin1" or self.left < 0:
            raise ValueError("bytes that the file does not hold")
        return text.encode(how)

    def _keyed(self, keys: list[Any], load: str) -> None:
        if not all(isinstance(key, str) for key in keys):  # a tuple of tuples takes hours to hash
            raise ValueError("a key that is no text")
        getattr(super(), load)()

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Type):
            raise ValueError("a state of what has none")
        super().load_build()  # type: ignore[misc]

    stack: list[Any]
    dispatch: ClassVar[dict[int, Any]] = {  # without sets, which hash, too, and without bytes by a number
        key: load for key, load in pickle._Unpickler.dispatch.items()
        if bytes([key]) not in (pickle.ADDITEMS, pickle.FROZENSET, pickle.BYTEARRAY8)
    } | {
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: lambda self: self._keyed(self.stack[-2:-1], "load_setitem"),
        pickle.SETITEMS[0]: lambda self: self._keyed(self.stack[::2], "load_setitems"),
        pickle.DICT[0]: lambda self: self._keyed(self.stack[::2], "load_dict"),
    }  # fmt: skip


def _cifar_batch(
    path: Path, md5: str | None, label_key: str, official: int = 10_000, classes: int = 10
) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [N, 3, 32, 32] and labels; a file with another MD5 is a subset or it is damaged. None: unchecked."""
    try:
        raw = files.read(path, LARGEST)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; delete {path.parent} to download it again") from None
    try:
        batch = _ArraysOnly(raw).load()
        pixels, labels = _checked(batch, label_key, classes)
    except Exception as error:  # damaged pickles raise a dozen types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{path} is damaged or no CIFAR file with {label_key!r}: {reason}") from None
    if md5 is not None and len(pixels) >= official and hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or not the official file: its MD5 differs, and it is no subset, for it holds "
            f"{len(pixels):,} pictures of {official:,}; delete it to download it again"
        )
    return pixels, labels


def _checked(batch: Any, label_key: str, classes: int) -> tuple[np.ndarray, list[int]]:
    if not isinstance(batch, dict):
        raise ValueError(f"it holds a {type(batch).__name__}, allowed is a dictionary")
    missing = {"data", label_key} - set(batch)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    data, labels = batch["data"], batch[label_key]
    if isinstance(labels, _Array) and labels.values.ndim == 1:
        labels = labels.values.tolist()
    if not isinstance(data, _Array) or data.values.dtype != np.uint8:
        raise ValueError("its pictures are no array of bytes")
    if not isinstance(labels, list | tuple) or {int} != {type(label) for label in labels}:
        raise ValueError("its labels are no list of whole numbers")
    pixels = data.values
    if pixels.shape != (len(labels), 3072):
        raise ValueError(f"{len(labels)} labels, but pictures {pixels.shape}; allowed is (N, 3072)")
    if not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"labels range over {min(labels)}..{max(labels)}, allowed is 0..{classes - 1}")
    return pixels.reshape(-1, 3, 32, 32), list(labels)


def _find(root: Path, name: str) -> Path | None:
    """`root/name/base` (BackdoorBench), `root/base` (torchvision) or `root` itself, whichever holds the test file."""
    base, witness, *_ = _FILES[name]
    for folder in (root / name / base, root / base, root):
        if (folder / witness).is_file():
            return folder
    return None


def _download(root: Path, dataset: Any) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    place = root.parent
    if not place.is_dir() and (place.name != "data" or not place.parent.is_dir()):  # the default, ./data, is made
        raise DataError(f"there is no folder {place} for {dataset.filename}; make it or mend --dataset_path")
    ours = [folder for folder in (root, place) if not folder.exists()]
    print(f"downloading {dataset.filename} to {root}")
    try:
        download_and_extract_archive(dataset.url, str(root), filename=dataset.filename, md5=dataset.tgz_md5)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):  # what is in them stays
            for folder in ours:
                folder.rmdir()
        raise DataError(
            f"no {dataset.base_folder} under {place} and the download failed ({error}); "
            "name the folder with --dataset_path, or try --dataset digits, which needs no files"
        ) from None
    return root / dataset.base_folder
