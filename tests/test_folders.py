"""CIFAR-100, GTSRB, Tiny ImageNet, own folders, hostile pictures, and the cache of decoded pictures."""

import csv
import errno
import hashlib
import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
import urllib.error
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.transforms import v2

import sau.data.pictures
from sau.data import cache, cifar
from sau.data.folders import folder, gtsrb, labelled, resized, tiny
from sau.data.images import Images
from sau.data.listing import class_folders
from sau.data.official import OFFICIAL, Official, subset_note
from sau.data.pictures import fit, read_picture
from sau.data.sources import load
from sau.errors import ConfigError, DataError

TINY, HEADER = "tiny-imagenet-200", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"


@pytest.fixture(autouse=True)
def kept(monkeypatch, tmp_path_factory) -> Path:
    """A cache folder of each test's own."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SAU_CACHE", str(place))
    return place


def noise(seed: int, width: int = 9, height: int = 7) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(path: Path, seed: int, **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, **size).save(path, format={".JPEG": "JPEG", ".ppm": "PPM"}.get(path.suffix, "PNG"))
    return path


def row(name: str, label: int) -> str:
    return f"{name};9;7;1;1;8;6;{label}\n"


def make_gtsrb(root: Path) -> Path:
    """torchvision's layout: 43 classes of two pictures, the second one first in the CSV; five test pictures."""
    base = root / "gtsrb"
    for label in range(43):
        place = base / "GTSRB" / "Training" / f"{label:05d}"
        for i in range(2):
            draw(place / f"0000{i}.ppm", 2 * label + i, width=5 + label)
        (place / f"GT-{label:05d}.csv").write_text(HEADER + row("00001.ppm", label) + row("00000.ppm", label))
    names = [draw(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", 100 + i).name for i in range(5)]
    (base / "GT-final_test.csv").write_text(HEADER + "".join(row(name, 40 - i) for i, name in enumerate(names)))
    return root


def make_tiny(root: Path) -> Path:
    """Three classes, listed out of order, of two training pictures; four test pictures, listed out of order."""
    base, ids = root / TINY, ["n03", "n01", "n02"]
    for i, one in enumerate(ids):
        for j in (2, 10):
            draw(base / "train" / one / "images" / f"{one}_{j}.JPEG", 10 * i + j, width=64, height=64)
        (base / "train" / one / f"{one}_boxes.txt").write_text("")
    (base / "wnids.txt").write_text("\n".join(ids) + "\n")
    rows = [(f"val_{i}.JPEG", ids[i % 3]) for i in (3, 1, 0, 2)]
    for i, (name, _) in enumerate(rows):
        draw(base / "val" / "images" / name, 50 + i, width=64, height=64)
    (base / "val" / "val_annotations.txt").write_text("".join(f"{name}\t{one}\t0\t0\t63\t63\n" for name, one in rows))
    return root


def make_folder(root: Path) -> Path:
    for half in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            for j in range(2):
                draw(root / half / name / f"{j}.png", 10 * i + j + len(half))
    return root


def make_cifar100(root: Path, n: int = 20, **other: object) -> Path:
    """A folder of CIFAR-100 files with n pictures each."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (n, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": [i % 100 for i in range(n)], **other}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def equal(one: tuple[Images, Images], other: tuple[Images, Images]) -> bool:
    return all(
        torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in zip(one, other, strict=True)
    )


def by_hand(paths: list[Path], size: int) -> torch.Tensor:
    """torchvision's own reading and resizing, uint8 [N, 3, size, size]."""
    pictures = [torchvision.datasets.folder.pil_loader(path).resize((size, size), 2) for path in paths]
    return torch.stack([v2.functional.pil_to_tensor(picture) for picture in pictures])


def mode(path: Path) -> str:
    with Image.open(path) as picture:
        return picture.mode


# The real files


def test_cifar100_is_what_torchvision_reads(real_data, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)  # it refuses subsets
    pair = cifar.read("cifar100", real_data)
    for images, train, n in zip(pair, (True, False), (2000, 500), strict=True):
        theirs = torchvision.datasets.CIFAR100(str(real_data), train=train)
        assert len(images) == n and images.num_classes == 100 and images.labels.tolist() == theirs.targets
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), theirs.data)
        assert torch.equal(torch.bincount(images.labels), torch.full((100,), n // 100))
    assert "2,000 of 50,000" in str(subset_note("cifar100", *pair))
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "cifar-100-python").symlink_to(real_data / "cifar-100-python")
    for place in (tmp_path, real_data / "cifar-100-python"):
        assert equal(cifar.read("cifar100", place), pair)


def test_cifar10_is_whole(real_data):
    assert subset_note("cifar10", *cifar.read("cifar10", real_data)) is None


def test_gtsrb_is_what_torchvision_reads(real_data):
    pair = gtsrb(real_data)
    for images, split, n in zip(pair, ("train", "test"), (430, 129), strict=True):
        theirs = torchvision.datasets.GTSRB(str(real_data), split=split)
        assert len(images) == n == len(theirs) and images.num_classes == 43
        assert images.labels.tolist() == [label for _, label in theirs]
        squeezed = [v2.functional.pil_to_tensor(v2.functional.resize(one, [32, 32])) for one, _ in theirs]
        assert torch.equal(images.pixels, torch.stack(squeezed))
        assert torch.equal(torch.bincount(images.labels), torch.full((43,), n // 43))
    note = "subset of gtsrb: 430 of 39,209 training and 129 of 12,630 test pictures; no figure from it speaks for gtsrb"
    assert subset_note("gtsrb", *pair) == note


def test_tiny_is_what_the_files_say(real_data):
    base = real_data / TINY
    pair = train, test = tiny(real_data)
    theirs = torchvision.datasets.ImageFolder(str(base / "train"))
    assert len(train) == 400 and train.num_classes == 20 and train.labels.tolist() == theirs.targets
    paths = [Path(path) for path, _ in theirs.samples]
    assert torch.equal(train.pixels, by_hand(paths, 64))
    said = dict(line.split("\t")[:2] for line in (base / "val" / "val_annotations.txt").read_text().splitlines())
    order = sorted(said, key=lambda name: (said[name], name))
    finals = [base / "val" / "images" / name for name in order]
    assert len(test) == 100 and test.labels.tolist() == [theirs.class_to_idx[said[name]] for name in order]
    assert torch.equal(test.pixels, by_hand(finals, 64))
    gray = [i for i, path in enumerate(paths + finals) if mode(path) == "L"]
    pixels = torch.cat([train.pixels, test.pixels])[gray]
    assert len(gray) == 4 and torch.equal(pixels, pixels[:, :1].expand(-1, 3, -1, -1))
    assert "400 of 100,000" in str(subset_note("tiny", *pair))


def test_other_sizes(real_data):
    pair = gtsrb(real_data, 48)
    assert pair[0].pixels.shape == (430, 3, 48, 48)
    first = sorted((real_data / "gtsrb/GTSRB/Training/00000").glob("*.ppm"))[0]
    assert torch.equal(pair[0].pixels[:1], by_hand([first], 48))


# Layouts and order


def test_subset_note_is_silent_for_whole_sets_only():
    def some(n: int) -> Images:
        return Images.clean(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.int64), 2)

    for name, train, test in (
        ("cifar10", 50_000, 10_000), ("cifar100", 50_000, 10_000), ("gtsrb", 39_209, 12_630), ("gtsrb", 26_640, 12_630),
        ("tiny", 100_000, 10_000), ("folder", 5, 5), ("digits", 5, 5),
    ):  # fmt: skip
        assert subset_note(name, some(train), some(test)) is None
        if train > 5:
            assert "\n" not in str(subset_note(name, some(train), some(test - 1)))
            assert f"{train - 1:,} of " in str(subset_note(name, some(train - 1), some(test)))


def test_gtsrb_in_every_layout_and_in_the_order_of_its_csvs(tmp_path):
    base = make_gtsrb(tmp_path) / "gtsrb"
    pair = train, test = gtsrb(tmp_path)
    assert train.labels.tolist() == [label for label in range(43) for _ in range(2)] and train.num_classes == 43
    assert test.labels.tolist() == [40, 39, 38, 37, 36]
    assert torch.equal(train.pixels[:2], by_hand([base / f"GTSRB/Training/00000/0000{i}.ppm" for i in (1, 0)], 32))
    assert equal(gtsrb(base), pair) and equal(gtsrb(base / "GTSRB"), pair)
    shutil.copytree(base / "GTSRB/Training", tmp_path / "official/GTSRB/Final_Training/Images")
    shutil.copytree(base / "GTSRB/Final_Test", tmp_path / "official/GTSRB/Final_Test")
    shutil.copy(base / "GT-final_test.csv", tmp_path / "official/GTSRB/Final_Test/Images")
    assert equal(gtsrb(tmp_path / "official"), pair)
    shutil.copytree(base / "GTSRB/Training", tmp_path / "other/gtsrb/Train")
    shutil.copytree(base / "GTSRB/Final_Test/Images", tmp_path / "other/gtsrb/Test")
    shutil.copy(base / "GT-final_test.csv", tmp_path / "other/gtsrb/Test")
    assert equal(gtsrb(tmp_path / "other"), pair)


def test_tiny_with_val_in_class_folders(tmp_path):
    base = make_tiny(tmp_path) / TINY
    pair = train, test = tiny(tmp_path)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and train.num_classes == 3
    names = [f"{one}/images/{one}_{j}.JPEG" for one in ("n01", "n02", "n03") for j in (10, 2)]  # as strings sort
    assert torch.equal(train.pixels, by_hand([base / "train" / name for name in names], 64))
    assert test.labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(test.pixels, by_hand([base / f"val/images/val_{i}.JPEG" for i in (1, 2, 0, 3)], 64))
    assert equal(tiny(base), pair)
    for name, one in {"val_0": "n03", "val_1": "n01", "val_2": "n02", "val_3": "n03"}.items():
        (base / "val" / one).mkdir(exist_ok=True)
        (base / f"val/images/{name}.JPEG").rename(base / "val" / one / f"{name}.JPEG")
    shutil.rmtree(base / "val/images")
    (base / "val/val_annotations.txt").unlink()
    assert equal(tiny(tmp_path), pair)
    (tmp_path / "tiny").mkdir()
    base.rename(tmp_path / "tiny" / TINY)
    assert equal(tiny(tmp_path), pair)


def test_a_list_may_begin_as_windows_writes_it(tmp_path):
    """With the mark of its byte order."""
    for read, make, file in ((gtsrb, make_gtsrb, CSV3), (tiny, make_tiny, f"{TINY}/wnids.txt")):
        root = make(tmp_path / read.__name__)
        pair = read(root)
        (root / file).write_text((root / file).read_text().replace("Filename", "filename"), encoding="utf-8-sig")
        assert equal(read(root), pair)


def test_own_folders_of_mixed_pictures(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/.DS_Store").write_text("hidden")
    (tmp_path / "train/cat/.DS_Store").write_text("hidden")
    (tmp_path / "test/.git").mkdir()
    (tmp_path / "train/README.txt").write_text("beside the class folders")
    noise(70, 300, 200).save(tmp_path / "train/cat/A.JPG", format="JPEG")
    noise(71).convert("P").save(tmp_path / "train/cat/b.Png", format="PNG")
    noise(72).convert("L").save(tmp_path / "train/cat/c.bmp")
    train, test = folder(tmp_path, 24)
    assert train.labels.tolist() == [0] * 5 + [1] * 2 and test.labels.tolist() == [0, 0, 1, 1]
    assert train.num_classes == 2 and train.pixels.shape == (7, 3, 24, 24) and train.pixels.dtype == torch.uint8
    names = ["cat/0.png", "cat/1.png", "cat/A.JPG", "cat/b.Png", "cat/c.bmp", "dog/0.png", "dog/1.png"]
    assert torch.equal(train.pixels, by_hand([tmp_path / "train" / name for name in names], 24))


def test_labelled_pictures_are_read_in_the_order_of_classes_and_names(tmp_path, blind):
    """At every size from a cache of its own."""
    make_folder(tmp_path)
    images = labelled(tmp_path / "train", 24)
    names = [f"{one}/{i}.png" for one in ("cat", "dog") for i in (0, 1)]
    assert torch.equal(images.pixels, by_hand([tmp_path / "train" / name for name in names], 24))
    assert images.labels.tolist() == [0, 0, 1, 1] and images.num_classes == 2
    assert labelled(tmp_path / "train").pixels.shape == (4, 3, 32, 32)
    blind()
    assert torch.equal(labelled(tmp_path / "train", 24).pixels, images.pixels)


def test_labelled_pictures_have_two_classes(tmp_path, one_line):
    draw(tmp_path / "cat/0.png", 1)
    with pytest.raises(DataError) as refusal:
        labelled(tmp_path)
    assert "1 class folders" in one_line(refusal.value)


def test_classes_that_are_all_numbers_go_by_number(tmp_path):
    for i, name in enumerate(("0", "10", "2")):
        for half in ("train", "test"):
            draw(tmp_path / half / name / "0.png", i)
    train, _ = folder(tmp_path)
    assert torch.equal(train.pixels, by_hand([tmp_path / f"train/{name}/0.png" for name in ("0", "2", "10")], 32))
    assert torch.equal(labelled(tmp_path / "train").pixels, train.pixels)
    draw(tmp_path / "train/b/0.png", 3)
    assert class_folders(tmp_path / "train") == ["0", "10", "2", "b"]  # not all are numbers


def test_labelled_pictures_take_the_numbers_of_given_names(tmp_path):
    make_folder(tmp_path)
    images = labelled(tmp_path / "train", 24, ["dog", "emu", "cat"])
    assert images.labels.tolist() == [2, 2, 0, 0] and images.num_classes == 3
    assert torch.equal(images.pixels, labelled(tmp_path / "train", 24).pixels)


def test_sizes_that_are_changed_are_named(tmp_path):
    for name in ("a/0.png", "b/0.png"):
        draw(tmp_path / name, 1, width=32, height=32)
    assert resized(tmp_path, 32) is None and resized(tmp_path, 16) == "32x32"
    draw(tmp_path / "b/1.png", 2, width=20, height=24)
    draw(tmp_path / "b/2.png", 3, width=300, height=200)
    assert resized(tmp_path, 32) == "20x24 to 300x200"


LEFT = {
    "Thumbs.db": "3/Thumbs.db",
    "desktop.ini": "3/desktop.ini",
    ".DS_Store": "3/.DS_Store",
    "beside the classes": "Desktop.ini",
    "resource forks": "__MACOSX/3/._1.png",
    "of a class": "3/__MACOSX/._1.png",
    "thumbnails of a NAS": "3/@eaDir/SYNO@.fileindexdb",
    "of a NAS": "@eaDir/x",
    "found by fsck": "lost+found/#1234",
    "deleted": "$RECYCLE.BIN/x.png",
    "of Windows": "System Volume Information/x",
}


@pytest.mark.parametrize("what", LEFT)
def test_what_a_system_leaves_is_no_class_and_no_picture(what, tmp_path):
    for name in ("3", "7"):
        draw(tmp_path / name / "0.png", int(name))
    place = tmp_path / LEFT[what]
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"x")
    images = labelled(tmp_path)
    assert images.num_classes == 2 and images.labels.tolist() == [0, 1]


def test_an_empty_folder_of_a_file_system_is_no_class(tmp_path, one_line):
    for name in ("3", "7"):
        draw(tmp_path / name / "0.png", int(name))
    (tmp_path / "lost+found").mkdir()
    assert labelled(tmp_path).num_classes == 2
    (tmp_path / "8").mkdir()  # but of a class it is a mistake
    with pytest.raises(DataError) as refusal:
        labelled(tmp_path)
    assert "the folder" in one_line(refusal.value) and "is empty" in str(refusal.value)


def test_names_as_macos_and_phones_write_them_are_read(tmp_path, one_line):
    for name in ("3", "7"):
        draw(tmp_path / name / "Screenshot 2026-05-12 at 4.42.48\u202fPM.png", int(name))
        draw(tmp_path / name / "\u200eWhatsApp.png", int(name))
    assert len(labelled(tmp_path)) == 4
    draw(tmp_path / "3" / "a\nb.png", 1)
    with pytest.raises(DataError) as refusal:
        labelled(tmp_path)
    assert "control characters" in one_line(refusal.value)


def test_a_data_set_is_read_at_the_size_that_is_asked(tmp_path, one_line):
    make_folder(tmp_path)
    for given, size in ((None, 32), (8, 8), (40, 40)):
        assert [images.pixels.shape[2:] for images in load("folder", tmp_path, given)] == [(size, size)] * 2
    for name, given, allowed in (("folder", 7, "8 to 1024"), ("folder", 1025, "8 to 1024"), ("digits", 16, "32")):
        with pytest.raises(ConfigError) as refusal:
            load(name, tmp_path, given)
        assert one_line(refusal.value) == f"img_size is {given}, allowed for {name} is {allowed}"


# Bad input: a builder of a sound tree, what is done to it, and what the line must name


def swap(old: str, new: str, file: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / file).read_text()
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return change


def empty(root: Path, *places: str) -> None:
    for place in places:
        shutil.rmtree(root / place)


def add_class(root: Path, *places: str) -> None:
    for i, place in enumerate(places):
        draw(root / place / "0.png", 90 + i)


TRAIN0 = "gtsrb/GTSRB/Training/00003"
CSV3, FINAL = f"{TRAIN0}/GT-00003.csv", "gtsrb/GT-final_test.csv"
ANNOTATIONS = f"{TINY}/val/val_annotations.txt"
BAD_TREES = {
    "gtsrb: nothing there": (gtsrb, lambda root: shutil.rmtree(root / "gtsrb"), ""),
    "gtsrb: a class is missing": (gtsrb, lambda root: shutil.rmtree(root / TRAIN0), TRAIN0),
    "gtsrb: no CSV": (gtsrb, lambda root: (root / CSV3).unlink(), CSV3),
    "gtsrb: no test CSV": (gtsrb, lambda root: (root / FINAL).unlink(), FINAL),
    "gtsrb: no test folder": (gtsrb, lambda root: shutil.rmtree(root / "gtsrb/GTSRB/Final_Test"), "Final_Test/Images"),
    "gtsrb: empty CSV": (gtsrb, lambda root: (root / CSV3).write_text(""), CSV3),
    "gtsrb: CSV with a header only": (gtsrb, lambda root: (root / CSV3).write_text(HEADER), CSV3),
    "gtsrb: CSV with a header in its midst": (gtsrb, swap("00000.ppm", HEADER + "00000.ppm", CSV3), CSV3),
    "gtsrb: CSV with commas": (gtsrb, swap(";", ",", CSV3), CSV3),
    "gtsrb: CSV with bytes": (gtsrb, lambda root: (root / CSV3).write_bytes(b"\xff\xfe\x00"), CSV3),
    "gtsrb: CSV cut in a row": (gtsrb, lambda root: (root / CSV3).write_text(HEADER + "00001.ppm;9;7"), CSV3),
    "gtsrb: class of another folder": (gtsrb, swap(";3\n", ";4\n", CSV3), CSV3),
    "gtsrb: class 43": (gtsrb, swap(";40\n", ";43\n", FINAL), FINAL),
    "gtsrb: class no number": (gtsrb, swap(";40\n", ";stop\n", FINAL), FINAL),
    "gtsrb: missing picture": (gtsrb, lambda root: (root / TRAIN0 / "00001.ppm").unlink(), "00001.ppm"),
    "gtsrb: a path": (gtsrb, swap("00001.ppm", "../00002/00001.ppm", CSV3), "../00002/00001.ppm"),
    "gtsrb: a foreign path": (gtsrb, swap("00001.ppm", "..\\00001.ppm", CSV3), CSV3),
    "gtsrb: the folder itself": (gtsrb, swap("00001.ppm", "..", CSV3), CSV3),
    "gtsrb: other case": (gtsrb, swap("00001.ppm", "00001.PPM", CSV3), "00001.PPM"),
    "gtsrb: named twice": (gtsrb, swap("00001.ppm", "00000.ppm", CSV3), "00000.ppm"),
    "gtsrb: a truncated picture": (gtsrb, lambda root: os.truncate(root / TRAIN0 / "00001.ppm", 40), "00001.ppm"),
    "tiny: nothing there": (tiny, lambda root: shutil.rmtree(root / TINY), ""),
    "tiny: no wnids.txt": (tiny, lambda root: (root / TINY / "wnids.txt").unlink(), "wnids.txt"),
    "tiny: empty wnids.txt": (tiny, lambda root: (root / TINY / "wnids.txt").write_text("\n"), "wnids.txt"),
    "tiny: an id twice": (tiny, lambda root: (root / TINY / "wnids.txt").write_text("n01\nn01\n"), "wnids.txt"),
    "tiny: an id is a path": (tiny, swap("n01", "../n01", f"{TINY}/wnids.txt"), "wnids.txt"),
    "tiny: an id without a folder": (tiny, swap("n01", "n01\nn09", f"{TINY}/wnids.txt"), "n09"),
    "tiny: a folder without an id": (tiny, swap("n01\n", "", f"{TINY}/wnids.txt"), "n01"),
    "tiny: an empty class": (tiny, lambda root: (shutil.rmtree(root / TINY / "train/n02/images"),
                                                 (root / TINY / "train/n02/images").mkdir()), "train/n02/images"),
    "tiny: no annotations": (tiny, lambda root: (root / ANNOTATIONS).unlink(), ANNOTATIONS),
    "tiny: unknown id": (tiny, swap("n02", "n07", ANNOTATIONS), "n07"),
    "tiny: annotations with spaces": (tiny, swap("\t", " ", ANNOTATIONS), ANNOTATIONS),
    "tiny: missing picture": (tiny, lambda root: (root / TINY / "val/images/val_2.JPEG").unlink(), "val_2.JPEG"),
    "tiny: no val": (tiny, lambda root: shutil.rmtree(root / TINY / "val"), "val/n01"),
    "tiny: no picture": (tiny, lambda root: (root / TINY / "train/n02/images/n02_2.JPEG").write_text("text"), "n02_2"),
    "folder: no train": (folder, lambda root: shutil.rmtree(root / "train"), "train"),
    "folder: no test": (folder, lambda root: shutil.rmtree(root / "test"), "test"),
    "folder: no class folders": (folder, lambda root: empty(root, "train/cat", "test/cat", "train/dog", "test/dog"),
                                 "train"),
    "folder: one class": (folder, lambda root: empty(root, "train/cat", "test/cat"), "train"),
    "folder: empty class": (folder, lambda root: empty(root, "train/dog") or (root / "train/dog").mkdir(), "train/dog"),
    "folder: class in train only": (folder, lambda root: add_class(root, "train/bird"), "bird"),
    "folder: class in test only": (folder, lambda root: add_class(root, "test/bird"), "bird"),
    "folder: case between halves": (folder, lambda root: (root / "test/cat").rename(root / "test/CAT"), "cat"),
    "folder: composed or not": (folder, lambda root: add_class(root, "train/\u00e9", "test/e\u0301"), "\\xe9"),
    "folder: a line break": (folder, lambda root: draw(root / "train/dog/a\nb.png", 1), "a\\nb.png"),
    "folder: no picture": (folder, lambda root: (root / "train/dog/notes.txt").write_text("text"), "dog/notes.txt"),
    "folder: empty picture": (folder, lambda root: (root / "train/dog/1.png").write_bytes(b""), "dog/1.png"),
    "folder: a folder in a class": (folder, lambda root: (root / "train/dog/more").mkdir(), "dog/more"),
    "folder: a broken link": (folder, lambda root: (root / "train/dog/l.png").symlink_to("nowhere"), "dog/l.png"),
    "folder: another data set": (lambda root: folder(make_tiny(root) / TINY), lambda root: None, f"{TINY}/test"),
    "gtsrb: another data set": (lambda root: gtsrb(make_tiny(root) / TINY), lambda root: None, TINY),
    "tiny: another data set": (tiny, lambda root: shutil.rmtree(root / TINY) or make_folder(root), "wnids.txt"),
}  # fmt: skip
MAKERS = {gtsrb: make_gtsrb, tiny: make_tiny, folder: make_folder}


@pytest.mark.parametrize("case", BAD_TREES)
def test_a_bad_tree_is_refused_and_the_file_named(case, tmp_path, one_line, kept):
    read, spoil, named = BAD_TREES[case]
    MAKERS.get(read, make_folder)(tmp_path)
    spoil(tmp_path)
    with pytest.raises(DataError) as refusal:
        read(tmp_path)
    line = one_line(refusal.value)
    assert str(tmp_path) in line and named in line
    assert not list(kept.iterdir())


# CIFAR files


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": np.zeros((20, 3072), np.float32)}, "an array of 'f4', allowed is u1, and for labels i8"),
        ({"data": np.zeros((20, 1024), np.uint8)}, "1024"),
        ({"data": np.zeros((19, 3072), np.uint8)}, "20 labels"),
        ({"fine_labels": [100] * 20}, "0..99"),
        ({"fine_labels": [-1] * 20}, "0..99"),
        ({"fine_labels": ["a"] * 20}, "damaged"),
        ({"n": 0}, "damaged"),
        ({"filenames": np.random.rand}, "asks for"),
        ({"filenames": Path("x")}, "asks for"),
    ],
)
def test_a_bad_cifar100_file_is_named(changes, named, tmp_path, one_line):
    make_cifar100(tmp_path, **changes)
    with pytest.raises(DataError) as refusal:
        cifar.read("cifar100", tmp_path)
    assert str(tmp_path / "cifar-100-python" / "train") in one_line(refusal.value) and named in str(refusal.value)


