"""The files of each data set: CIFAR, GTSRB, Tiny ImageNet, and anybody's folders of images."""

import csv
import hashlib
import io
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sau.compat.torch_file import ALLOWED
from sau.data.decode import cached, decode
from sau.data.images import Images
from sau.errors import DataError, first_line

Samples = list[tuple[str, int]]  # (path, label) of each image
CIFAR = {"cifar10": 10, "cifar100": 100}  # classes; downloaded where they are missing

# CIFAR


def cifar(name: str, root: Path) -> tuple[Images, Images]:
    """Train and test images [N, 3, 32, 32] of cifar10, or of cifar100 with the fine classes, from the official files.

    A smaller file is a subset. Downloads to `root`/`name` what is nowhere under `root`. DataError if a file is missing
    or damaged, or the download failed.
    """
    folder, official = find_cifar(name, root), _torchvision(name)

    def split(files: list[list[str]], count: int) -> Images:
        parts = [_cifar_batch(folder / file, md5, CIFAR[name], count // len(files)) for file, md5 in files]
        return Images.clean(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]), CIFAR[name])

    return split(official.train_list, 50_000), split(official.test_list, 10_000)


def find_cifar(name: str, root: Path) -> Path:
    """The folder of the files, which are downloaded if need be."""
    return _cifar_folder(name, root) or _download(root / name, _torchvision(name))


def needs_download(name: str, root: Path) -> bool:
    """Whether the data set cannot be read from under `root` without a download."""
    return name in CIFAR and _cifar_folder(name, root) is None


def _torchvision(name: str) -> Any:
    from torchvision import datasets  # knows the official files, their MD5 and where to get them

    return getattr(datasets, name.upper())


def _cifar_folder(name: str, root: Path) -> Path | None:
    """`root/name/base` (BackdoorBench), `root/base` (torchvision) or `root` itself, whichever holds the test file."""
    official = _torchvision(name)
    places = (root / name / official.base_folder, root / official.base_folder, root)
    return next((place for place in places if (place / official.test_list[0][0]).is_file()), None)


def _download(root: Path, official: Any) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    place = root.parent
    if not place.is_dir() and (place.name != "data" or not place.parent.is_dir()):  # the default, ./data, is made
        raise DataError(f"there is no folder {place} for {official.filename}; make it or mend --dataset_path")
    print(f"downloading {official.filename} to {root}")
    try:
        download_and_extract_archive(official.url, str(root), filename=official.filename, md5=official.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"no {official.base_folder} under {place} and the download failed ({first_line(error)}); "
            "name the folder with --dataset_path, or try --dataset digits, which needs no files"
        ) from None
    return root / official.base_folder


_STAND_INS: dict[str, Any] = {name: thing for thing, name in ALLOWED if name.startswith("numpy.")}
_STAND_INS["_codecs.encode"] = lambda text, _: text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries of arrays, texts and numbers. Nothing is imported, so that a file cannot run code."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _STAND_INS[f"{module}.{name}"]


