"""Records for other people's code: a folder that BackdoorBench's own loader reads, and the pictures as tensors."""

import io
import struct
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
from sau.compat.backdoorbench import RESULT, blank
from sau.data.images import COVER, Images
from sau.data.sources import OFFICIAL, source
from sau.errors import RecordError
from sau.record import attack_result
from sau.record.folder import Record

NETWORKS = ("preactresnet18", "vgg19", "vgg19_bn")  # built in BackdoorBench as they are here


def pictures(record: Record, data: str | None = None) -> tuple[Images, Images, Images, int]:
    """The pictures of a checked record of an attack, on the CPU.

    Args:
        record: of an attack.
        data: folder of the data sets; None means where the attack had them.

    Returns:
        The clean training set, the poisoned training pictures (maybe none), the triggered test set, and the number of
        clean test pictures.

    Raises:
        RecordError: the record is of a clean network, or its data set is not what it was.
    """
    attacked = attack_result.load(record.path)
    if attacked.triggered is None:
        raise RecordError(f"{record.path} holds a clean network, so there are no pictures to export; name an attack")
    train, test, _ = attacked.pictures(data)
    poisoned = train[torch.arange(0)] if attacked.poisoned is None else attacked.poisoned
    return train, poisoned, attacked.triggered, len(test)


@contextmanager
def whole(target: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `target` if no error comes and vanishes otherwise.

    Raises:
        RecordError: `target` exists, or the disk refuses.
    """
    if target.exists() or target.is_symlink():
        raise RecordError(f"{target} exists; choose another folder")
    made = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        yield made
        made.chmod(0o755)
        made.rename(target)
    except OSError as error:
        raise RecordError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        if made is not None:
            rmtree(made, ignore_errors=True)


def save_png(pixels: torch.Tensor, path: Path) -> None:
    """Write one picture, uint8 [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def write(record: Record, target: Path, name: str, data: str | None = None) -> None:
    """Write a finished record as a folder that BackdoorBench's `load_attack_result` reads.

    The layout is the one that its own writer makes. The folder appears whole or not at all.

    Args:
        record: of an attack.
        target: the new folder; no such thing may exist yet.
        name: under which BackdoorBench will find it, as `record/<name>` in its own folder: the stored paths say so.
        data: see `pictures`.

    Raises:
        RecordError: BackdoorBench has no such data set or network, or `pictures` or `whole` refuse.
    """
    made = record.check()
    files.safe_join(target.parent, name)  # refuses what is no plain name
    dataset, network = made["data"]["dataset"], made["model"]
    _expressible(dataset, network)
    train, poisoned, triggered, n_test = pictures(record, data)
    official, size = OFFICIAL[dataset], source(dataset).size
    classes, lengths = official.classes, (official.train[0], official.test)
    if lengths != (len(train), n_test):
        raise RecordError(
            f"the record saw a part of {dataset} ({len(train):,} and {n_test:,} pictures), in BackdoorBench it has "
            f"{lengths[0]:,} and {lengths[1]:,} under other indices"
        )
    weights, order = record.load_tensors("model"), blank(network["name"], classes, (3, size, size))
    with whole(target) as place:
        content = {
            "model_name": network["name"],
            "num_classes": classes,
            "model": OrderedDict((key, weights[key]) for key in order),
            "data_path": f"./data/{dataset}",
            "img_size": (size, size, 3),
            "clean_data": dataset,
            "bd_train": _part(poisoned, "train", np.arange(lengths[0]), lengths[0], place, name),
            "bd_test": _part(triggered, "test", triggered.index.numpy(), lengths[1], place, name),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        files.write(place / RESULT, _rename(buffer.getvalue()))


def _expressible(dataset: str, network: dict[str, Any]) -> None:
    """RecordError if BackdoorBench cannot have this data set or build this network."""
    if dataset not in OFFICIAL:
        raise RecordError(f"BackdoorBench has no data set {dataset}; exported are {', '.join(OFFICIAL)}")
    name, origin = network["name"], source(dataset)
    size = origin.size
    if name not in NETWORKS:
        raise RecordError(f"BackdoorBench has no network {name} like this one; exported are {', '.join(NETWORKS)}")
    if network["width"] not in (None, 64):
        raise RecordError(f"BackdoorBench has {name} in width 64 only, not in width {network['width']}")
    if network["shape"] != [3, size, size]:
        raise RecordError(f"BackdoorBench has {dataset} in {size}x{size} pixels only, not as {network['shape']}")
    if (network["mean"], network["std"]) != (list(origin.mean), list(origin.std)):
        raise RecordError(f"BackdoorBench normalises {dataset} otherwise than this network was trained")


def _part(images: Images, split: str, order: np.ndarray, length: int, place: Path, name: str) -> dict[str, Any]:
    """`bd_train` or `bd_test` with its PNG files; covers get a folder of their own, so that they are known again."""
    table = {}
    rows = zip(*(getattr(images, key).tolist() for key in ("index", "labels", "true_labels", "role")), strict=True)
    for pixels, (index, stored, true, role) in zip(images.pixels, rows, strict=True):
        path = f"{'cross' if role == COVER else 'bd'}_{split}_dataset/{true}/{index}.png"
        save_png(pixels, place / path)
        table[index] = {"path": f"./record/{name}/{path}", "other_info": [stored, true]}
    flags = np.zeros(length)
    flags[images.index.numpy()] = 1
    folder = f"./record/{name}/bd_{split}_dataset"
    return {
        "bd_data_container": {"save_folder_path": folder, "data_dict": table, "save_file_format": ".png"},
        "getitem_all": True,
        "getitem_all_switch": False,
        "original_index_array": order,
        "poison_indicator": flags,
        "save_folder_path": folder,
    }


def _rename(raw: bytes) -> bytes:
    """The archive with numpy's modules under their names in numpy 1, which both read; members aligned to 64 bytes.

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
            entry = zipfile.ZipInfo(member.filename)
            gap = -(out.tell() + 30 + len(entry.filename) + 4) % 64  # 30 bytes of header, then name, then this field
            entry.extra = b"FB" + struct.pack("<H", gap) + bytes(gap)
            new.writestr(entry, content)
    return out.getvalue()