def test_as_many_pictures_as_the_official_file_but_other_bytes(monkeypatch, tmp_path, one_line):
    monkeypatch.setitem(OFFICIAL, "cifar100", Official(100, (20,), 20))
    with pytest.raises(DataError) as refusal:
        cifar.read("cifar100", make_cifar100(tmp_path))
    assert "train" in one_line(refusal.value) and "MD5" in str(refusal.value)


def test_truncated_cifar_files_are_refused(tmp_path, one_line):
    raw = (make_cifar100(tmp_path) / "cifar-100-python" / "train").read_bytes()
    for length in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        (tmp_path / "cifar-100-python" / "train").write_bytes(raw[:length])
        with pytest.raises(DataError) as refusal:
            cifar.read("cifar100", tmp_path)
        assert "cifar-100-python/train" in one_line(refusal.value)


def test_the_test_pictures_alone_are_those_of_the_whole(tmp_path):
    """Of CIFAR-100 with all of its classes; the benchmark's layout is looked at first."""
    assert cifar.test_split("cifar100", tmp_path) is None and not cifar.here("cifar100", tmp_path)
    pair = cifar.read("cifar100", make_cifar100(tmp_path))
    alone = cifar.test_split("cifar100", tmp_path)
    assert alone is not None and equal((alone,), pair[1:]) and alone.num_classes == 100
    assert cifar.here("cifar100", tmp_path) and cifar.here("digits", tmp_path)
    make_cifar100(tmp_path / "cifar100", 12)
    assert [len(images) for images in cifar.read("cifar100", tmp_path)] == [12, 12]


