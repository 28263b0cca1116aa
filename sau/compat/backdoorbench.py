"""BackdoorBench's result folders, `attack_result.pt` and the PNG files beside it: read and written.

Nothing in the file is run, weights are matched by name, and images are opened only in the folders `bd_...` and
`cross_...` beside the file, wherever the attack had stored them.
"""

import hashlib
import io
import reprlib
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sau import files
from sau.compat import torch_file, weights
from sau.compat.torch_file import Array
from sau.data.images import BACKDOOR, CROSS, Images
from sau.data.readers import read_images
from sau.data.sources import DATA_FOLDER, OFFICIAL, source
from sau.errors import MALFORMED, RecordError, SauError, require
from sau.models import build, state_dict_spec
from sau.record.attack_result import BACKDOORBENCH, AttackResult

NETWORKS = ("preactresnet18", "vgg19", "vgg19_bn")  # that BackdoorBench builds as we do


def read(folder: Path) -> AttackResult:
    """Read `attack_result.pt` of a folder and the images that it lists, no clean ones; RecordError names the file and
    what is wrong. Images of a folder `cross_...` have role CROSS. WaNet and its like store covers among the others,
    which then have role BACKDOOR and labels equal to true_labels."""
    path = folder / BACKDOORBENCH
    raw = torch_file.content(path)
    content = torch_file.load(path, raw)
    try:
        return _attack_result(content, folder, hashlib.sha256(raw).hexdigest())
    except SauError as error:
        raise RecordError(f"{path}: {str(error)[:300]}") from None
    except MALFORMED as error:
        raise RecordError(f"{path} is not as BackdoorBench writes it: {error!r:.200}") from None


def blank(name: str, classes: int, size: int) -> dict[str, Tensor]:
    """The state dict of the published network, without memory for its values; ConfigError if there is none."""
    return state_dict_spec(lambda: build(name, classes, shape=(3, size, size), mean=(0.0,) * 3, std=(1.0,) * 3).net)


def _attack_result(content: Any, folder: Path, digest: str) -> AttackResult:
    dataset, name = content["clean_data"], content["model_name"]
    require("clean_data", dataset, isinstance(dataset, str) and dataset in OFFICIAL, ", ".join(OFFICIAL))
    (classes, train, test), origin = OFFICIAL[dataset], source(dataset)
    size = origin.size
    require("num_classes", content["num_classes"], content["num_classes"] == classes, f"{classes}, as {dataset} has")
    require("img_size", content["img_size"], list(content["img_size"]) == [size, size, 3], f"({size}, {size}, 3)")
    tensors = weights.collect(folder / BACKDOORBENCH, content["model"]).of(blank(name, classes, size))
    triggered, test_length = _images(folder, "bd_test", content["bd_test"], classes, size, test)
    poisoned, train_length = None, None
    if content["bd_train"] is not None:  # None where the attack stored none (Blind, LIRA)
        poisoned, train_length = _images(folder, "bd_train", content["bd_train"], classes, size, train[0])
    network = {"name": name, "classes": classes, "width": None, "shape": [3, size, size]}
    return AttackResult(
        path=folder, network={**network, "mean": list(origin.mean), "std": list(origin.std)}, weights=tensors,
        triggered=triggered, poisoned=poisoned, dataset=dataset, dataset_path=DATA_FOLDER, recipe=None,
        fingerprints=None, lengths=(train_length, test_length), digest=digest,
    )  # fmt: skip


def _images(folder: Path, name: str, state: Any, classes: int, size: int, most: int) -> tuple[Images | None, int]:
    """The images of `bd_train` or `bd_test` with a trigger, in the order of the attack, and how many the attack saw."""
    table = state["bd_data_container"]["data_dict"]
    flags, order = (_integers(state[key], f"{key} of {name}") for key in ("poison_indicator", "original_index_array"))
    n = len(flags)
    require(f"the length of {name}", n, n <= most, f"up to {most:,}")
    if len(np.unique(order)) < len(order) or not ((order >= 0) & (order < n)).all():
        raise RecordError(f"{name}'s indices are not different numbers from 0 to {n - 1}")
    chosen = order[flags[order] != 0]
    if name == "bd_test" and not len(chosen) == len(order) > 0:
        raise RecordError(f"bd_test has {len(order)} images, {len(chosen)} of them triggered; all must be")
    if not len(chosen):
        return None, n
    rows = [_row(folder, name, table[index], index) for index in chosen.tolist()]
    images = read_images(f"BackdoorBench {name}", folder, [row[:2] for row in rows], size, classes)
    true, role = torch.tensor([row[2:] for row in rows]).unbind(1)
    more = {"true_labels": true, "role": role.to(torch.uint8), "index": torch.from_numpy(chosen)}
    return Images.restore({**images.tensors(), **more}, classes), n


