"""The files of CIFAR, GTSRB, Tiny ImageNet and own folders, image files, and the cache of decoded images."""

import hashlib
import io
import os
import pickle
import shutil
import struct
import urllib.error
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hostile import Call, touch
from PIL import Image
from torchvision.transforms import v2
from toys import refuses

from sau.data import readers
from sau.data.decode import read_image
from sau.data.images import Images
from sau.data.readers import cifar, class_folders, folder, gtsrb, image_folder, tiny
from sau.data.sources import load, subset_note
from sau.errors import DataError

TINY, HEADER = "tiny-imagenet-200", "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
pytestmark = pytest.mark.usefixtures("own_cache")


def noise(seed: int, width: int = 9, height: int = 7) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def draw(path: Path, seed: int, **size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise(seed, **size).save(path, format={".JPEG": "JPEG", ".ppm": "PPM"}.get(path.suffix, "PNG"))
    return path


def make_gtsrb(root: Path) -> Path:
    """torchvision's layout: 43 classes of two images; five test images, the first of class 40."""
    base = root / "gtsrb"
    for label in range(43):
        place = base / "GTSRB" / "Training" / f"{label:05d}"
        for i in range(2):
            draw(place / f"0000{i}.ppm", 2 * label + i, width=5 + label)
        (place / f"GT-{label:05d}.csv").write_text(HEADER)
    names = [draw(base / "GTSRB" / "Final_Test" / "Images" / f"{i}.ppm", 100 + i).name for i in range(5)]
    rows = [f"{name};9;7;1;1;8;6;{40 - i}\n" for i, name in enumerate(names)]
    (base / "GT-final_test.csv").write_text(HEADER + "".join(rows), encoding="utf-8-sig")  # as Windows writes it
    return root


def make_tiny(root: Path) -> Path:
    """Three classes of two training images; four test images, listed out of order."""
    base, ids = root / TINY, ["n03", "n01", "n02"]
    for i, one in enumerate(ids):
        for j in (2, 10):
            draw(base / "train" / one / "images" / f"{one}_{j}.JPEG", 10 * i + j, width=64, height=64)
        (base / "train" / one / f"{one}_boxes.txt").write_text("")
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


def make_cifar100(root: Path, **other: object) -> Path:
    """A folder of CIFAR-100 files with 20 images each."""
    base = root / "cifar-100-python"
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": [*range(20)], **other}
        (base / name).write_bytes(pickle.dumps(batch, protocol=2))
    return root


def equal(one: tuple[Images, Images], other: tuple[Images, Images]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in pairs)


def by_hand(paths: list[Path], size: int) -> torch.Tensor:
    """torchvision's own reading and resizing, uint8 [N, 3, size, size]."""
    images = [torchvision.datasets.folder.pil_loader(path).resize((size, size), 2) for path in paths]
    return torch.stack([v2.functional.pil_to_tensor(image) for image in images])


def test_cifar10_is_the_official_one(real_data, tmp_path):
    """The sums are those of torchvision's decoded arrays, [N, 32, 32, 3]. One flipped bit is found."""
    pair = load("cifar10", real_data)
    assert subset_note("cifar10", *pair) == []
    sums = "17e2cb5a4119d89a4a13e02b91701bff", "6d2714505047e13831cd876923568712"
    for images, n, md5 in zip(pair, (50_000, 10_000), sums, strict=True):
        channels_last = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        assert len(images) == n and hashlib.md5(channels_last).hexdigest() == md5
    shutil.copytree(real_data / "cifar-10-batches-py", tmp_path / "cifar-10-batches-py", symlinks=True)
    file = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    raw = bytearray(file.read_bytes())
    raw[10_000_000] ^= 1
    file.unlink()
    file.write_bytes(raw)
    with pytest.raises(DataError, match="data_batch_2.*MD5"):
        load("cifar10", tmp_path)


def test_cifar100_is_what_torchvision_reads_in_every_layout(real_data, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.CIFAR100, "_check_integrity", lambda self: True)  # it refuses subsets
    pair = cifar("cifar100", real_data)
    for images, train, n in zip(pair, (True, False), (2000, 500), strict=True):
        theirs = torchvision.datasets.CIFAR100(str(real_data), train=train)
        assert len(images) == n and images.num_classes == 100 and images.labels.tolist() == theirs.targets
        assert np.array_equal(images.pixels.permute(0, 2, 3, 1).numpy(), theirs.data)
    assert "2,000 of 50,000" in str(subset_note("cifar100", *pair))
    (tmp_path / "cifar100").mkdir()
    (tmp_path / "cifar100" / "cifar-100-python").symlink_to(real_data / "cifar-100-python")
    for place in (tmp_path, real_data / "cifar-100-python"):
        assert equal(cifar("cifar100", place), pair)


def test_gtsrb_in_every_layout(tmp_path):
    base = make_gtsrb(tmp_path) / "gtsrb"
    pair = train, test = gtsrb(tmp_path)
    assert train.labels.tolist() == [label for label in range(43) for _ in range(2)] and train.num_classes == 43
    assert test.labels.tolist() == [40, 39, 38, 37, 36]
    assert torch.equal(train.pixels[:2], by_hand([base / f"GTSRB/Training/00000/0000{i}.ppm" for i in (0, 1)], 32))
    assert equal(gtsrb(base), pair)
    shutil.copytree(base / "GTSRB/Training", tmp_path / "official/GTSRB/Final_Training/Images")
    shutil.copytree(base / "GTSRB/Final_Test", tmp_path / "official/GTSRB/Final_Test")
    shutil.copy(base / "GT-final_test.csv", tmp_path / "official/GTSRB/Final_Test/Images")
    assert equal(gtsrb(tmp_path / "official"), pair)
    shutil.copytree(base / "GTSRB/Training", tmp_path / "other/gtsrb/Train")
    shutil.copytree(base / "GTSRB/Final_Test/Images", tmp_path / "other/gtsrb/Test")
    shutil.copy(base / "GT-final_test.csv", tmp_path / "other/gtsrb/Test")
    assert equal(gtsrb(tmp_path / "other"), pair)


def test_tiny_in_every_layout(tmp_path):
    base = make_tiny(tmp_path) / TINY
    pair = train, test = tiny(tmp_path)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2] and train.num_classes == 3
    names = [f"{one}/images/{one}_{j}.JPEG" for one in ("n01", "n02", "n03") for j in (10, 2)]  # as strings sort
    assert torch.equal(train.pixels, by_hand([base / "train" / name for name in names], 64))
    assert test.labels.tolist() == [0, 1, 2, 2]
    assert torch.equal(test.pixels, by_hand([base / f"val/images/val_{i}.JPEG" for i in (1, 2, 0, 3)], 64))
    for name, one in {"val_0": "n03", "val_1": "n01", "val_2": "n02", "val_3": "n03"}.items():
        (base / "val" / one).mkdir(exist_ok=True)
        (base / f"val/images/{name}.JPEG").rename(base / "val" / one / f"{name}.JPEG")
    shutil.rmtree(base / "val/images")
    assert equal(tiny(base), pair)
    (tmp_path / "tiny").mkdir()
    base.rename(tmp_path / "tiny" / TINY)
    assert equal(tiny(tmp_path), pair)