def _cifar_batch(path: Path, md5: str, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Pixels uint8 [N, 3, 32, 32] and labels of one file; it may have another MD5 if it has fewer images than `count`,
    as the official one does."""
    key = "labels" if classes == 10 else "fine_labels"
    try:
        raw = path.read_bytes()
        batch = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        pixels = torch.tensor(batch["data"].values.reshape(-1, 3, 32, 32))
        labels = torch.tensor(getattr(batch[key], "values", batch[key]))
        Images.clean(pixels, labels, classes)  # checks types, lengths and the range of labels
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; delete {path.parent} to download it again") from None
    except Exception as error:  # damaged pickles raise a dozen types
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise DataError(f"{path} is damaged or no CIFAR file with {key!r} ({reason})") from None
    if len(pixels) >= count and hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is damaged or not the official file: its MD5 differs, and with {len(pixels):,} images of "
            f"{count:,} it is no subset; delete it to download it again"
        )
    return pixels, labels


# Folders of images


def gtsrb(root: Path, size: int = 32) -> tuple[Images, Images]:
    """German traffic signs, uint8 [N, 3, size, size], 43 classes: training images by class and file name, test images
    as in GT-final_test.csv. DataError, as in every function of this module, if a file is missing or damaged.

    Layouts: torchvision's (gtsrb/GTSRB/Training), the official archives' (GTSRB/Final_Training/Images) and
    BackdoorBench's (gtsrb/{Train,Test}).
    """
    train, test = find_gtsrb(root)
    tables = [place / "GT-final_test.csv" for place in (test, *test.parents[:3])]
    lines = _lines(next(filter(Path.is_file, tables), tables[0]))
    try:
        rows = csv.DictReader(lines, delimiter=";")
        final = [(str(test / row["Filename"]), int(row["ClassId"])) for row in rows]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"GT-final_test.csv of {test} has a row without Filename or ClassId ({error})") from None
    signs = _samples(train, [f"{label:05d}" for label in range(43)], ".ppm")
    return read_images("gtsrb train", train, signs, size, 43), read_images("gtsrb test", test, final, size, 43)


def find_gtsrb(root: Path) -> tuple[Path, Path]:
    """The folders of the training classes and of the test images."""
    root, test = Path(root).absolute(), "GTSRB/Final_Test/Images"
    layouts = (("GTSRB/Training", test), ("GTSRB/Final_Training/Images", test), ("Train", "Test"))
    for base in (root / "gtsrb", root):
        for train, final in layouts:
            if (base / train).is_dir():
                return base / train, base / final
    raise DataError(
        f"no GTSRB in {root}: neither it nor its folder gtsrb has {', '.join(train for train, _ in layouts)}; "
        "torchvision.datasets.GTSRB(root, download=True) fetches it"
    )


def tiny(root: Path, size: int = 64) -> tuple[Images, Images]:
    """Tiny ImageNet, uint8 [N, 3, size, size]: classes in the order of their ids, then file names.

    The test images are those of `val`: val/images with val_annotations.txt, or val/<id>.
    """
    base = find_tiny(root)
    train, val, ids = base / "train", base / "val", class_folders(base / "train")
    if (val / "images").is_dir():
        rows = [line.split("\t")[:2] for line in _lines(val / "val_annotations.txt")]
        if unknown := [row for row in rows if len(row) < 2 or row[1] not in ids]:
            raise DataError(f"{val / 'val_annotations.txt'} has {unknown[0]}, whose class is no folder of {train}")
        final = sorted(((str(val / "images" / name), ids.index(one)) for name, one in rows), key=lambda row: row[::-1])
    else:
        final = _samples(val, ids, ".jpeg")
    first = _samples(train, ids, ".jpeg")
    return read_images("tiny train", train, first, size, len(ids)), read_images("tiny test", val, final, size, len(ids))


def find_tiny(root: Path) -> Path:
    """The folder of the data set."""
    root, name = Path(root).absolute(), "tiny-imagenet-200"
    for base in (root / "tiny" / name, root / "tiny", root / name, root):
        if (base / "train").is_dir():
            return base
    raise DataError(
        f"no Tiny ImageNet in {root}: there is no folder {name}/train, tiny/{name}/train or train; "
        "unpack http://cs231n.stanford.edu/tiny-imagenet-200.zip there"
    )


def folder(root: Path, size: int = 32) -> tuple[Images, Images]:
    """Own images, uint8 [N, 3, size, size], from train/<class>/* and test/<class>/*; see `image_folder`."""
    root = Path(root).absolute()
    names, others = class_folders(root / "train"), class_folders(root / "test")
    if different := {*names} ^ {*others}:
        raise DataError(f"{root}: only one of train and test has the class {min(different)!a}; both need the same ones")
    return image_folder(root / "train", size, names), image_folder(root / "test", size, names)


def image_folder(root: Path, size: int = 32, names: Sequence[str] | None = None) -> Images:
    """Own images, uint8 [N, 3, size, size], from <class>/*; classes and files by name.

    Every file is an image but hidden ones and those that a system leaves there (`__MACOSX`, `Thumbs.db`, ...).

    Args:
        root: the folder.
        size: height and width that the images are squeezed to.
        names: of all classes in the order of their numbers, among them those of all folders; None numbers the folders
            in their order.
    """
    root = Path(root).absolute()
    folders = class_folders(root)
    if len(folders) < 2:
        raise DataError(f"{root} has {len(folders)} class folders; needed are two or more, with images in them")
    names = folders if names is None else names
    samples = [(path, names.index(folders[label])) for path, label in _samples(root, folders)]
    return read_images("images", root, samples, size, len(names))


# What Windows, macOS, a NAS or a file system leaves between the files of a user; names beginning with "." go anyway.
_STRAY = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "lost+found", "$recycle.bin",
    "system volume information",
}  # fmt: skip


def _stray(name: str) -> bool:
    return name.startswith(".") or name.lower() in _STRAY


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a folder, in order: by number where all are whole numbers (2 before 10), else as text."""
    try:
        names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _stray(entry.name))
    except OSError as error:
        raise DataError(f"cannot list the folder {root}: {error.strerror}") from None
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


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


def read_images(title: str, root: Path, samples: Samples, size: int, classes: int) -> Images:
    """The images of a split, from the cache or decoded with a progress bar."""
    key = [title, str(size)]
    for path, _ in samples:
        try:
            status = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read the image {path}: {error.strerror}") from None
        key.append(f"{os.path.relpath(path, root)} {status.st_size} {status.st_mtime_ns}")
    pixels = cached(key, lambda: {"pixels": decode([path for path, _ in samples], size, title)})["pixels"]
    return Images.clean(pixels, torch.tensor([label for _, label in samples]), classes)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the list {path}: {error}") from None
