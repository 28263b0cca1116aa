"""The data sets by name: where their files are, how they become `Images`, and what goes with them."""

import hashlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sau.data import SIDE, cifar
from sau.data.augment import Augment
from sau.data.folders import find_folder, find_gtsrb, find_tiny, folder, gtsrb, tiny
from sau.data.images import Images, quantise
from sau.errors import ConfigError, DataError
from sau.types import Labels


@dataclass(frozen=True)
class Source:
    """One data set.

    Args:
        size: height and width of its pictures in pixels.
        mean: per-channel mean that its networks subtract, in [0, 1].
        std: per-channel standard deviation that they divide by.
        augment: crop and flip of the training pictures.
        read: (folder, size) -> (train, test).
        resizes: whether its pictures can be read at another size.
        find: looks for its files below a folder, downloads what can be, and raises DataError if there is nothing.
        about: what it holds, in a line.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    read: Callable[[Path, int], tuple[Images, Images]]
    resizes: bool = False
    find: Callable[[Path], Any] = lambda root: None
    about: str = ""


def source(name: str) -> Source:
    """Look a data set up by name; ConfigError lists the names that exist."""
    if name not in SOURCES:
        raise ConfigError(f"unknown data set {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load(name: str, root: str | Path = "./data", img_size: int | None = None) -> tuple[Images, Images]:
    """Read train and test pictures of a data set, one of `SOURCES`, from under `root`.

    Args:
        name: of the data set.
        root: folder of the data sets, in the benchmark's or in torchvision's layout.
        img_size: height and width to bring the pictures to, where the data set can be resized; None means its own.
    """
    origin = source(name)
    size = origin.size if img_size is None else img_size
    if not 8 <= size <= SIDE or (size != origin.size and not origin.resizes):
        allowed = f"8 to {SIDE}" if origin.resizes else str(origin.size)
        raise ConfigError(f"img_size is {size}, allowed for {name} is {allowed}")
    return origin.read(Path(root), size)


def fingerprint(images: Images) -> str:
    """SHA-256 over pixels and labels: tells whether two runs saw the same pictures in the same order."""
    digest = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def clean_subset(images: Images, ratio: float, seed: int, index_file: str | None = None) -> Images:
    """The defender's clean pictures: `int(ratio * N)` drawn as the benchmark draws them, or the indices of a file.

    The draw is Python's `random.sample` right after seeding, so the indices equal the public lists.
    """
    n = len(images)
    if index_file is not None:
        picked = _read_indices(Path(index_file), n)
    else:
        check_share(ratio)
        picked = random.Random(seed).sample(range(n), int(ratio * n))
    if not picked:
        reason = f"{index_file} names none" if index_file else f"{ratio} of {n} is less than one; use a larger --ratio"
        raise DataError(f"the clean set is empty: {reason}")
    return images[torch.tensor(picked, device=images.labels.device)]


def last_of_each(labels: Labels, share: float) -> Tensor:
    """[N] of bool: the last `share` of each class, at least one picture and never all; none of a class that has one."""
    last = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        last[mine[len(mine) - min(len(mine) - 1, max(1, round(share * len(mine)))) :]] = True
    return last


def check_share(ratio: float) -> None:
    """ConfigError if a data set cannot have such a share of clean pictures."""
    if not 0 < ratio <= 1:
        raise ConfigError(f"ratio (clean share) is {ratio}, allowed is above 0 and up to 1")


def _read_indices(path: Path, n: int) -> list[int]:
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the index file {path}: {error}") from None
    bad = [line for line in lines if not line.isdecimal() or len(line) > 18 or int(line) >= n]
    if bad:
        raise DataError(f"{path} holds {bad[0][:40]!r}; allowed are whole numbers 0..{n - 1}, one a line")
    picked = [int(line) for line in lines]
    if len({*picked}) < len(picked):
        twice = next(index for index, count in Counter(picked).items() if count > 1)
        raise DataError(f"{path} holds {twice} more than once; allowed is each index once")
    return picked


def index_note(path: str | None, n: int) -> str | None:
    """What to say of an index file whose largest index is so small that its indices were hardly drawn from `n` images:
    by chance, that happens once in a million draws."""
    picked = _read_indices(Path(path), n) if path is not None else []
    if not picked or ((max(picked) + 1) / n) ** len(picked) > 1e-6:
        return None
    return (
        f"the largest of the {len(picked):,} indices in {path} is {max(picked):,}, but there are {n:,} images; were "
        "they drawn from another data set?"
    )


def _digits(root: Path, size: int) -> tuple[Images, Images]:
    """scikit-learn's 1,797 scanned digits, 8x8 in 17 grey levels, enlarged to 32x32x3; a fifth is the test set,
    drawn class by class."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)

    def split(index: np.ndarray) -> Images:
        return Images.clean(quantise(large[index]), torch.from_numpy(labels[index]).long(), 10)

    return split(train), split(test)


_NATURAL = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)  # of CIFAR-10


def _cifar(name: str) -> dict[str, Any]:
    return {"read": lambda root, size: cifar.read(name, root), "find": partial(cifar.find, name)}


SOURCES = {
    "cifar10": Source(
        32,
        *_NATURAL,
        Augment(padding=4, flip=True),
        about="50,000 and 10,000 images, 10 classes, 32x32; downloaded",
        **_cifar("cifar10"),
    ),
    "cifar100": Source(
        32,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        Augment(4),
        about="50,000 and 10,000 images, 100 classes, 32x32; downloaded",
        **_cifar("cifar100"),
    ),
    "gtsrb": Source(
        32, (0.0,) * 3, (1.0,) * 3, Augment(4), gtsrb, resizes=True, find=find_gtsrb, about="traffic signs, 43 classes"
    ),
    "tiny": Source(
        64,
        (0.4802, 0.4481, 0.3975),
        (0.2302, 0.2265, 0.2262),
        Augment(4),
        tiny,
        resizes=True,
        find=find_tiny,
        about="Tiny ImageNet, 200 classes, 64x64",
    ),  # fmt: skip
    "folder": Source(
        32,
        *_NATURAL,
        Augment(4),
        folder,
        resizes=True,
        find=find_folder,
        about="your own images, train/CLASS/ and test/CLASS/ of --dataset_path",
    ),
    "digits": Source(
        32,
        (0.304,) * 3,
        (0.323,) * 3,
        Augment(4),
        _digits,
        about="1,437 and 360 images of scikit-learn, 10 classes; needs no files",
    ),
}