def _integers(value: Any, what: str) -> np.ndarray:
    """int64 from a numpy array or a list of whole numbers."""
    given = np.asarray(value.values if isinstance(value, Array) else value, dtype=float)
    if given.ndim != 1 or not (given == given.round()).all() or (abs(given) > 1e9).any():
        raise RecordError(f"{what} is not a vector of whole numbers")
    return given.astype(np.int64)


def _row(folder: Path, name: str, entry: Any, index: int) -> tuple[str, int, int, int]:
    """The file of an image, its stored label, its true label and its role."""
    path, (stored, true) = entry["path"], entry["other_info"]
    parts = path.replace("\\", "/").split("/")[-3:]
    # Older versions store another path than they write to, and a path or a link may lead out of the folder.
    for file in (folder.joinpath(*parts), folder / f"{name}_dataset" / str(true) / f"{index}.png"):
        if file.is_file() and file.resolve().is_relative_to(folder.resolve()):
            return str(file), stored, true, CROSS if parts[0].startswith("cross_") else BACKDOOR
    raise RecordError(f"{file} is missing or no ordinary file, and so is {reprlib.repr(path)}; copy the whole folder")


def exported_images(attacked: AttackResult, data: str | None = None) -> tuple[Images, Images, Images, int]:
    """Clean training set, poisoned training images (maybe none), triggered test set, number of clean test images.
    `data` is the folder of the data sets; None is where the attack had them. RecordError for a clean network."""
    if attacked.triggered is None:
        raise RecordError(f"{attacked.path} holds a clean network, so there are no images to export; name an attack")
    train, test, _ = attacked.images(data)
    poisoned = train[torch.arange(0)] if attacked.poisoned is None else attacked.poisoned
    return train, poisoned, attacked.triggered, len(test)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes `target` at the end of the block, and is deleted on an error. RecordError if
    `target` exists, OSError if it cannot be written."""
    if target.exists() or target.is_symlink():
        raise RecordError(f"{target} exists; choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        place = Path(temporary) / "new"
        place.mkdir()
        yield place
        place.rename(target)


def save_png(pixels: Tensor, path: Path) -> None:
    """Write one image, uint8 [3, H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)


def write(attacked: AttackResult, target: Path, name: str, data: str | None = None) -> None:
    """Write a finished attack to `target`, which BackdoorBench's `load_attack_result` reads, whole or not at all.

    The stored paths say that it lies at `record/<name>` in BackdoorBench's own folder. RecordError if BackdoorBench has
    no such data set or network, or as in `exported_images` (which `data` is for) and `new_folder`.
    """
    files.safe_join(target.parent, name)  # refuses what is no plain name
    dataset, network = attacked.dataset, attacked.network
    if dataset not in OFFICIAL:
        raise RecordError(f"BackdoorBench has no data set {dataset}; exported are {', '.join(OFFICIAL)}")
    origin, size = source(dataset), source(dataset).size
    published = {"shape": [3, size, size], "mean": list(origin.mean), "std": list(origin.std)}
    if not (network["name"] in NETWORKS and network["width"] in (None, 64) and published.items() <= network.items()):
        theirs = f"BackdoorBench has {' or '.join(NETWORKS)} of width 64 and {published} for {dataset}"
        raise RecordError(f"the network is {network}; {theirs}")
    train, poisoned, triggered, n_test = exported_images(attacked, data)
    classes, whole, whole_test = OFFICIAL[dataset]
    if (len(train), n_test) != (whole[0], whole_test):
        seen = f"the record saw a part of {dataset} ({len(train):,} and {n_test:,} images)"
        raise RecordError(f"{seen}, in BackdoorBench it has {whole[0]:,} and {whole_test:,} under other indices")
    with new_folder(target) as folder:
        content = {
            "model_name": network["name"],
            "num_classes": classes,
            "model": OrderedDict((key, attacked.weights[key]) for key in blank(network["name"], classes, size)),
            "data_path": f"./data/{dataset}",
            "img_size": (size, size, 3),
            "clean_data": dataset,
            "bd_train": _split(poisoned, "train", np.arange(len(train)), len(train), folder, name),
            "bd_test": _split(triggered, "test", triggered.index.numpy(), n_test, folder, name),
        }
        _save_for_numpy_1(content, folder / BACKDOORBENCH)


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


def _save_for_numpy_1(content: Any, path: Path) -> None:
    """`torch.save` with numpy's modules under their names in numpy 1, which both versions read."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith("/.format_version"):  # it promises distances that only torch's own writer keeps
                member = old.read(name)
                if name.endswith("/data.pkl"):
                    member = member.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
                new.writestr(name, member)
