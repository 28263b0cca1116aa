"""Pictures: containers, batches, augmentation, clean subsets, files of data sets and pictures of users."""

import os
import pickle
import random
import shutil
import struct
import urllib.error
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.datasets.utils
from PIL import Image
from toys import toy_images

from sau.attack import BadNet
from sau.data import cifar
from sau.data import images as images_module
from sau.data.augment import Augment, turn
from sau.data.images import Batches, Images, quantise, some, to_float
from sau.data.pictures import fit, read_picture
from sau.data.sources import SOURCES, clean_subset, fingerprint, index_note, load, source
from sau.errors import ConfigError, DataError, RecordError
from sau.record.attack_result import AttackResult

# Images and quantise


def test_labels_out_of_range_are_refused(one_line):
    pixels = torch.zeros(3, 3, 4, 4, dtype=torch.uint8)
    for labels in ([0, 1, 4], [-1, 0, 1]):
        with pytest.raises(DataError) as refusal:
            Images.clean(pixels, torch.tensor(labels), 4)
        assert "0..3" in one_line(refusal.value)


def test_pictures_and_labels_must_be_as_many(one_line, unchecked):
    with pytest.raises(DataError) as refusal:
        Images.clean(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), 4)
    assert "3 pictures but labels [2]; each picture needs one label" in one_line(refusal.value)


def test_picking_keeps_what_belongs_together():
    images = toy_images(12)
    picked = images[torch.tensor([7, 2])]
    assert len(picked) == 2 and picked.num_classes == 4
    assert picked.index.tolist() == [7, 2] and picked.labels.tolist() == [3, 2]
    assert torch.equal(picked.pixels, images.pixels[[7, 2]])
    assert set(images.tensors()) == {"pixels", "labels", "true_labels", "role", "index"}
    assert torch.equal(images.to(torch.device("cpu")).pixels, images.pixels)


def test_every_grey_level_survives_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(levels)
    assert x.dtype == torch.float32 and float(x.max()) == 1 and float(x.min()) == 0
    assert torch.equal(quantise(x), levels)
    assert torch.equal(quantise(levels.float() / 255), levels) and torch.equal(quantise(levels.double() / 255), levels)


def test_quantise_truncates_and_clips():
    """3.99 grey levels are 3, not 4; 0.9 are 0; below 0 and above 255 are cut."""
    x = torch.tensor([3.99, 0.9, -3.0, 300.0, 254.9, 255.0]).view(1, 1, 2, 3) / 255
    assert quantise(x).flatten().tolist() == [3, 0, 0, 255, 254, 255]


def test_conversions_leave_their_argument_alone():
    x, levels = torch.rand(2, 3, 4, 4), torch.full((2, 3, 4, 4), 7, dtype=torch.uint8)
    before = x.clone()
    quantise(x), to_float(levels)
    assert torch.equal(x, before) and (levels == 7).all()
    assert to_float(x) is x


def test_some_of_many_are_spread_evenly():
    assert some(10, 4).tolist() == [0, 3, 6, 9] and some(3, 10).tolist() == [0, 1, 2] and some(5, 1).tolist() == [0]


