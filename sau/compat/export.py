"""Writing an attack for other code: as a folder that BackdoorBench's own loader reads, and its images as tensors."""

import io
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
import torch
from PIL import Image

from sau import files
from sau.compat.backdoorbench import blank
from sau.data.images import CROSS, Images
from sau.data.sources import OFFICIAL, source
from sau.errors import RecordError
from sau.record import attack_result
from sau.record.attack_result import BACKDOORBENCH
from sau.record.folder import Record

NETWORKS = ("preactresnet18", "vgg19", "vgg19_bn")  # that BackdoorBench builds as we do


def pictures(record: Record, data: str | None = None) -> tuple[Images, Images, Images, int]:
    """Clean training set, poisoned training images (maybe none), triggered test set, number of clean test images.

    `data` is the folder of the data sets; None is where the attack had them. RecordError if the record is of a clean
    network, or its data set has changed.
    """
    attacked = attack_result.load(record.path)
    if attacked.triggered is None:
        raise RecordError(f"{record.path} holds a clean network, so there are no pictures to export; name an attack")
    train, test, _ = attacked.images(data)
    poisoned = train[torch.arange(0)] if attacked.poisoned is None else attacked.poisoned
    return train, poisoned, attacked.triggered, len(test)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `target` at the end of the block, and is deleted on an error.

    RecordError if `target` exists or cannot be written.
    """
    if target.exists() or target.is_symlink():
        raise RecordError(f"{target} exists; choose another folder")
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(target)
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if temporary is not None:
            rmtree(temporary, ignore_errors=True)


def save_png(pixels: torch.Tensor, path: Path) -> None:
    """Write one image, uint8 [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def write(record: Record, target: Path, name: str, data: str | None = None) -> None:
    """Write a finished attack as a folder that BackdoorBench's `load_attack_result` reads, whole or not at all.

    Args:
        record: of an attack.
        target: the new folder.
        name: under which BackdoorBench will find it, as `record/<name>` in its own folder: the stored paths say so.
        data: see `pictures`.

    Raises:
        RecordError: BackdoorBench has no such data set or network, or as in `pictures` and `new_folder`.
    """
    config = record.check()
    files.safe_join(target.parent, name)  # refuses what is no plain name
    dataset, network = config["data"]["dataset"], config["model"]
    _check_expressible(dataset, network)
    train, poisoned, triggered, n_test = pictures(record, data)
    official, size = OFFICIAL[dataset], source(dataset).size
    if (len(train), n_test) != (official.train[0], official.test):
        raise RecordError(
            f"the record saw a part of {dataset} ({len(train):,} and {n_test:,} pictures), in BackdoorBench it has "
            f"{official.train[0]:,} and {official.test:,} under other indices"
        )
    weights, order = record.load_tensors("model"), blank(network["name"], official.classes, (3, size, size))
    with new_folder(target) as folder:
        content = {
            "model_name": network["name"],
            "num_classes": official.classes,
            "model": OrderedDict((key, weights[key]) for key in order),
            "data_path": f"./data/{dataset}",
            "img_size": (size, size, 3),
            "clean_data": dataset,
            "bd_train": _split(poisoned, "train", np.arange(len(train)), len(train), folder, name),
            "bd_test": _split(triggered, "test", triggered.index.numpy(), n_test, folder, name),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.write(folder / BACKDOORBENCH, _for_numpy_1(buffer.getvalue()))


def _check_expressible(dataset: str, network: dict[str, Any]) -> None:
    """RecordError if BackdoorBench has no such data set or cannot build this network."""
    if dataset not in OFFICIAL:
        raise RecordError(f"BackdoorBench has no data set {dataset}; exported are {', '.join(OFFICIAL)}")
    origin = source(dataset)
    wanted: dict[str, tuple[Any, ...]] = {"name": NETWORKS, "width": (None, 64)}
    wanted |= {"shape": ([3, origin.size, origin.size],), "mean": (list(origin.mean),), "std": (list(origin.std),)}
    for key, allowed in wanted.items():
        if network[key] not in allowed:
            choices = " or ".join(map(str, allowed))
            raise RecordError(f"{key} of the network is {network[key]}; BackdoorBench has {choices} for {dataset}")


def _split(images: Images, split: str, order: np.ndarray, length: int, folder: Path, name: str) -> dict[str, Any]:
    """`bd_train` or `bd_test`, and its PNG files; covers get a folder of their own, by which they are recognised."""
    table = {}
    rows = zip(*(getattr(images, key).tolist() for key in ("index", "labels", "true_labels", "role")), strict=True)
    for pixels, (index, stored, true, role) in zip(images.pixels, rows, strict=True):
        path = f"{'cross' if role == CROSS else 'bd'}_{split}_dataset/{true}/{index}.png"
        save_png(pixels, folder / path)
        table[index] = {"path": f"./record/{name}/{path}", "other_info": [stored, true]}
    flags = np.zeros(length)
    flags[images.index.numpy()] = 1
    place = f"./record/{name}/bd_{split}_dataset"
    return {
        "bd_data_container": {"save_folder_path": place, "data_dict": table, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": order,
        "poison_indicator": flags,
        "save_folder_path": place,
    }


def _for_numpy_1(raw: bytes) -> bytes:
    """The archive with numpy's modules under their names in numpy 1, which both versions read.

    `.format_version` is left out: it promises distances between members that only torch's own writer keeps.
    """
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as new:
        for member in old.infolist():
            content = old.read(member)
            if member.filename.endswith("/.format_version"):
                continue
            if member.filename.endswith("/data.pkl"):
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(member.filename, content)
    return out.getvalue()
