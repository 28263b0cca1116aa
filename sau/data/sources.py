"""The data sets by name: where their files are, how they become `Images`, and what goes with them."""

import hashlib
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sau.data.augment import Augment
from sau.data.images import Images, quantise
from sau.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """One data set.

    Args:
        classes: number of classes.
        shape: channels, height and width of a picture.
        mean: per-channel mean that its networks subtract, in [0, 1].
        std: per-channel standard deviation that they divide by.
        augment: crop and flip of the training pictures.
        read: folder -> (train, test).
    """

    classes: int
    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment
    read: Callable[[Path], tuple[Images, Images]]


def source(name: str) -> Source:
    """Look a data set up by name; ConfigError lists the names that exist."""
    if name not in SOURCES:
        raise ConfigError(f"unknown data set {name!r}; choose one of {', '.join(SOURCES)}")
    return SOURCES[name]


def load(name: str, root: str | Path = "./data") -> tuple[Images, Images]:
    """Read train and test pictures of a data set (module `SOURCES`) from under `root`."""
    return source(name).read(Path(root))


def fingerprint(images: Images) -> str:
    """SHA-256 over pixels and labels: tells whether two runs saw the same pictures in the same order."""
    digest = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for tensor in (images.pixels, images.labels):
        digest.update(tensor.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def clean_subset(images: Images, ratio: float, seed: int, index_file: str | None = None) -> Images:
    """The defender's clean pictures: `int(ratio * N)` drawn as the benchmark draws them, or the indices of a file.

    The draw is Python's `random.sample` right after seeding (defenses.md 0.3), so the indices equal the public lists.
    """
    import random

    n = len(images)
    if index_file is not None:
        picked = _read_indices(Path(index_file), n)
    else:
        if not 0 < ratio <= 1:
            raise ConfigError(f"ratio (clean share) is {ratio}, allowed is above 0 and up to 1")
        picked = random.Random(seed).sample(range(n), int(ratio * n))
    if not picked:
        raise DataError(f"the clean set is empty: {ratio} of {n} pictures is less than one; use a larger --ratio")
    return images[torch.tensor(picked, device=images.labels.device)]


def _read_indices(path: Path, n: int) -> list[int]:
    try:
        lines = path.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the index file {path}: {error}") from None
    bad = [line for line in lines if not line.isdecimal() or int(line) >= n]
    if bad:
        raise DataError(f"{path} holds {bad[0]!r}; allowed are whole numbers 0..{n - 1}, one a line")
    return [int(line) for line in lines]


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dictionaries of numpy arrays, byte strings and numbers; refuses to import anything else."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    allowed |= {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return super().find_class(module, name)


def _cifar_batch(path: Path, md5: str, label_key: str) -> tuple[np.ndarray, list[int]]:
    raw = path.read_bytes()
    if hashlib.md5(raw, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{path} is damaged or not the official file (MD5 differs); delete it to download it again")
    try:
        batch = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
        return batch["data"].reshape(-1, 3, 32, 32), batch[label_key]
    except (pickle.UnpicklingError, KeyError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not a CIFAR batch: {error}") from None


def _cifar10(root: Path) -> tuple[Images, Images]:
    from torchvision.datasets import CIFAR10  # names, sums and address of the official files

    folder = _find(root, "cifar10", CIFAR10.base_folder, CIFAR10.test_list[0][0]) or _download(
        root / "cifar10", CIFAR10
    )

    def split(files: list[list[str]]) -> Images:
        parts = [_cifar_batch(folder / name, md5, "labels") for name, md5 in files]
        pixels = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts]))
        return Images.clean(pixels, torch.tensor([y for _, labels in parts for y in labels]), 10)

    return split(CIFAR10.train_list), split(CIFAR10.test_list)


def _find(root: Path, name: str, base: str, witness: str) -> Path | None:
    """`root/name/base` (BackdoorBench), `root/base` (torchvision) or `root` itself, whichever holds `witness`."""
    for folder in (root / name / base, root / base, root):
        if (folder / witness).is_file():
            return folder
    return None


def _download(root: Path, dataset: Any) -> Path:
    from torchvision.datasets.utils import download_and_extract_archive

    print(f"downloading {dataset.filename} to {root}")
    try:
        download_and_extract_archive(dataset.url, str(root), filename=dataset.filename, md5=dataset.tgz_md5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"no {dataset.base_folder} under {root.parent} and the download failed ({error}); "
            "name the folder with --dataset_path, or try --dataset digits, which needs no files"
        ) from None
    return root / dataset.base_folder


def _digits(root: Path) -> tuple[Images, Images]:
    """scikit-learn's 1,797 scanned digits, 8x8 in 17 grey levels, enlarged to 32x32x3; every fifth one is a test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False).expand(-1, 3, -1, -1)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)

    def split(index: np.ndarray) -> Images:
        return Images.clean(quantise(large[index]), torch.from_numpy(labels[index]).long(), 10)

    return split(train), split(test)


SOURCES = {
    "cifar10": Source(
        10, (3, 32, 32), (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261), Augment(padding=4, flip=True), _cifar10
    ),
    "digits": Source(10, (3, 32, 32), (0.304,) * 3, (0.323,) * 3, Augment(padding=4, flip=False), _digits),
}