def test_a_cifar10_file_is_no_cifar100(tmp_path, one_line):
    make_cifar100(tmp_path, fine_labels=None)
    base = tmp_path / "cifar-100-python"
    (base / "train").write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]}, protocol=2))
    with pytest.raises(DataError) as refusal:
        cifar.read("cifar100", tmp_path)
    assert "fine_labels" in one_line(refusal.value)


def test_a_subset_of_cifar10_is_read_and_said(tmp_path):
    base = tmp_path / "cifar-10-batches-py"
    base.mkdir()
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (base / name).write_bytes(pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [3, 9]}, protocol=2))
    pair = cifar.read("cifar10", tmp_path)
    assert [len(images) for images in pair] == [10, 2] and "10 of 50,000" in str(subset_note("cifar10", *pair))


def test_the_official_sum_lets_a_whole_file_pass(tmp_path):
    raw = pickle.dumps({"data": np.zeros((100, 3072), np.uint8), "labels": [1] * 100}, protocol=2)
    (tmp_path / "batch").write_bytes(raw)
    sums = hashlib.md5(raw).hexdigest()
    assert len(cifar._cifar_batch(tmp_path / "batch", sums, "labels", official=100)[1]) == 100
    with pytest.raises(DataError, match="MD5"):
        cifar._cifar_batch(tmp_path / "batch", "0" * 32, "labels", official=100)