WRONG_TENSORS = {
    "one is missing": lambda kept: kept.pop("role"),
    "floats": lambda kept: kept.update(pixels=kept["pixels"].float()),
    "pictures in a row": lambda kept: kept.update(pixels=kept["pixels"].flatten(1)),
    "fewer labels": lambda kept: kept.update(labels=kept["labels"][1:]),
    "none": lambda kept: kept.update({name: tensor[:0] for name, tensor in kept.items()}),
    "a place below 0": lambda kept: kept.update(index=kept["index"] - 1),
    "a label below 0": lambda kept: kept.update(labels=kept["labels"] - 1),
    "a true label that is no class": lambda kept: kept.update(true_labels=kept["true_labels"] + 1),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.usefixtures("unchecked")
def test_stored_pictures_that_are_none_are_refused(wrong, one_line):
    kept = toy_images(8).tensors()
    assert torch.equal(Images.restore(kept, 4).pixels, kept["pixels"])
    WRONG_TENSORS[wrong](kept)
    with pytest.raises(DataError) as refusal:
        Images.restore(kept, 4)
    assert one_line(refusal.value).startswith("stored ")


# Batches


def numbered(n: int, size: int, **how) -> Batches:
    """Batches over n pictures whose pixel value and label are their number."""
    numbers = torch.arange(n)
    pixels = numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    return Batches(pixels, (numbers,), size, **how)


def order(batches: Batches) -> list[int]:
    return [int(i) for _, labels in batches for i in labels]


def test_without_a_seed_the_order_is_that_of_the_pictures():
    """Three of eight; of seven the last one, which batch norm could not be trained with, joins those before it."""
    for count, sizes in ((8, [3, 3, 2]), (7, [3, 4]), (6, [3, 3]), (1, [1])):
        batches = numbered(count, 3)
        assert order(batches) == list(range(count)) and [len(y) for _, y in batches] == sizes
        assert len(batches) == len(sizes)


def test_pixels_and_labels_of_a_batch_belong_together():
    for x, y in numbered(20, 6, seed=3):
        assert x.dtype == torch.float32 and torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


def test_the_order_follows_from_seed_and_epoch_alone():
    def at(seed: int, epoch: int) -> list[int]:
        batches = numbered(50, 8, seed=seed)
        batches.set_epoch(epoch)
        torch.rand(seed + epoch + 1)  # whatever was drawn elsewhere
        return order(batches)

    assert at(1, 2) == at(1, 2)
    orders = [tuple(at(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6 and all(sorted(one) == list(range(50)) for one in orders)
    walked = numbered(50, 8, seed=1)
    for _ in range(3):
        order(walked)  # an earlier walk of the same object leaves no trace
    assert order(walked) == at(1, 0)


def test_the_largest_seed_has_an_order_for_every_epoch():
    batches, orders = numbered(50, 8, seed=2**63 - 1), set()
    for epoch in (0, 1, 100):
        batches.set_epoch(epoch)
        orders.add(tuple(order(batches)))
    assert len(orders) == 3


def test_the_last_batch_is_kept_or_dropped():
    assert len(numbered(10, 4, seed=0)) == 3
    dropping = numbered(10, 4, seed=0, drop_last=True)
    assert len(dropping) == 2 and [len(y) for _, y in dropping] == [4, 4]
    exact = numbered(8, 4, seed=0, drop_last=True)
    assert len(exact) == 2 and sorted(order(exact)) == list(range(8))


def test_a_set_smaller_than_a_batch_is_never_dropped():
    assert [len(y) for _, y in numbered(3, 4, seed=0, drop_last=True)] == [3]


def test_images_batches_have_three_parts():
    images = BadNet(pratio=0.5).poison_train(toy_images(20), 0)
    for x, y, truth in images.batches(8, seed=0, augment=Augment(), drop_last=True):
        assert x.shape == (8, 3, 16, 16) and 0 <= float(x.min()) and float(x.max()) <= 1
        assert y.shape == truth.shape == (8,) and (y[y != truth] == 0).all()


# Augmentation


def by_hand(x: torch.Tensor, padding: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """One picture at a time, with the draws of `Augment` in their order: all tops, all lefts, all mirrors."""
    b, c, h, w = x.shape
    top, left = torch.randint(2 * padding + 1, (2, b, 1), generator=generator)
    mirrored = torch.rand(b, 1, generator=generator) < 0.5 if flip else torch.zeros(b, 1, dtype=torch.bool)
    out = torch.zeros_like(x)
    for i in range(b):
        padded = torch.zeros(c, h + 2 * padding, w + 2 * padding, dtype=x.dtype)
        padded[:, padding : padding + h, padding : padding + w] = x[i]
        crop = padded[:, int(top[i]) : int(top[i]) + h, int(left[i]) : int(left[i]) + w]
        out[i] = crop.flip(2) if mirrored[i] else crop
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("padding", "shape"), [(4, (20, 3, 32, 32)), (2, (9, 1, 12, 7))])
def test_augment_is_the_loop_over_pictures(flip, padding, shape):
    for x in (torch.randint(256, shape, dtype=torch.uint8), torch.rand(shape)):
        ours = Augment(padding, flip)(x, torch.Generator().manual_seed(5))
        assert ours.dtype == x.dtype
        assert torch.equal(ours, by_hand(x, padding, flip, torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("flip", [False, True])
def test_batches_side_by_side_are_augmented_as_each_alone(flip):
    """The draws of one batch do not depend on which others are made ready with it."""
    x = torch.randint(256, (9, 3, 12, 12), dtype=torch.uint8)
    together = Augment(2, flip)(x, torch.Generator().manual_seed(5), [4, 4, 1])
    one_by_one = torch.Generator().manual_seed(5)
    assert torch.equal(together, torch.cat([by_hand(part, 2, flip, one_by_one) for part in x.split(4)]))
    alone = Augment(2, flip, one_draw=True)(x, torch.Generator().manual_seed(5), [4, 4, 1])
    one_by_one = torch.Generator().manual_seed(5)
    assert torch.equal(alone, torch.cat([Augment(2, flip, True)(part, one_by_one) for part in x.split(4)]))


@pytest.mark.parametrize(("count", "drop_last"), [(40, True), (40, False), (33, False), (5, True)])
def test_batches_are_made_ready_several_at_once(count, drop_last, monkeypatch):
    """The same ones, in fewer calls: what Python launches for each batch by itself is time of a card."""
    batches = toy_images(count).batches(8, seed=3, augment=Augment(2, flip=True), drop_last=drop_last)
    calls = list[int]()
    real = Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, x, *rest: (calls.append(len(x)), real(self, x, *rest))[1])
    at_once = [list(batch) for batch in batches]
    monkeypatch.setattr(images_module, "VALUES_AT_ONCE", 2 * 8 * 3 * 16 * 16)
    few, calls[:] = calls[:], []
    by_twos = [list(batch) for batch in batches]
    assert few == [sum(len(y) for _, y, _ in at_once)] and len(calls) == -(-len(batches) // 2)
    for ours, other in zip(at_once, by_twos, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


@pytest.mark.usefixtures("unchecked")
def test_an_augmentation_is_one_of_ours(one_line):
    with pytest.raises(ConfigError) as refusal:
        toy_images(8).batches(4, augment=lambda x, generator: x)
    assert "augment is a function, allowed is an Augment, or none" in one_line(refusal.value)


def test_a_batch_may_be_changed_in_place_and_the_others_do_not_notice():
    """By a network, or an attack's own step; and a graph of the one before is not broken by it."""
    scale = torch.ones(3, 1, 1, requires_grad=True)
    (first, *_), (second, *_), _ = toy_images(24).batches(8, seed=3)
    before = (first * scale).sum()
    second.mul_(scale)
    (before + second.sum()).backward()
    assert scale.grad is not None


def test_every_picture_has_its_own_crop_and_mirror():
    """200 copies of one picture: nearly all of the 81 crops appear, and about half of the pictures are mirrored."""
    one = torch.randint(1, 256, (1, 3, 32, 32), dtype=torch.uint8)
    many = one.expand(200, -1, -1, -1).contiguous()
    crops = Augment()(many, torch.Generator().manual_seed(0))
    assert len(crops.flatten(1).unique(dim=0)) > 60
    unmoved = Augment(padding=0, flip=True)(many, torch.Generator().manual_seed(0))
    mirrored = (unmoved == many.flip(3)).flatten(1).all(1)
    assert ((unmoved == many).flatten(1).all(1) ^ mirrored).all() and 70 < int(mirrored.sum()) < 130


def test_the_cropped_border_is_black_and_the_draws_uniform():
    white = torch.full((4000, 1, 9, 9), 255, dtype=torch.uint8)
    crops = Augment(padding=4)(white, torch.Generator().manual_seed(1))
    tops = (crops[:, 0, :, 4] == 0).sum(1)  # |top - 4| rows are black, seen in the one column that never is
    counts = torch.bincount(tops, minlength=5) / 4000
    # A shift of 0 has one way, every other distance two: 1/9 and 2/9, within four standard deviations (0.026).
    assert (counts - torch.tensor([1, 2, 2, 2, 2]) / 9).abs().max() < 0.027


def test_a_quarter_turn_by_hand(monkeypatch):
    """Of 6 x 10 pixels the middle 6 x 6 turn and zeros come in beside them; by what is drawn, either way or not."""
    draws = torch.tensor([1.0, 0.0, 0.5])
    monkeypatch.setattr(torch, "rand", lambda n: draws[:n].clone())
    x = torch.arange(3 * 3 * 60, dtype=torch.float64).view(3, 3, 6, 10)
    left = torch.nn.functional.pad(x.rot90(1, (2, 3))[:, :, 2:8], (2, 2))
    right = torch.nn.functional.pad(x.rot90(-1, (2, 3))[:, :, 2:8], (2, 2))
    found = turn(x, 90.0)
    for i, expected in enumerate((left, right, x)):
        torch.testing.assert_close(found[i], expected[i], atol=1e-3, rtol=0)
    torch.testing.assert_close(turn(x, 90.0, one_draw=True), left, atol=1e-3, rtol=0)


def test_the_augmentation_of_each_data_set():
    """Crop with padding 4; flip for CIFAR-10, and not for digits, which are not symmetric."""
    for name, origin in SOURCES.items():
        assert origin.augment == Augment(padding=4, flip=name == "cifar10")


def test_the_normalisation_of_each_data_set():
    """The benchmark's; own folders are normalised as CIFAR-10, and digits by their own mean and deviation."""
    train, _ = load("digits")
    grey = to_float(train.pixels)
    wanted = {
        "cifar10": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
        "gtsrb": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        "tiny": ((0.4802, 0.4481, 0.3975), (0.2302, 0.2265, 0.2262)),
        "folder": ((0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)),
        "digits": ((round(float(grey.mean()), 3),) * 3, (round(float(grey.std()), 3),) * 3),
    }
    assert {name: (origin.mean, origin.std) for name, origin in SOURCES.items()} == wanted


# The defender's pictures


def index_images(n: int) -> Images:
    """n pictures of one pixel."""
    return Images.clean(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), 10)


@pytest.mark.parametrize(
    ("n", "size", "first"),
    [
        (50_000, 2500, [25247, 49673, 27562, 2653, 16968]),
        (100_000, 5000, [50494, 99346, 55125, 5306, 33936]),
        (39_209, 1960, [25247, 27562, 2653, 16968, 33506]),
    ],
)
def test_the_clean_subset_is_the_published_list(n, size, first):
    """Seed 0 and 5 % give, in this order, the list that ships with the benchmark."""
    clean = clean_subset(index_images(n), 0.05, 0)
    assert clean.index[:5].tolist() == first
    assert len(clean) == size == len(set(clean.index.tolist()))


def test_another_seed_gives_other_pictures():
    assert (
        clean_subset(index_images(1000), 0.05, 1).index.tolist()
        != clean_subset(index_images(1000), 0.05, 0).index.tolist()
    )
    assert sorted(clean_subset(index_images(30), 1.0, 0).index.tolist()) == list(range(30))


def test_an_index_file_replaces_the_draw(tmp_path):
    file = tmp_path / "index.txt"
    file.write_text("7\n3\n\n11\n")
    assert clean_subset(index_images(20), 0.5, 0, str(file)).index.tolist() == [7, 3, 11]


@pytest.mark.parametrize("content", ["7\n20\n", "-1\n", "1.5\n", "two\n", "1e1\n"])
def test_an_index_file_with_something_else_is_refused(tmp_path, one_line, content):
    file = tmp_path / "index.txt"
    file.write_text(content)
    with pytest.raises(DataError) as refusal:
        clean_subset(index_images(20), 0.5, 0, str(file))
    assert "0..19" in one_line(refusal.value) and content.split()[-1] in str(refusal.value)


def test_an_index_that_is_there_twice_is_refused(tmp_path, one_line):
    (tmp_path / "index.txt").write_text("3\n7\n3\n")
    with pytest.raises(DataError) as refusal:
        clean_subset(index_images(20), 0.5, 0, str(tmp_path / "index.txt"))
    assert "holds 3 more than once" in one_line(refusal.value)


def test_an_index_file_of_a_smaller_data_set_is_noted(tmp_path):
    """By its largest index: of 100 draws from 1,000 none notes anything, and each from 100 of 1,000 does."""
    file = tmp_path / "index.txt"
    for seed in range(100):
        draw = random.Random(seed).sample
        file.write_text("\n".join(map(str, draw(range(1000), 50))))
        assert index_note(str(file), 1000) is None
        file.write_text("\n".join(map(str, draw(range(100), 50))))
        assert "but there are 1,000 images" in index_note(str(file), 1000)
    assert index_note(None, 1000) is None


def test_an_index_of_thousands_of_digits_is_refused(tmp_path, one_line):
    """Python reads no number of that length."""
    (tmp_path / "index.txt").write_text("1" * 5000)
    with pytest.raises(DataError) as refusal:
        clean_subset(index_images(20), 0.5, 0, str(tmp_path / "index.txt"))
    assert "allowed are whole numbers 0..19" in one_line(refusal.value)


def test_an_index_file_that_cannot_be_read_is_refused(tmp_path, one_line):
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "missing", tmp_path, binary):
        with pytest.raises(DataError) as refusal:
            clean_subset(index_images(20), 0.5, 0, str(file))
        assert str(file) in one_line(refusal.value)


def test_an_empty_clean_set_is_refused(tmp_path, one_line):
    with pytest.raises(DataError) as refusal:
        clean_subset(index_images(19), 0.05, 0)
    assert "empty" in one_line(refusal.value)
    (tmp_path / "index.txt").write_text("\n")
    with pytest.raises(DataError) as refusal:
        clean_subset(index_images(19), 0.05, 0, str(tmp_path / "index.txt"))
    assert "empty" in one_line(refusal.value) and "index.txt" in str(refusal.value)


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_clean_share_outside_0_to_1_is_refused(one_line, ratio):
    with pytest.raises(ConfigError) as refusal:
        clean_subset(index_images(100), ratio, 0)
    assert "ratio" in one_line(refusal.value)


# Data sets


def test_digits():
    """1,797 real images, every fifth one a test picture, 32x32x3, all classes in both parts."""
    train, test = load("digits")
    assert (len(train), len(test)) == (1437, 360) and train.num_classes == 10
    for images in (train, test):
        assert images.pixels.shape[1:] == (3, 32, 32) and images.pixels.dtype == torch.uint8
        assert images.labels.unique().tolist() == list(range(10)) and (images.role == 0).all()
        assert torch.equal(images.pixels[:, 0], images.pixels[:, 2])
    assert int(train.pixels.max()) == 255 and int(train.pixels.min()) == 0
    again, _ = load("digits")
    assert fingerprint(again) == fingerprint(train) != fingerprint(test)


def test_digits_are_scaled_by_16_and_truncated():
    """Every pixel of the enlargement is a mean of the 8x8 grey levels 0..16 with weights that are multiples of 1/64, so
    it is k/1024 of white; 255 k / 1024 is truncated (after the thousandth that `quantise` adds)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    train, _ = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    ours, _ = load("digits")
    assert ours.labels.tolist() == labels[train].tolist()
    small = torch.from_numpy(pixels[train][:20]).double().view(-1, 1, 8, 8) / 16
    large = torch.nn.functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    exact = (large * 255 + 1e-3).floor().long()
    assert torch.equal(ours.pixels[:20, :1].long(), exact)


def test_a_fingerprint_sees_pixels_labels_order_and_shape():
    images = toy_images(8)
    other = images.pixels.clone()
    other[3, 1, 2, 2] ^= 1
    variants = [
        images,
        Images.clean(other, images.labels, 4),
        Images.clean(images.pixels, images.labels.flip(0), 4),
        images[torch.arange(7, -1, -1)],
        Images.clean(images.pixels.view(8, 3, 8, 32), images.labels, 4),
    ]
    assert len({fingerprint(one) for one in variants}) == len(variants)


def test_an_unknown_data_set_lists_the_known_ones(one_line):
    with pytest.raises(ConfigError) as refusal:
        source("cifar11")
    assert "cifar11" in one_line(refusal.value) and all(name in str(refusal.value) for name in SOURCES)


def offline(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


def test_offline_without_cifar10_one_line_says_what_to_do(monkeypatch, tmp_path, one_line):
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", offline)
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path)
    assert all(word in one_line(refusal.value) for word in ("--dataset_path", "--dataset digits", str(tmp_path)))


def test_a_corrupt_download_is_one_line_too(monkeypatch, tmp_path, one_line):
    def corrupt(*args, **kwargs):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", corrupt)
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path)
    assert "--dataset_path" in one_line(refusal.value)


def test_missing_cifar10_is_downloaded_into_the_benchmarks_layout(monkeypatch, tmp_path):
    asked = {}

    def fetch(url, root, filename, md5):
        asked.update(url=url, root=root, md5=md5)
        raise OSError("enough")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", fetch)
    with pytest.raises(DataError):
        load("cifar10", tmp_path)
    assert asked["root"] == str(tmp_path / "cifar10") and asked["url"].endswith("cifar-10-python.tar.gz")
    assert asked["md5"] == "c58f30108f718f92721af3b95e74349a"


def test_a_download_goes_into_a_folder_that_is_there_or_the_default_one(monkeypatch, tmp_path, one_line):
    def offline(url, root, **more):
        Path(root).mkdir(parents=True)
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path / "mistyped")
    assert "mistyped" in one_line(refusal.value) and "--dataset_path" in str(refusal.value)
    for default in ("./data", tmp_path / "data"):
        with pytest.raises(DataError, match="no route to host"):
            load("cifar10", default)
    assert list(tmp_path.iterdir()) == []  # folders that were made for it are gone


NETWORK = {"name": "preactresnet18", "classes": 4, "width": 4, "shape": [3, 32, 32], "mean": [0.5], "std": [0.5]}
VICTIM = AttackResult(
    path=Path("a"), dataset="digits", dataset_path="./data", network=NETWORK, weights={}, triggered=None, poisoned=None,
    recipe=None, digest="", fingerprints=None, lengths=(None, None),
)  # fmt: skip


def test_a_record_is_not_read_by_a_download_to_where_it_says(monkeypatch, tmp_path, one_line):
    """A stranger's record may name any folder; the default one and what the user names are another matter."""
    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", offline)
    network = {**NETWORK, "classes": 10}
    found = replace(VICTIM, path=tmp_path, dataset="cifar10", dataset_path=str(tmp_path), network=network)
    with pytest.raises(DataError) as refusal:
        found.pictures()
    assert "give its --dataset_path" in one_line(refusal.value)
    with pytest.raises(DataError, match="download failed"):
        found.pictures(str(tmp_path))


def test_a_record_is_read_beside_the_pictures_that_its_attack_saw(monkeypatch, tmp_path, one_line):
    train, test = toy_images(20, size=32), toy_images(12, size=32)
    monkeypatch.setattr("sau.data.sources.load", lambda dataset, path, size: (train, test))
    found = replace(VICTIM, path=tmp_path)
    fewer = replace(found, lengths=(20, 8)).pictures()
    assert (len(fewer[0]), len(fewer[1])) == (20, 8) and "first 8 of 12 test pictures" in fewer[2][-1]
    last = [images[torch.tensor([len(images) - 1])] for images in (train, test)]
    beyond = [replace(images, index=images.index + 1) for images in last]
    assert replace(found, poisoned=last[0], triggered=last[1]).pictures()[:2] == (train, test)
    for wrong, words in (
        ({"lengths": (21, None)}, "the attack saw 21 training pictures"),
        ({"lengths": (None, 13)}, "the attack saw 13 test pictures"),
        ({"poisoned": beyond[0]}, "poisoned pictures are none of the 20"),
        ({"triggered": beyond[1]}, "in another order"),
        ({"triggered": last[1], "lengths": (None, 11)}, "in another order"),
    ):
        with pytest.raises(RecordError) as refusal:
            replace(found, **wrong).pictures()
        assert words in one_line(refusal.value)


def test_a_defense_is_given_poisons_where_it_needs_them_and_there_are_any(tmp_path, one_line):
    train = toy_images(8)
    poisoned = replace(train[torch.tensor([3])], labels=torch.tensor([1]))
    found = replace(VICTIM, path=tmp_path, poisoned=poisoned, settings={"pratio": 0.1})
    assert found.offers("poisoned") == "poisoned" and found.offers("clean") == "clean"
    assert found.given(train, "poisoned").labels[3] == 1 and found.given(train, "clean") is train
    clean = replace(found, poisoned=None, settings={"pratio": 0})
    assert clean.offers("poisoned") == "clean" and clean.given(train, "poisoned") is train
    for settings in ({"pratio": 0.1}, None):
        with pytest.raises(RecordError) as refusal:
            replace(clean, settings=settings).offers("poisoned")
        assert "no poisoned training pictures" in one_line(refusal.value)
        assert replace(clean, settings=settings).offers("clean") == "clean"


def fake_cifar(folder: Path) -> Path:
    """A folder with the names of CIFAR-10's files and other bytes in them."""
    base = folder / "cifar-10-batches-py"
    base.mkdir(parents=True)
    for name in ("test_batch", *(f"data_batch_{i}" for i in range(1, 6))):
        (base / name).write_bytes(b"not the official bytes")
    return base


def test_a_damaged_cifar_file_is_named(tmp_path, one_line):
    base = fake_cifar(tmp_path)
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path)
    assert str(base / "data_batch_1") in one_line(refusal.value) and "damaged" in str(refusal.value)


def test_a_missing_cifar_file_is_named(tmp_path, one_line):
    base = fake_cifar(tmp_path)
    (base / "data_batch_1").unlink()
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path)
    assert "data_batch_1" in one_line(refusal.value)


class Canary:
    """Unpickling it writes a file: what a malicious pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_malicious_batch_is_refused_and_not_executed(tmp_path, one_line):
    import hashlib

    canary, file = tmp_path / "canary", tmp_path / "data_batch_1"
    for payload in (Canary(canary), {"data": Canary(canary), "labels": [0]}, {"data": np.random.rand, "labels": [0]}):
        raw = pickle.dumps(payload)
        file.write_bytes(raw)
        md5 = hashlib.md5(raw).hexdigest()
        with pytest.raises(DataError) as refusal:  # even if someone had forged the sum
            cifar._cifar_batch(file, md5, "labels")
        assert str(file) in one_line(refusal.value) and not canary.exists()
        with pytest.raises(DataError):
            cifar._cifar_batch(file, "0" * 32, "labels")


def batch_of(code: bytes, ending: bytes = b"u.") -> bytes:
    """A pickle of a dictionary with `data` and what `code` makes as `labels`."""
    return b"\x80\x02}(" + b"U\x04data" + b"U\x06labels".join((b"K\x00", code)) + ending


NUMPY = b"cnumpy\ndtype\n(U\x02%bK\x00K\x01tR"
HEAVY = {
    "a number of bytes": (b"cnumpy\nndarray\n(J\x00\x00\x00\x70U\x02u1tR", "positional arguments"),
    "a type of texts": (NUMPY % b"S8", "an array of 'S8', allowed is u1"),
    "a type that claims more": (NUMPY % b"u1" + b"(K\x03U\x01|NNNJ\x00\x00\x00\x40K\x01K\x00tb", "not a plain one"),
    "doubled bytes": (b"c_codecs\nencode\n" * 2 + b"U\x01a" + b"U\x09hex_codec\x86R" * 2, "file does not hold"),
    "copied bytes": (
        b"c_codecs\nencode\nq\x000X\xe8\x03\0\0" + b"a" * 1000 + b"U\x06latin1\x86q\x010(" + b"h\x00h\x01R" * 9 + b"l",
        "file does not hold",
    ),
    "bytes to be filled": (b"\x96" + b"\xff" * 7 + b"\x00", "150"),
    "a type that is long to write": (
        b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"0cnumpy\ndtype\n(h\x00K\x00K\x01tR",
        "an array of a tuple, allowed is u1",
    ),
    "a key that takes hours": (
        b"K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"0}(h\x00K\x01h\x00K\x01u",
        "a key that is no text",
    ),
    "a set": (b"\x8f(K\x01\x90", "144"),
    "a frozen set": (b"(K\x01\x91", "145"),
    "a number for a key": (b"}K\x01K\x01s", "a key that is no text"),
    "a number for a key from the start": (b"(K\x01K\x01d", "a key that is no text"),
    "a state for a function": (b"c_codecs\nencode\n}U\x01aK\x01sb", "a state of what has none"),
    "no pictures": (b"U\x04abcd", "its pictures are no array of bytes"),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_batch_that_would_take_memory_is_refused(name, tmp_path, one_line):
    code, words = HEAVY[name]
    (tmp_path / "batch").write_bytes(batch_of(code))
    with pytest.raises(DataError) as refusal:
        cifar._cifar_batch(tmp_path / "batch", None, "labels")
    assert words in one_line(refusal.value)


def test_a_large_number_of_a_memo_costs_nothing(tmp_path):
    """In C the unpickler takes sixteen bytes for each number below it."""
    pixels = np.zeros((1, 3072), np.uint8)
    raw = pickle.dumps({"data": pixels, "labels": [3]}, protocol=2)
    (tmp_path / "batch").write_bytes(raw[:2] + b"K\x00r\xff\xff\xff\x7f0" + raw[2:])
    assert cifar._cifar_batch(tmp_path / "batch", None, "labels")[1] == [3]


def test_arrays_by_columns_and_by_python_2_and_labels_of_any_kind_are_read(tmp_path):
    """Python 2 wrote the content as a string, which comes as a text in latin1."""
    pixels = np.arange(2 * 3072).astype(np.uint8).reshape(2, 3072)
    kinds = [np.array([3, 7], kind) for kind in (np.int64, np.int32, np.uint8)]
    for wrong in ("ab", [3, "a"], {3: 7}, np.zeros((2, 1), np.uint8)):
        (tmp_path / "batch").write_bytes(pickle.dumps({"data": pixels, "labels": wrong}, protocol=4))
        with pytest.raises(DataError, match=r"no list of whole numbers|a key that is no text"):
            cifar._cifar_batch(tmp_path / "batch", None, "labels")
    others = [pickle.dumps({"data": pixels, "labels": labels}, protocol=4) for labels in (*kinds, (3, 7))]
    first = pickle.dumps({"data": pixels, "labels": [3, 7]}, protocol=0)
    by_columns = pickle.dumps({"data": np.asfortranarray(pixels), "labels": [3, 7]}, protocol=2)
    kind = NUMPY % b"u1" + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02M\x00\x0ct" + kind
    array += b"\x89T\x00\x18\0\0" + pixels.tobytes() + b"tb"
    by_two = b"\x80\x02}(U\x04data" + array + b"U\x06labels(K\x03K\x07lu."
    for raw in (by_columns, by_two, first, *others):
        (tmp_path / "batch").write_bytes(raw)
        read, labels = cifar._cifar_batch(tmp_path / "batch", None, "labels")
        assert labels == [3, 7] and np.array_equal(read.reshape(2, 3072), pixels)


@pytest.mark.parametrize("protocol", [2, 4])
def test_an_honest_batch_is_read(tmp_path, protocol):
    import hashlib

    pixels = np.arange(2 * 3072, dtype=np.uint8).reshape(2, 3072)
    raw = pickle.dumps({"data": pixels, "labels": [3, 7]}, protocol=protocol)
    (tmp_path / "batch").write_bytes(raw)
    read, labels = cifar._cifar_batch(tmp_path / "batch", hashlib.md5(raw).hexdigest(), "labels")
    assert labels == [3, 7] and np.array_equal(read, pixels.reshape(2, 3, 32, 32))


def test_cifar10_is_the_official_one_in_every_layout(real_data, tmp_path):
    """The sums are those of torchvision's decoded arrays, [N, 32, 32, 3]. Three layouts, one of them read."""
    import hashlib

    base = real_data / "cifar-10-batches-py"
    benchmark, torchvisions = tmp_path / "benchmark", tmp_path / "torchvision"
    (benchmark / "cifar10").mkdir(parents=True)
    torchvisions.mkdir()
    (benchmark / "cifar10" / base.name).symlink_to(base)
    (torchvisions / base.name).symlink_to(base)
    for root in (benchmark, torchvisions, base):
        found = cifar._find(root, "cifar10")
        assert found is not None and found.resolve() == base
    train, test = load("cifar10", benchmark)
    for images, n, md5 in (
        (train, 50_000, "17e2cb5a4119d89a4a13e02b91701bff"),
        (test, 10_000, "6d2714505047e13831cd876923568712"),
    ):
        channels_last = images.pixels.permute(0, 2, 3, 1).contiguous().numpy()
        assert len(images) == n and hashlib.md5(channels_last).hexdigest() == md5
        assert (torch.bincount(images.labels) == n // 10).all()


def test_one_flipped_bit_of_cifar10_is_found(real_data, tmp_path, one_line):
    base = real_data / "cifar-10-batches-py"
    copy = tmp_path / base.name
    copy.mkdir()
    for file in base.glob("*_batch*"):
        (copy / file.name).symlink_to(file)
    (copy / "data_batch_2").unlink()
    shutil.copy(base / "data_batch_2", copy / "data_batch_2")
    (copy / "data_batch_2").chmod(0o644)
    with (copy / "data_batch_2").open("r+b") as file:
        file.seek(10_000_000)
        byte = file.read(1)[0]
        file.seek(10_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError) as refusal:
        load("cifar10", tmp_path)
    assert "data_batch_2" in one_line(refusal.value)


# Pictures that a user names


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int) -> bytes:
    """A PNG of a hundred bytes whose header promises width x height pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def write_refused(folder: Path) -> dict[str, Path]:
    """One file for each reason to refuse."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    files = {name: folder / name for name in ("truncated.png", "truncated.jpg", "animated.png", "animated.gif")}
    rgb.save(folder / "whole.png")
    rgb.save(folder / "whole.jpg")
    for kind in ("png", "jpg"):
        whole = (folder / f"whole.{kind}").read_bytes()
        files[f"truncated.{kind}"].write_bytes(whole[: len(whole) // 2])
    frames = [rgb, rgb.rotate(90)]
    for kind in ("png", "gif"):
        frames[0].save(files[f"animated.{kind}"], save_all=True, append_images=frames[1:])
    for mode in ("RGBA", "LA", "CMYK", "I;16", "F"):
        suffix = {"CMYK": "jpg", "F": "tiff"}.get(mode, "png")
        files[mode] = folder / f"{mode.replace(';', '')}.{suffix}"
        Image.new(mode, (8, 8)).save(files[mode])
    files["transparent"] = folder / "transparent.png"
    Image.new("P", (8, 8)).save(files["transparent"], transparency=0)
    files["text"] = folder / "text.png"
    files["text"].write_text("I am a picture")
    files["empty"] = folder / "empty.png"
    files["empty"].write_bytes(b"")
    files["large header"] = folder / "large.png"
    files["large header"].write_bytes(png_header(9000, 9000))
    files["larger header"] = folder / "larger.png"
    files["larger header"].write_bytes(png_header(12_000, 12_000))
    files["huge header"] = folder / "huge.png"
    files["huge header"].write_bytes(png_header(60_000, 60_000))
    files["folder"] = folder
    files["missing"] = folder / "missing.png"
    return files


REASONS = (
    "truncated.png truncated.jpg animated.png animated.gif RGBA LA CMYK I;16 F transparent text empty folder missing"
).split() + ["large header", "larger header", "huge header"]


@pytest.mark.parametrize("reason", REASONS)
def test_a_picture_is_refused_with_its_name(tmp_path, one_line, reason):
    file = write_refused(tmp_path)[reason]
    with pytest.raises(DataError) as refusal:
        read_picture(file)
    assert str(file) in one_line(refusal.value)


def test_a_name_with_a_null_byte_is_refused(one_line):
    with pytest.raises(DataError) as refusal:
        read_picture("a\0b.png")
    one_line(refusal.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
@pytest.mark.parametrize("kind", ["png", "bmp"])
def test_eight_bit_pictures_become_rgb(tmp_path, mode, kind):
    file = tmp_path / f"picture.{kind}"
    Image.new("RGB", (6, 5), (255, 255, 255)).convert(mode).save(file)
    picture = read_picture(file)
    assert picture.mode == "RGB" and picture.size == (6, 5) and picture.getpixel((3, 3)) == (255, 255, 255)


def test_fit_squeezes_to_height_and_width_without_keeping_the_aspect():
    picture = Image.new("RGB", (10, 20), (200, 100, 50))
    squeezed = fit(picture, 4, 6)
    assert squeezed.shape == (3, 4, 6) and squeezed.dtype == torch.float32
    assert squeezed[:, 2, 2].tolist() == [200, 100, 50]


def test_fit_keeps_rows_rows():
    picture = Image.fromarray(np.array([[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]], dtype=np.uint8))
    assert torch.equal(fit(picture, 2, 2), torch.arange(12.0).view(2, 2, 3).permute(2, 0, 1))
