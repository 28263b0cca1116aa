"""Readers of CIFAR, GTSRB, Tiny ImageNet and anybody's folders of images; DataError for a missing or damaged file."""

import csv
import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sau.compat.torch_file import ALLOWED
from sau.data.decode import Preparation, cached, image_to_tensor, read_image
from sau.data.images import Images
from sau.errors import DataError, first_line

Samples = list[tuple[str, int]]  # (path, label) of each image
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes; downloaded where they are missing
_STAND_INS: dict[str, Any] = {name: thing for thing, name in ALLOWED if name.startswith("numpy.")}
_STAND_INS["_codecs.encode"] = lambda text, _: text.encode("latin1")
# What Windows, macOS, a NAS or a file system leaves between the files of a user; names beginning with "." go anyway.
_STRAY = "thumbs.db desktop.ini __macosx @eadir lost+found $recycle.bin".split()


def cifar(name: str, root: Path, size: int = 32) -> tuple[Images, Images]:
    """Train and test images [N, 3, 32, 32] of cifar10, or of cifar100 with the fine classes, from the official files; a
    smaller file is a subset. Downloads to `root`/`name` what is nowhere under `root`."""
    official = _official(name)
    folder = _cifar_folder(name, root) or _download(root / name, official)
    splits = []
    for files, count in ((official.train_list, 50_000), (official.test_list, 10_000)):
        parts = [_cifar_batch(folder / file, md5, CIFAR[name], count // len(files)) for file, md5 in files]
        pixels, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        splits.append(Images.clean(pixels, labels, CIFAR[name]))
    return splits[0], splits[1]


def needs_download(name: str, root: Path) -> bool:
    """Whether the data set cannot be read from under `root` without a download."""
    return name in CIFAR and _cifar_folder(name, root) is None


def _official(name: str) -> Any:
    from torchvision import datasets  # knows the official files, their MD5 and where to get them

    return getattr(datasets, name.upper())


def _cifar_folder(name: str, root: Path) -> Path | None:
    """`root/name/base` (BackdoorBench), `root/base` (torchvision) or `root` itself, whichever holds the test file."""
    official = _official(name)
    places = (root / name / official.base_folder, root / official.base_folder, root)
    return next((place for place in places if os.path.isfile(place / official.test_list[0][0])), None)


def _download(root: Path, official: Any) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    place = root.parent
    if not place.is_dir() and (place.name != "data" or not place.parent.is_dir()):  # the default, ./data, is made
        raise DataError(f"there is no folder {place} for {official.filename}; create it or correct --dataset_path")
    print(f"downloading {official.filename} to {root}")
    try:
        download_and_extract_archive(official.url, str(root), filename=official.filename, md5=official.tgz_md5)
    except (OSError, RuntimeError) as error:
        advice = "correct --dataset_path, or try --dataset digits, which needs no files"
        raise DataError(f"{root} cannot be downloaded ({first_line(error)}); {advice}") from None
    return root / official.base_folder


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of arrays, texts and numbers. Nothing is imported, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[f"{module}.{name}"]


def _cifar_batch(path: Path, md5: str, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, 32, 32] and labels of one file; with fewer than `count` images it may have another MD5."""
    advice = "delete the CIFAR files there to download them again"
    try:
        raw = path.read_bytes()
        batch = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        pixels = torch.tensor(batch["data"].values.reshape(-1, 3, 32, 32))
        numbers = batch["labels" if classes == 10 else "fine_labels"]
        labels = torch.tensor(getattr(numbers, "values", numbers))
        Images.clean(pixels, labels, classes)  # checks types, lengths and the range of labels
    except Exception as error:  # damaged pickles raise a dozen types
        raise DataError(f"{path} is no CIFAR file ({type(error).__name__}: {first_line(error)}); {advice}") from None
    if len(pixels) >= count and hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path} is no subset, and its MD5 is not the official one; {advice}")
    return pixels, labels


def gtsrb(root: Path, size: int = 32) -> tuple[Images, Images]:
    """German traffic signs, uint8 [N, 3, size, size], 43 classes: training images by class and file name, test images
    as in GT-final_test.csv. The layout is torchvision's, the official archives' or BackdoorBench's."""
    bases, advice = (root / "gtsrb", root), "torchvision.datasets.GTSRB(root, download=True) fetches it"
    train = _first(bases, ("GTSRB/Training", "GTSRB/Final_Training/Images", "Train"), advice)
    test = _first(bases, ("GTSRB/Final_Test/Images", "Test"), advice)
    tables = [place / "GT-final_test.csv" for place in (test, *test.absolute().parents[:3])]
    table = next(filter(os.path.isfile, tables), tables[0])
    try:
        rows = csv.DictReader(read_lines(table), delimiter=";")
        listed = [(str(test / row["Filename"]), int(row["ClassId"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{table} cannot be read: {first_line(error)}; needed are Filename and ClassId") from None
    signs = _samples(train, [f"{label:05d}" for label in range(43)], ".ppm")
    return read_images("gtsrb train", train, signs, size, 43), read_images("gtsrb test", test, listed, size, 43)


def tiny(root: Path, size: int = 64) -> tuple[Images, Images]:
    """Tiny ImageNet, uint8 [N, 3, size, size]: classes in the order of their ids, then file names. The test images are
    those of val/images, listed in val_annotations.txt, or of val/<id>."""
    name = "tiny-imagenet-200"
    bases = (root / "tiny" / name, root / "tiny", root / name, root)
    train = _first(bases, ("train",), f"unpack http://cs231n.stanford.edu/{name}.zip there")
    val, ids = train.parent / "val", class_folders(train)
    if (val / "images").is_dir():
        rows = [line.split("\t")[:2] for line in read_lines(val / "val_annotations.txt")]
        if unknown := [row for row in rows if len(row) < 2 or row[1] not in ids]:
            raise DataError(f"{val / 'val_annotations.txt'} has {unknown[0]}, whose class is no folder of {train}")
        listed = [(str(val / "images" / file), ids.index(one)) for file, one in rows]
        listed.sort(key=lambda sample: sample[::-1])
    else:
        listed = _samples(val, ids, ".jpeg")
    images = read_images("tiny train", train, _samples(train, ids, ".jpeg"), size, len(ids))
    return images, read_images("tiny test", val, listed, size, len(ids))


def folder(root: Path, size: int = 32) -> tuple[Images, Images]:
    """Own images, uint8 [N, 3, size, size], from train/<class>/* and test/<class>/*; see `image_folder`."""
    names, others = class_folders(root / "train"), class_folders(root / "test")
    if different := {*names} ^ {*others}:
        raise DataError(f"{root}: only one of train and test has the class {min(different)!a}; both need the same ones")
    return image_folder(root / "train", size, names), image_folder(root / "test", size, names)


def image_folder(root: Path, size: int | Preparation = 32, names: Sequence[str] | None = None) -> Images:
    """Own images, uint8 [N, 3, size, size], from <class>/*; classes and files by name, without `_STRAY`. `names` are
    those of all classes in the order of their numbers; None numbers the folders in their order."""
    folders = class_folders(root)
    if len(folders) < 2:
        raise DataError(f"{root} has {len(folders)} class folders; needed are two or more, with images in them")
    names = folders if names is None else names
    samples = [(path, names.index(folders[label])) for path, label in _samples(root, folders)]
    return read_images("images", root, samples, size, len(names))


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, in order: by number where all are whole numbers (2 before 10), else as text."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _stray(entry.name))
    except OSError as error:
        raise DataError(f"cannot list the folder {root}: {error.strerror}") from None
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def _first(bases: Sequence[Path], names: Sequence[str], advice: str) -> Path:
    """The first folder base/name that there is."""
    for place in (base / name for base in bases for name in names):
        if os.path.isdir(place):  # False where Path.is_dir would raise PermissionError
            return place
    raise DataError(f"there is no folder {' or '.join(names)} in {' or '.join(map(str, bases))}; {advice}")


def _stray(name: str) -> bool:
    return name.startswith(".") or name.lower() in _STRAY


def _samples(root: Path, classes: Sequence[str], suffix: str = "") -> Samples:
    """The images below root/<class>, class by class, files by name; DataError for a class without one."""
    from torchvision.datasets.folder import make_dataset

    def valid(path: str) -> bool:
        return path.lower().endswith(suffix) and not any(map(_stray, Path(path).relative_to(root).parts))

    try:
        found = make_dataset(root, {name: label for label, name in enumerate(classes)}, is_valid_file=valid)
    except (OSError, ValueError) as error:
        raise DataError(f"{root}: {first_line(error)} Each class needs an image") from None
    return sorted(found, key=lambda sample: sample[1])  # torchvision goes by name


def read_images(title: str, root: Path, samples: Samples, size: int | Preparation, classes: int) -> Images:
    """The images of a split, from the cache or decoded with a progress bar."""
    if isinstance(size, int):
        size = Preparation(size, partial(image_to_tensor, height=size, width=size), str(size))
    side, apply, text = size
    key = [title, text]
    for path, _ in samples:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        key.append(f"{os.path.relpath(path, root)} {status.st_size} {status.st_mtime_ns}")

    def decode() -> dict[str, Tensor]:
        pixels = torch.empty(len(samples), 3, side, side, dtype=torch.uint8)
        for slot, (path, _) in zip(pixels, tqdm(samples, title, unit="image", disable=None, leave=False), strict=True):
            slot.copy_(apply(read_image(path)))  # whole numbers, so the conversion is exact
        return {"pixels": pixels}

    pixels = cached(key, decode)["pixels"]
    return Images.clean(pixels, torch.tensor([label for _, label in samples], dtype=torch.int64), classes)


def read_lines(path: Path) -> list[str]:
    """The lines of a list in UTF-8."""
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}") from None
