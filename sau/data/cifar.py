"""CIFAR-10 and CIFAR-100 from their official python files, which are pickles and so are read with care."""

import hashlib
import io
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sau import files
from sau.data.images import Images
from sau.data.official import OFFICIAL
from sau.errors import DataError

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
    return Images.clean(torch.from_numpy(pixels), torch.tensor(labels), classes)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays, byte strings and numbers; refuses to import anything else."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    allowed |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def _cifar_batch(
    path: Path, md5: str | None, label_key: str, official: int = 10_000, classes: int = 10
) -> tuple[np.ndarray, list[int]]:
    """Pixels uint8 [N, 3, 32, 32] and labels; a file with another MD5 is a subset or it is damaged. None: unchecked."""
    try:
        raw = files.read(path, LARGEST)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; delete {path.parent} to download it again") from None
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
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


def _checked(batch: dict[str, Any], label_key: str, classes: int) -> tuple[np.ndarray, list[int]]:
    missing = {"data", label_key} - set(batch)
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    pixels, labels = np.asarray(batch["data"]), [int(label) for label in batch[label_key]]
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072) or not labels:
        raise ValueError(
            f"{len(labels)} labels, but pictures {pixels.dtype} {pixels.shape}; allowed is uint8 (N, 3072)"
        )
    if not 0 <= min(labels) <= max(labels) < classes:
        raise ValueError(f"labels range over {min(labels)}..{max(labels)}, allowed is 0..{classes - 1}")
    return pixels.reshape(-1, 3, 32, 32), labels


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