def test_offline_without_cifar100_is_one_line(monkeypatch, tmp_path, one_line):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", offline)
    with pytest.raises(DataError) as refusal:
        cifar.read("cifar100", tmp_path)
    assert "cifar-100-python" in one_line(refusal.value) and "--dataset_path" in str(refusal.value)


# Pictures


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_header(width: int, height: int) -> bytes:
    """A whole JPEG whose header is changed to promise width x height pixels."""
    raw = saved(noise(0), "JPEG")
    at = raw.index(b"\xff\xc0") + 5
    return raw[:at] + struct.pack(">HH", height, width) + raw[at + 4 :]


REFUSED, FRAMES = "refused", {"save_all": True, "append_images": [noise(1)]}
I1 = {  # the rows of the test plan that every image reader must pass: bytes, and what must come out
    "bomb.png": (png(60_000, 60_000, 8, 2, b"\0" * 999), REFUSED),
    "bomb.jpg": (jpeg_header(65_000, 65_000), REFUSED),
    "truncated.png": (saved(noise(0), "PNG")[:120], REFUSED),
    "truncated.jpg": (saved(noise(0, 90, 90), "JPEG")[:2000], REFUSED),
    "cmyk.jpg": (saved(noise(0).convert("CMYK"), "JPEG"), REFUSED),
    "deep.png": (png(2, 1, 16, 2, b"\0" + b"\1\2" * 6), REFUSED),  # Pillow reads it as 8-bit RGB
    "palette and alpha.png": (saved(Image.new("P", (4, 4), 0), "PNG", transparency=0), REFUSED),
    "animated.png": (saved(noise(0), "PNG", **FRAMES), REFUSED),
    "empty.png": (b"", REFUSED),
    "a PNG named.jpg": (saved(noise(0), "PNG"), noise(0)),
}
MORE = {
    "above Pillow's warning.png": (png(9_500, 9_500, 8, 2, b"\0"), REFUSED),
    "above ours.png": (png(8_001, 8_000, 8, 2, b"\0"), REFUSED),
    "deep gray.png": (png(2, 1, 16, 0, b"\0" + b"\1\2" * 2), REFUSED),
    "deep gray and alpha.png": (png(2, 1, 16, 4, b"\0" + b"\1\2" * 4), REFUSED),
    "deep and alpha.png": (png(2, 1, 16, 6, b"\0" + b"\1\2" * 8), REFUSED),
    "transparent.png": (saved(Image.new("RGBA", (4, 4), (9, 9, 9, 254)), "PNG"), REFUSED),
    "gray and transparent.png": (saved(Image.new("LA", (4, 4), (9, 0)), "PNG"), REFUSED),
    "one colour transparent.png": (saved(Image.new("RGB", (4, 4)), "PNG", transparency=(0, 0, 0)), REFUSED),
    "transparent.webp": (saved(Image.new("RGBA", (4, 4)), "WEBP"), REFUSED),
    "animated.webp": (saved(noise(0), "WEBP", **FRAMES), REFUSED),
    "opaque.png": (saved(noise(0).convert("RGBA"), "PNG"), noise(0)),
    "opaque gray.png": (saved(noise(0).convert("LA"), "PNG"), noise(0).convert("L").convert("RGB")),
    "a transparent colour of no pixel.png": (saved(noise(0), "PNG", transparency=(0, 0, 0)), noise(0)),
    "lossless.webp": (saved(noise(0), "WEBP", lossless=True), noise(0)),
    "opaque.webp": (saved(noise(0).convert("RGBA"), "WEBP", lossless=True), noise(0)),
    "palette with graded alpha.png": (saved(noise(0).quantize(9), "PNG", transparency=bytes(range(9))), REFUSED),
    "header second.png": (
        png(2, 1, 8, 2, b"")[:8] + chunk(b"gAMA", b"\0" * 4) + png(2, 1, 8, 2, b"\0" * 7)[8:],
        REFUSED,
    ),
    "zeros.png": (b"\0" * 4096, REFUSED),
    "signature only.png": (b"\x89PNG\r\n\x1a\n", REFUSED),
    "deep.ppm": (b"P6\n2 1\n65535\n" + b"\1\2" * 6, REFUSED),
    "deep and plain.ppm": (b"P3\n1 1\n1000\n1 2 3\n", REFUSED),
    "deep gray.pgm": (b"P5\n2 1\n65535\n" + b"\1\2" * 2, REFUSED),
    "truncated.ppm": (saved(noise(0), "PPM")[:-1], REFUSED),
    "animated.gif": (saved(noise(0), "GIF", **FRAMES), REFUSED),
    "a page.html": (b"<html>404 not found</html>", REFUSED),
    "plain.ppm": (b"P3\n1 1\n255\n1 2 3\n", Image.new("RGB", (1, 1), (1, 2, 3))),
    "gray.png": (saved(noise(0).convert("L"), "PNG"), noise(0).convert("L").convert("RGB")),
    "one bit.png": (saved(noise(0).convert("1"), "PNG"), noise(0).convert("1").convert("RGB")),
    "palette.png": (saved(noise(0).convert("P"), "PNG"), noise(0).convert("P").convert("RGB")),
    "bitmap.bmp": (saved(noise(0), "BMP"), noise(0)),
}