def test_own_folders_of_mixed_images(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/README.txt").write_text("beside the class folders")
    noise(70, 300, 200).save(tmp_path / "train/cat/A.JPG", format="JPEG")
    noise(71).convert("P").save(tmp_path / "train/cat/b.Png", format="PNG")
    noise(72).convert("L").save(tmp_path / "train/cat/c.bmp")
    train, test = folder(tmp_path, 24)
    assert train.labels.tolist() == [0] * 5 + [1] * 2 and test.labels.tolist() == [0, 0, 1, 1]
    assert train.num_classes == 2 and train.pixels.shape == (7, 3, 24, 24) and train.pixels.dtype == torch.uint8
    names = ["cat/0.png", "cat/1.png", "cat/A.JPG", "cat/b.Png", "cat/c.bmp", "dog/0.png", "dog/1.png"]
    assert torch.equal(train.pixels, by_hand([tmp_path / "train" / name for name in names], 24))
    named = image_folder(tmp_path / "train", 24, ["dog", "emu", "cat"])
    assert named.labels.tolist() == [2] * 5 + [0] * 2 and named.num_classes == 3
    assert torch.equal(named.pixels, train.pixels)


def test_classes_that_are_all_numbers_go_by_number(tmp_path):
    for i, name in enumerate(("0", "10", "2")):
        draw(tmp_path / name / "0.png", i)
    images = image_folder(tmp_path)
    assert torch.equal(images.pixels, by_hand([tmp_path / f"{name}/0.png" for name in ("0", "2", "10")], 32))
    assert images.labels.tolist() == [0, 1, 2]
    draw(tmp_path / "b/0.png", 3)
    assert class_folders(tmp_path) == ["0", "10", "2", "b"]  # not all are numbers


STRAY = """3/Thumbs.db 3/desktop.ini 3/.DS_Store Desktop.ini __MACOSX/3/._1.png 3/__MACOSX/._1.png 3/@eaDir/x @eaDir/x
lost+found/#1 $RECYCLE.BIN/x.png .git/x""".split()


@pytest.mark.parametrize("stray", STRAY)
def test_what_a_system_leaves_is_no_class_and_no_image(stray, tmp_path):
    for name in ("3", "7"):
        draw(tmp_path / name / "Screenshot 2026-05-12 at 4.42.48\u202fPM.png", int(name))  # as macOS names it
    place = tmp_path / stray
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"x")
    images = image_folder(tmp_path)
    assert images.num_classes == 2 and images.labels.tolist() == [0, 1]


