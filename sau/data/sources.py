"""The data sets by name, and the clean images that a defender has of them."""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sau.data import readers
from sau.data.batches import Augment, quantise
from sau.data.images import Images, check_counts
from sau.errors import ConfigError, DataError, require

MAX_SIZE = 1024  # height and width in pixels of the largest images
MAX_OVERLAP = 0.01  # share of the clean images that may be test images, too; official sets have a few twins
DATA_FOLDER = "./data"


@dataclass(frozen=True)
class Source:
    """One data set; `mean` and `std` are those of each channel, in [0, 1], that its networks subtract and divide by."""

    size: int  # height and width of its images in pixels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment  # crop and flip of the training images
    read: Callable[[Path, int], tuple[Images, Images]]  # (folder, size) -> (train, test)
    resizes: bool = False  # whether its images can be read at another size
    about: str = ""  # what it holds, in a line


def _digits(root: Path, size: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 scanned digits of 8x8, enlarged to 16x16x3; a fifth of each class is the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    train, test = (Images.clean(quantise(large[i]), torch.from_numpy(labels[i]).long(), 10) for i in parts)
    return train, test


_CIFAR10 = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
_CIFAR100 = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
_TINY = (0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)
SOURCES = {
    "cifar10": Source(32, *_CIFAR10, Augment(4, flip=True), partial(readers.cifar, "cifar10"),
                      about="50,000 and 10,000 images, 10 classes, 32x32; downloaded"),
    "cifar100": Source(32, *_CIFAR100, Augment(4), partial(readers.cifar, "cifar100"),
                       about="50,000 and 10,000 images, 100 classes, 32x32; downloaded"),
    "gtsrb": Source(32, (0.0,) * 3, (1.0,) * 3, Augment(4), readers.gtsrb, True, "traffic signs, 43 classes"),
    "tiny": Source(64, *_TINY, Augment(4), readers.tiny, True, "Tiny ImageNet, 200 classes, 64x64"),
    "folder": Source(32, *_CIFAR10, Augment(4), readers.folder, True,
                     "your own images: train/CLASS/, test/CLASS/ of --dataset_path"),
    "digits": Source(16, (0.304,) * 3, (0.319,) * 3, Augment(2), _digits,
                     about="1,437 and 360 images of scikit-learn, 10 classes; needs no files"),
}  # fmt: skip


# Classes, training and test images of the whole official data set. Of several training sets BackdoorBench's comes
# first: GTSRB's archive has 39,209 images, the one that torchvision fetches 26,640.
OFFICIAL: dict[str, tuple[int, tuple[int, ...], int]] = {
    "cifar10": (10, (50_000,), 10_000),
    "cifar100": (100, (50_000,), 10_000),
    "gtsrb": (43, (39_209, 26_640), 12_630),
    "tiny": (200, (100_000,), 10_000),
}


def source(name: str) -> Source:
    """Look a data set up by name; ConfigError lists the names that exist."""
    if name not in SOURCES:
        raise ConfigError(f"unknown data set {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load(name: str, root: str | Path = DATA_FOLDER, img_size: int | None = None) -> tuple[Images, Images]:
    """Train and test images of a data set, one of `SOURCES`, from under `root`, in BackdoorBench's or torchvision's
    layout. `img_size` is the height and width to bring them to, where they can be resized; None means their own."""
    origin = source(name)
    size = origin.size if img_size is None else img_size
    if not 8 <= size <= MAX_SIZE or (size != origin.size and not origin.resizes):
        allowed = f"8 to {MAX_SIZE}" if origin.resizes else str(origin.size)
        raise ConfigError(f"img_size is {size}, allowed for {name} is {allowed}")
    return origin.read(Path(root), size)


def subset_note(name: str, train: Images, test: Images) -> list[str]:
    """A line if a data set is not the whole official one; none if it is, or if there is no official one."""
    whole = OFFICIAL.get(name)
    if whole is None or (len(train) in whole[1] and len(test) == whole[2]):
        return []
    counts = f"{len(train):,} of {whole[1][0]:,} training and {len(test):,} of {whole[2]:,} test images"
    return [f"subset of {name}: {counts}; no figure from it speaks for {name}"]


def fingerprint(images: Images) -> str:
    """SHA-256 over pixels and labels: tells whether two runs saw the same images in the same order."""
    digest = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def clean_subset(images: Images, ratio: float, seed: int, index_file: str | None = None) -> Images:
    """The defender's clean images: `int(ratio * N)` drawn as BackdoorBench draws them, so that the indices equal the
    published lists, or the indices of a file."""
    n = len(images)
    if index_file is not None:
        lines, allowed = " ".join(readers.read_lines(Path(index_file))).split(), {str(i): i for i in range(n)}
        picked = [allowed.pop(line, -1) for line in lines]
        if -1 in picked:
            wrong = lines[picked.index(-1)][:40]
            raise DataError(f"{index_file} holds {wrong!r}; allowed are whole numbers 0..{n - 1}, each once")
    else:
        require("ratio (clean share)", ratio, 0 < ratio <= 1, "above 0 and up to 1")
        picked = random.Random(int(seed)).sample(range(n), int(ratio * n))
    if not picked:
        raise DataError(f"the clean set is empty: --ratio {ratio} of {n} images, --index {index_file}; give more")
    return images[torch.tensor(picked, device=images.labels.device)]


def check_clean_set(given: Images, test: Images, kind: str = "clean") -> list[str]:
    """What to know about a defender's images, of this `kind`, before a result is believed, a line each. DataError if
    more than `MAX_OVERLAP` of them are test images: no figure would mean anything."""
    arrays = (images.pixels.cpu().numpy() for images in (given, test))
    sums, others = ([hashlib.sha256(each.tobytes()).digest() for each in array] for array in arrays)
    known = {*others}
    shared, twins = sum(one in known for one in sums), len(sums) - len({*sums})
    if shared > MAX_OVERLAP * len(given):
        raise DataError(f"{shared} of {len(given)} {kind} images are test images, too; give the defense others")
    found = {"test images, too": shared, "copies of others": twins}
    notes = [f"{count} of {len(given)} {kind} images are {what}" for what, count in found.items() if count]
    return notes + check_counts(given.labels.bincount(minlength=given.num_classes), kind)