@pytest.mark.parametrize("name", [*I1, *MORE])
def test_pictures_that_harm(name, tmp_path, one_line):
    content, wanted = {**I1, **MORE}[name]
    (tmp_path / name).write_bytes(content)
    if wanted is not REFUSED:
        picture = read_picture(tmp_path / name)
        assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(wanted))
        return
    with pytest.raises(DataError) as refusal:
        read_picture(tmp_path / name)
    assert str(tmp_path / name) in one_line(refusal.value)


def test_the_first_picture_of_a_phones_jpeg_is_read(tmp_path):
    (tmp_path / "phone.jpg").write_bytes(saved(noise(0), "MPO", **FRAMES))
    with Image.open(tmp_path / "phone.jpg") as picture:
        assert picture.n_frames == 2
    expected = Image.open(io.BytesIO(saved(noise(0), "JPEG")))
    assert np.array_equal(np.asarray(read_picture(tmp_path / "phone.jpg")), np.asarray(expected))


def test_fit_gives_whole_numbers(tmp_path):
    squeezed = fit(noise(3, 50, 40), 32, 32)
    assert torch.equal(squeezed, squeezed.round()) and 0 <= squeezed.min() and squeezed.max() <= 255


# The cache


@pytest.fixture
def blind(monkeypatch) -> Callable[[], None]:
    """After a call of it no picture can be decoded."""

    def fail(path):
        raise AssertionError(f"{path} was decoded again")

    return lambda: monkeypatch.setattr(sau.data.pictures, "read_picture", fail)