# Bad input: a reader, what is done to a sound tree, and what the line must name


def swap(old: str, new: str, file: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        text = (root / file).read_text("utf-8-sig")
        assert old in text
        (root / file).write_text(text.replace(old, new))

    return change


def remove(place: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / place) if (root / place).is_dir() else (root / place).unlink()


def empty(place: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / place) or (root / place).mkdir()


CLASS, FINAL, ANNOTATIONS = "gtsrb/GTSRB/Training/00003", "gtsrb/GT-final_test.csv", f"{TINY}/val/val_annotations.txt"
BAD_TREES = [
    (gtsrb, remove("gtsrb"), "torchvision.datasets.GTSRB"),
    (gtsrb, empty(CLASS), "00003"),
    (gtsrb, remove(FINAL), "GT-final_test.csv"),
    (gtsrb, swap(";40\n", ";43\n", FINAL), "0..42"),
    (gtsrb, lambda root: os.truncate(root / CLASS / "00001.ppm", 40), "00001.ppm"),
    (tiny, remove(TINY), "tiny-imagenet-200.zip"),
    (tiny, remove(ANNOTATIONS), "val_annotations.txt"),
    (tiny, swap("n02", "n07", ANNOTATIONS), "n07"),
    (folder, remove("train"), "train"),
    (folder, lambda root: [remove(f"{half}/cat")(root) for half in ("train", "test")], "1 class folders"),
    (folder, empty("train/dog"), "dog"),
    (folder, lambda root: (root / "test/cat").rename(root / "test/CAT"), "CAT"),
    (folder, lambda root: (root / "train/dog/notes.txt").write_text("text"), "dog/notes.txt"),
]


@pytest.mark.parametrize(("read", "spoil", "named"), BAD_TREES)
def test_a_bad_tree_is_refused_and_the_file_named(read, spoil, named, tmp_path):
    {gtsrb: make_gtsrb, tiny: make_tiny, folder: make_folder}[read](tmp_path)
    spoil(tmp_path)
    with refuses(DataError, named):
        read(tmp_path)


BAD_BATCHES = {
    "floats": {"data": np.zeros((20, 3072), np.float32)},
    "objects": {"data": np.zeros((20, 3072), object)},
    "another width": {"data": np.zeros((20, 1024), np.uint8)},
    "fewer images": {"data": np.zeros((19, 3072), np.uint8)},
    "a class above": {"fine_labels": [100] * 20},
    "a function": {"filenames": np.random.rand},
    "a class of Python": {"filenames": Path("x")},
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_cifar_file_is_named(case, tmp_path):
    make_cifar100(tmp_path, **BAD_BATCHES[case])
    with refuses(DataError, str(tmp_path / "cifar-100-python" / "train")):
        cifar("cifar100", tmp_path)


def test_malicious_truncated_and_missing_cifar_files_are_named_and_not_run(tmp_path):
    canary = tmp_path / "canary"
    file = make_cifar100(tmp_path, filenames=Call(os.system, touch(canary))) / "cifar-100-python" / "train"
    with pytest.raises(DataError, match=r"asks for \w+\.system"):
        cifar("cifar100", tmp_path)
    assert not canary.exists()
    raw = file.read_bytes()
    pickle.loads(raw)  # noqa: S301
    assert canary.exists()  # it would have run
    for length in (0, 100, len(raw) // 2, len(raw) - 1):
        file.write_bytes(raw[:length])
        with pytest.raises(DataError, match="cifar-100-python/train"):
            cifar("cifar100", tmp_path)
    file.unlink()
    with pytest.raises(DataError, match="cifar-100-python/train"):
        cifar("cifar100", tmp_path)


def test_missing_cifar_is_downloaded_into_the_benchmarks_layout(monkeypatch, tmp_path):
    calls, errors = [], [urllib.error.URLError("no route to host"), RuntimeError("File not found or corrupted.")]

    def fetch(url, root, filename, md5):
        calls.append((url.rsplit("/")[-1], root, md5))
        raise errors[len(calls) % 2]

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    monkeypatch.chdir(tmp_path)
    for name, root in (("cifar10", tmp_path), ("cifar100", tmp_path), ("cifar10", Path("data"))):
        assert readers.needs_download(name, root)
        with refuses(DataError, *("--dataset_path", "--dataset digits", str(root))):
            load(name, root)
    assert calls[0] == ("cifar-10-python.tar.gz", str(tmp_path / "cifar10"), "c58f30108f718f92721af3b95e74349a")
    with pytest.raises(DataError, match="mistyped"):
        load("cifar10", tmp_path / "mistyped")
    assert len(calls) == 3


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


GRAY, FRAMES = noise(0).convert("L"), {"save_all": True, "append_images": [noise(1)]}
IMAGE_FILES: dict[str, tuple[bytes, Image.Image | None]] = {  # bytes, and what must come out; None is refused
    "bomb.bmp": (saved(noise(0), "BMP").replace(struct.pack("<ii", 9, 7), struct.pack("<ii", 60_000, 60_000)), None),
    "truncated.png": (saved(noise(0), "PNG")[:120], None),
    "truncated.jpg": (saved(noise(0, 90, 90), "JPEG")[:2000], None),
    "cmyk.jpg": (saved(noise(0).convert("CMYK"), "JPEG"), None),
    "deep gray.png": (saved(Image.new("I;16", (2, 1)), "PNG"), None),
    "animated.gif": (saved(noise(0), "GIF", **FRAMES), None),
    "empty.png": (b"", None),
    "a PNG named.jpg": (saved(noise(0), "PNG"), noise(0)),
    "opaque.png": (saved(noise(0).convert("RGBA"), "PNG"), noise(0)),
    "opaque gray.png": (saved(GRAY.convert("LA"), "PNG"), GRAY),
    "lossless.webp": (saved(noise(0), "WEBP", lossless=True), noise(0)),
    "plain.ppm": (b"P3\n1 1\n255\n1 2 3\n", Image.new("RGB", (1, 1), (1, 2, 3))),
    "palette.png": (saved(noise(0).convert("P"), "PNG"), noise(0).convert("P")),
    "bitmap.bmp": (saved(noise(0), "BMP"), noise(0)),
}


@pytest.mark.parametrize("name", IMAGE_FILES)
def test_an_image_file_is_read_as_8_bit_rgb_or_refused(name, tmp_path):
    content, wanted = IMAGE_FILES[name]
    (tmp_path / name).write_bytes(content)
    if wanted is not None:
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), np.asarray(wanted.convert("RGB")))
        return
    with refuses(DataError, str(tmp_path / name)):
        read_image(tmp_path / name)


@pytest.fixture
def blind(monkeypatch) -> Callable[[], None]:
    """After a call of it no image can be decoded."""

    def fail(path):
        raise AssertionError(f"{path} was decoded again")

    return lambda: monkeypatch.setattr(readers, "read_image", fail)


def test_the_second_start_decodes_nothing(tmp_path, blind, capsys, own_cache):
    """Nor does one after the data set was moved; what is read back may be written to without harm."""
    first = folder(make_folder(tmp_path / "a"))
    out = capsys.readouterr().out
    assert out.count("\n") == 2 and str(own_cache) in out
    blind()
    assert equal(folder(tmp_path / "a"), first)
    shutil.move(tmp_path / "a", tmp_path / "b")
    again = folder(tmp_path / "b")
    assert equal(again, first) and capsys.readouterr().out == ""
    again[0].pixels.zero_()
    assert equal(folder(tmp_path / "b"), first)
    with pytest.raises(AssertionError):
        folder(tmp_path / "b", 16)


def test_a_changed_file_is_decoded_again(tmp_path, blind):
    """Another image at the same time, another time alone, and one more."""
    folder(make_folder(tmp_path))
    file = tmp_path / "train/dog/0.png"

    def another_at_the_same_time() -> None:
        before = file.stat().st_mtime_ns
        os.utime(draw(file, 99, width=30), ns=(before, before))

    for change in (another_at_the_same_time, lambda: os.utime(file, ns=(1, 1)),
                  lambda: draw(tmp_path / "train/cat/9.png", 98)):  # fmt: skip
        change()
        fresh = folder(tmp_path)
        for images, half in zip(fresh, ("train", "test"), strict=True):
            assert torch.equal(images.pixels, by_hand(sorted((tmp_path / half).rglob("*.png")), 32))
    blind()
    assert equal(folder(tmp_path), fresh)
    os.utime(tmp_path / "train/dog/1.png", ns=(2, 2))
    with pytest.raises(AssertionError):
        folder(tmp_path)
