"""GTSRB, Tiny ImageNet and anybody's folders of pictures, decoded once and then read from a cache."""

from collections.abc import Sequence
from pathlib import Path

import torch

from sau.data.cache import cached
from sau.data.images import Images
from sau.data.listing import Split, class_folders, pictures, same_classes
from sau.data.official import OFFICIAL
from sau.data.pictures import native_size, read_all
from sau.errors import DataError

_FINAL = "GTSRB/Final_Test/Images"
_LAYOUTS = (("GTSRB/Training", _FINAL), ("GTSRB/Final_Training/Images", _FINAL), ("Train", "Test"))


def gtsrb(root: Path, size: int = 32) -> tuple[Images, Images]:
    """German traffic signs, uint8 [N, 3, size, size], 43 classes: class folders in order, then the order of the CSVs.

    Layouts: torchvision's (gtsrb/GTSRB/Training), the official archives' (GTSRB/Final_Training/Images) and
    gtsrb/{Train,Test}. Pictures that no CSV names are left out.

    Raises:
        DataError: a folder, a CSV or a picture is missing, malformed or damaged; one line names it, as in every
            function of this module.
    """
    base, signs, finals = find_gtsrb(root)
    classes = OFFICIAL["gtsrb"].classes
    train, test = Split(base), Split(base)
    for label in range(classes):
        place = signs / f"{label:05d}"
        train.add(train.annotated(place / f"GT-{label:05d}.csv", place, ";", 7, {str(label): label}))
    tables = [place / "GT-final_test.csv" for place in (finals, *finals.parents) if place.is_relative_to(base)]
    table = next((table for table in tables if table.is_file()), tables[-1])
    test.add(test.annotated(table, finals, ";", 7, {str(label): label for label in range(classes)}))
    return _load("gtsrb", size, train, test, classes)


def find_gtsrb(root: Path) -> tuple[Path, Path, Path]:
    """The folder of the data set, of its training classes and of its test pictures."""
    root = Path(root).absolute()
    for base in (root / "gtsrb", root, *([root.parent] if root.name == "GTSRB" else [])):
        for train, test in _LAYOUTS:
            if (base / train).is_dir():
                return base, base / train, base / test
    names = ", ".join(train for train, _ in _LAYOUTS)
    raise DataError(
        f"no GTSRB in {root}: neither it nor its folder gtsrb has {names}; "
        "torchvision.datasets.GTSRB(root, download=True) fetches it"
    )


def tiny(root: Path, size: int = 64) -> tuple[Images, Images]:
    """Tiny ImageNet, uint8 [N, 3, size, size]: classes in the order of their sorted ids in wnids.txt, then file names.

    There are as many classes as ids. The test pictures are those of `val`: val/images with val_annotations.txt, or
    val/<id>.
    """
    base = find_tiny(root)
    train, test, wnids = Split(base), Split(base), base / "wnids.txt"
    ids = train.text(wnids).split()
    if len(set(ids)) != len(ids) or not all(one.isalnum() for one in ids):
        raise DataError(f"{wnids} is malformed; allowed is one id a line, each id once")
    classes = {one: label for label, one in enumerate(sorted(ids))}
    same_classes(wnids, classes, base / "train", class_folders(base / "train"))
    _add_classes(train, base / "train", classes)
    val = base / "val"
    if (val / "images").is_dir():
        rows = test.annotated(val / "val_annotations.txt", val / "images", "\t", 1, classes)
        test.add(sorted(rows, key=lambda row: (row[0], row[1].name)))
    else:
        _add_classes(test, val, classes)
    return _load("tiny", size, train, test, len(classes))


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


def _add_classes(split: Split, place: Path, classes: dict[str, int]) -> None:
    """Append place/<class>/images/*, or place/<class>/* where there is no folder images."""
    for name, label in classes.items():
        inner = place / name / "images"
        split.add((label, file) for file in pictures(inner if inner.is_dir() else place / name))


def folder(root: Path, size: int = 32) -> tuple[Images, Images]:
    """Own pictures, uint8 [N, 3, size, size], from train/<class>/* and test/<class>/*; classes and files by name.

    Classes whose names are all whole numbers go by number. Hidden files, files beside the class folders and what only
    a system leaves there (`__MACOSX`, `Thumbs.db`, ...) are ignored.
    """
    root = find_folder(root)
    classes, others = class_folders(root / "train"), class_folders(root / "test")
    same_classes(root / "train", classes, root / "test", others)
    if len(classes) < 2:
        raise DataError(f"{root / 'train'} has {len(classes)} class folders; allowed are two or more")
    splits = {"train": Split(root), "test": Split(root)}
    for half, split in splits.items():
        for label, name in enumerate(classes):
            split.add((label, file) for file in pictures(root / half / name))
    return _load("folder", size, splits["train"], splits["test"], len(classes))


def find_folder(root: Path) -> Path:
    """The folder itself, if it has the two that it needs."""
    root = Path(root).absolute()
    for half in ("train", "test"):
        if not (root / half).is_dir():
            raise DataError(f"there is no folder {root / half}; needed are train/<class>/* and test/<class>/*")
    return root


def labelled(root: Path, size: int = 32, names: Sequence[str] | None = None) -> Images:
    """Own pictures, uint8 [N, 3, size, size], from <class>/*; classes and files by name, as in `folder`.

    Args:
        root: the folder.
        size: height and width that the pictures are squeezed to.
        names: of all classes in the order of their numbers, among them those of all folders; None numbers the folders
            in their order.
    """
    root = Path(root).absolute()
    classes, split = class_folders(root), Split(root)
    if len(classes) < 2:
        raise DataError(f"{root} has {len(classes)} class folders; needed are two or more, with clean pictures in them")
    names = classes if names is None else names
    for name in classes:
        split.add((names.index(name), file) for file in pictures(root / name))
    pixels = cached(["labelled", str(size), *split.key], lambda: {"all": read_all(split.paths, size, "clean pictures")})
    return Images.clean(pixels["all"], torch.tensor(split.labels), len(names))


def resized(root: Path, size: int) -> str | None:
    """Which sizes the pictures in <class>/* have, as `20x24 to 300x200`, or None if all are size x size."""
    root = Path(root).absolute()
    files = [file.path for name in class_folders(root) for file in pictures(root / name)]
    sizes = sorted({native_size(file) for file in files}, key=lambda side: side[0] * side[1])
    texts = [f"{width}x{height}" for width, height in (sizes[0], sizes[-1])]
    return None if sizes == [(size, size)] else " to ".join(dict.fromkeys(texts))


def _load(name: str, size: int, train: Split, test: Split, classes: int) -> tuple[Images, Images]:
    """Pixels of both splits from the cache, or decoded with a progress bar."""
    kept = cached(
        [name, str(size), "train", *train.key, "test", *test.key],
        lambda: {
            "train": read_all(train.paths, size, f"{name} train"),
            "test": read_all(test.paths, size, f"{name} test"),
        },
    )
    return (
        Images.clean(kept["train"], torch.tensor(train.labels), classes),
        Images.clean(kept["test"], torch.tensor(test.labels), classes),
    )