@pytest.mark.parametrize("read", MAKERS)
def test_the_second_start_decodes_nothing(read, tmp_path, blind, capsys, kept):
    MAKERS[read](tmp_path / "a")
    first = read(tmp_path / "a")
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and str(kept) in out
    blind()
    assert equal(read(tmp_path / "a"), first)
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert equal(read(tmp_path / "b"), first) and capsys.readouterr().out == ""
    with pytest.raises(AssertionError):
        read(tmp_path / "b", 16)


def test_what_is_read_back_can_be_written_to_without_harm(tmp_path):
    folder(make_folder(tmp_path))
    train, _ = folder(tmp_path)
    before = train.pixels.clone()
    train.pixels.zero_()
    assert torch.equal(folder(tmp_path)[0].pixels, before)


def another_at_the_same_time(root: Path) -> None:
    file = root / "train/dog/0.png"
    before = file.stat().st_mtime_ns
    draw(file, 99, width=30)
    os.utime(file, ns=(before, before))


TOUCHES = {
    "another picture": lambda root: draw(root / "train/dog/0.png", 99, width=30),
    "another picture of the same time": another_at_the_same_time,
    "time alone": lambda root: os.utime(root / "train/dog/0.png", ns=(1, 1)),
    "a picture more": lambda root: draw(root / "test/cat/9.png", 98),
    "a picture less": lambda root: (root / "test/cat/0.png").unlink(),
    "another name": lambda root: (root / "train/dog/0.png").rename(root / "train/dog/5.png"),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_a_changed_file_is_decoded_again(touch, tmp_path, blind, monkeypatch):
    folder(make_folder(tmp_path))
    TOUCHES[touch](tmp_path)
    with monkeypatch.context() as closed:
        closed.setattr(sau.data.pictures, "read_picture", None)
        with pytest.raises(TypeError):
            folder(tmp_path)
    fresh = folder(tmp_path)
    for images, half in zip(fresh, ("train", "test"), strict=True):
        assert torch.equal(images.pixels, by_hand(sorted((tmp_path / half).rglob("*.png")), 32))
    blind()
    assert equal(folder(tmp_path), fresh)


def test_a_changed_annotation_changes_the_key_and_the_labels(tmp_path, blind):
    make_tiny(tmp_path)
    assert tiny(tmp_path)[1].labels.tolist() == [0, 1, 2, 2]
    swap("val_1.JPEG\tn01", "val_1.JPEG\tn02", ANNOTATIONS)(tmp_path)
    assert tiny(tmp_path)[1].labels.tolist() == [1, 1, 2, 2]
    swap("63\t63", "63\t62", ANNOTATIONS)(tmp_path)
    blind()
    with pytest.raises(AssertionError):
        tiny(tmp_path)


def flip(raw: bytes, at: int) -> bytes:
    return raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]


DAMAGES = {
    "a bit of the pixels": lambda raw: flip(raw, len(raw) - 100),
    "a bit of the header": lambda raw: flip(raw, 20),
    "truncated": lambda raw: raw[: len(raw) // 2],
    "empty": lambda raw: b"",
    "longer": lambda raw: raw + b"\0",
    "zero tail": lambda raw: raw[:-500] + b"\0" * 500,
    "foreign": lambda raw: b"I am a cache",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_said_in_one_line_and_made_again(damage, tmp_path, blind, capsys, kept):
    first = folder(make_folder(tmp_path))
    (file,) = kept.iterdir()
    sound = file.read_bytes()
    file.write_bytes(DAMAGES[damage](sound))
    capsys.readouterr()
    assert equal(folder(tmp_path), first)
    said, made = capsys.readouterr().out.splitlines()
    assert str(file) in said and "decoding again" in said and "kept" in made
    assert [*kept.iterdir()] == [file] and file.stat().st_size == len(sound)
    blind()
    assert equal(folder(tmp_path), first) and capsys.readouterr().out == ""


def test_a_cache_of_other_pictures_is_not_taken(tmp_path, capsys, kept):
    folder(make_folder(tmp_path / "a"))
    (other,) = kept.iterdir()
    foreign = other.read_bytes()
    make_folder(tmp_path / "b")
    draw(tmp_path / "b/train/dog/0.png", 97)
    right = folder(tmp_path / "b")
    (file,) = set(kept.iterdir()) - {other}
    file.write_bytes(foreign)
    capsys.readouterr()
    assert equal(folder(tmp_path / "b"), right)
    assert str(file) in capsys.readouterr().out.splitlines()[0]


def test_a_full_disk_costs_the_cache_alone(tmp_path, monkeypatch, capsys, kept):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    first = folder(make_folder(tmp_path))
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "not kept" in out and "no room" in out and not list(kept.iterdir())
    monkeypatch.undo()
    assert equal(folder(tmp_path), first)


@pytest.mark.parametrize("place", ["a file", "below a file", "no home"])
def test_an_unwritable_cache_folder_costs_the_cache_alone(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    if place == "no home":
        monkeypatch.delenv("SAU_CACHE")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    else:
        monkeypatch.setenv("SAU_CACHE", str(tmp_path / "file" / ("below" if place == "below a file" else "")))
    train, _ = folder(make_folder(tmp_path / "data"))
    out = capsys.readouterr().out
    assert len(train) == 4 and "not kept" in out.splitlines()[-1] and len(out.splitlines()) <= 2


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("SAU_CACHE", "~/mine")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / "mine"
    monkeypatch.setenv("SAU_CACHE", "")
    assert cache.cache_folder() == tmp_path / "xdg" / "sau"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == tmp_path / ".cache" / "sau"


def test_keys_tell_their_parts_apart():
    keys = {cache._key(parts) for parts in (["ab", "c"], ["a", "bc"], ["abc"], ["abc", ""], [], ["c", "ab"])}
    assert len(keys) == 6


@pytest.mark.parametrize("version", ["_FORMAT", "PIL.__version__"])
def test_another_version_decodes_anew(version, monkeypatch):
    before = cache._key(["a"])
    monkeypatch.setattr(f"sau.data.cache.{version}", "another")
    assert cache._key(["a"]) != before


def test_the_sum_of_a_cache_sees_names_types_shapes_and_bytes():
    x = torch.arange(6, dtype=torch.uint8)
    variants = [{"a": x}, {"b": x}, {"a": x.to(torch.int8)}, {"a": x.view(2, 3)}, {"a": x.flip(0)}, {"a": x, "b": x}]
    assert len({cache._digest(one) for one in variants}) == len(variants)


def test_an_error_while_decoding_keeps_nothing(kept):
    def broken():
        raise DataError("one.png is damaged")

    with pytest.raises(DataError, match="one.png"):
        cache.cached(["x"], broken)
    assert not list(kept.iterdir())


RACE = """
import sys, torch
from sau.data.cache import cached
for i in range(20):
    want = {"train": torch.full((300, 3, 32, 32), i, dtype=torch.uint8), "test": torch.arange(i)}
    for repeat in range(2):
        got = cached([str(i)], lambda: want)
        assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want), i
"""


def test_two_processes_may_fill_the_same_cache(kept):
    racers = [
        subprocess.Popen([sys.executable, "-c", RACE], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    outputs = [racer.communicate(timeout=280)[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0], outputs
    assert not any("damaged" in text or "not kept" in text for text in outputs)
    assert len(list(kept.iterdir())) == 20 and all(file.suffix == ".safetensors" for file in kept.iterdir())


def test_the_csv_reader_agrees_with_pythons(real_data):
    """Labels of the test set against csv.DictReader, an independent reading of the same file."""
    _, test = gtsrb(real_data)
    with (real_data / "gtsrb/GT-final_test.csv").open() as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    assert test.labels.tolist() == [int(one["ClassId"]) for one in rows]
    names = [real_data / "gtsrb/GTSRB/Final_Test/Images" / one["Filename"] for one in rows[:20]]
    assert torch.equal(test.pixels[:20], by_hand(names, 32))
