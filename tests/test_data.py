"""Images, batches, augmentation, the clean subset, and the data sets by name."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from toys import refuses, toy_images

from sau.attack.in_batch import random_rotate
from sau.data import readers
from sau.data.batches import Augment, Batches, clean_batches, quantise, stack_batches, to_float, unaugmented
from sau.data.images import Images
from sau.data.sources import SOURCES, clean_subset, fingerprint, load, source
from sau.errors import ConfigError, DataError, RecordError
from sau.record.attack_result import AttackResult

# Images and quantise


PIXELS, LABELS = toy_images(8).pixels, toy_images(8).labels


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("pixels", "labels", "word"), [
    (PIXELS / 255, LABELS, "torch.float32"),
    (PIXELS.permute(0, 2, 3, 1), LABELS, "8, 16, 16, 3"),
    (PIXELS, torch.eye(4)[LABELS], "8, 4"),
    (PIXELS, LABELS.float(), "torch.float32"),
    (PIXELS, LABELS + 1, "0..3"),
    (PIXELS, LABELS - 1, "0..3"),
])  # fmt: skip
def test_images_and_labels_of_another_kind_are_refused(pixels, labels, word):
    with pytest.raises(DataError, match=word):
        Images.clean(pixels, labels, 4)


def test_picking_keeps_what_belongs_together():
    images = toy_images(12)
    picked = images[torch.tensor([7, 2])]
    assert len(picked) == 2 and picked.num_classes == 4
    assert picked.index.tolist() == [7, 2] and picked.labels.tolist() == [3, 2]
    assert torch.equal(picked.pixels, images.pixels[[7, 2]])
    assert set(images.tensors()) == {"pixels", "labels", "true_labels", "role", "index"}
    assert torch.equal(images.to(torch.device("cpu")).pixels, images.pixels)


def test_grey_levels_survive_the_way_to_float_and_back_and_others_are_truncated():
    """3.99 grey levels are 3, not 4; 0.9 are 0; below 0 and above 255 are cut."""
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = to_float(levels)
    assert x.dtype == torch.float32 and float(x.max()) == 1 and float(x.min()) == 0
    assert torch.equal(quantise(x), levels) and torch.equal(quantise(levels.double() / 255), levels)
    x = torch.tensor([3.99, 0.9, -3.0, 300.0, 254.9, 255.0]).view(1, 1, 2, 3) / 255
    assert quantise(x).flatten().tolist() == [3, 0, 0, 255, 254, 255]


WRONG_TENSORS = {
    "one is missing": lambda kept: kept.pop("role"),
    "floats": lambda kept: kept.update(pixels=kept["pixels"].float()),
    "images in a row": lambda kept: kept.update(pixels=kept["pixels"].flatten(1)),
    "fewer labels": lambda kept: kept.update(labels=kept["labels"][1:]),
    "none": lambda kept: kept.update({name: tensor[:0] for name, tensor in kept.items()}),
    "a place below 0": lambda kept: kept.update(index=kept["index"] - 1),
    "a label below 0": lambda kept: kept.update(labels=kept["labels"] - 1),
    "a true label that is no class": lambda kept: kept.update(true_labels=kept["true_labels"] + 1),
}


@pytest.mark.parametrize("wrong", WRONG_TENSORS)
@pytest.mark.usefixtures("unchecked")
def test_stored_images_that_are_wrong_are_refused(wrong):
    kept = toy_images(8).tensors()
    assert torch.equal(Images.restore(kept, 4).pixels, kept["pixels"])
    WRONG_TENSORS[wrong](kept)
    with pytest.raises(DataError, match="^stored "):
        Images.restore(kept, 4)


def numbered(n: int, size: int, **how) -> Batches:
    """Batches over n images whose pixel value and label are their number."""
    numbers = torch.arange(n)
    pixels = numbers.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, 4, 4).contiguous()
    return Batches(pixels, (numbers,), size, **how)


def order(batches: Batches) -> list[int]:
    return [int(i) for _, labels in batches for i in labels]


@pytest.mark.parametrize(("count", "size", "how", "sizes"), [
    (8, 3, {}, [3, 3, 2]),
    (7, 3, {}, [3, 4]),  # the last one, which batch norm could not be trained with, joins those before it
    (1, 3, {}, [1]),
    (10, 4, {"seed": 0}, [4, 4, 2]),
    (72, 32, {"seed": 0}, [32, 40]),  # 8 images are too few for batch norm, as one is
    (74, 32, {"seed": 0}, [32, 32, 10]),
    (22, 8, {"seed": 0}, [8, 8, 6]),
    (19, 8, {"seed": 0}, [8, 11]),
    (10, 4, {"seed": 0, "drop_last": True}, [4, 4]),
    (3, 4, {"seed": 0, "drop_last": True}, [3]),  # never all of them
    (8, 4, {"seed": 0, "drop_last": True}, [4, 4]),
])  # fmt: skip
def test_sizes_of_batches_and_pixels_beside_their_labels(count, size, how, sizes):
    batches = numbered(count, size, **how)
    assert [len(y) for _, y in batches] == sizes and len(batches) == len(sizes)
    assert how or order(batches) == list(range(count))
    for x, y in batches:
        assert x.dtype == torch.float32 and torch.equal((x[:, 0, 0, 0] * 255).round().long(), y)


@pytest.mark.parametrize(("count", "size", "sizes"), [
    (72, 32, [32, 40]), (74, 32, [32, 32, 10]), (7, 3, [3, 4]), (3, 1, [3]), (70, 1, [32, 38]), (3, 32, [3])
])  # fmt: skip
def test_what_a_loader_leaves_over_joins_its_last_batch(count, size, sizes):
    numbers = torch.arange(count)
    pixels = (numbers / 255).view(count, 1, 1, 1).expand(count, 3, 4, 4)
    loader = DataLoader(TensorDataset(pixels, numbers), batch_size=size)
    batches = clean_batches(loader, 256, torch.device("cpu"), (None, None), 0)
    assert len(batches) == len(sizes)
    seen = [y for _, y in unaugmented(batches)]
    assert [len(y) for y in seen] == sizes and torch.cat(seen).tolist() == numbers.tolist()
    assert all(torch.equal((x[:, 0, 0, 0] * 255).round().long(), y) for x, y in batches)


def test_other_loaders_keep_their_batches():
    pixels = torch.zeros(68, 3, 4, 4)
    dataset = TensorDataset(pixels, torch.arange(68))
    own = [dataset[:4], dataset[4:36], dataset[36:]]
    single = DataLoader(own, collate_fn=lambda rows: rows[0])
    for loader in (own, single, DataLoader(dataset, batch_sampler=[range(4), range(4, 36), range(36, 68)])):
        batches = clean_batches(loader, 256, torch.device("cpu"), (None, None), 0)
        assert [len(y) for _, y in batches] == [4, 32, 32] and len(batches) == 3
    same = torch.zeros(2).long()  # a loader may fill the same memory again
    each = {"__len__": lambda self: 2, "__iter__": lambda self: ((pixels[:2], same.fill_(i)) for i in range(2))}
    refilled = clean_batches(type("Refilled", (), each)(), 256, torch.device("cpu"), (None, None), 0)
    assert stack_batches(refilled)[1].tolist() == [0, 0, 1, 1]


def test_the_order_follows_from_seed_and_epoch_alone():
    def at(seed: int, epoch: int) -> list[int]:
        batches = numbered(50, 8, seed=seed)
        batches.epoch = epoch
        torch.rand(seed + epoch + 1)  # whatever was drawn elsewhere
        return order(batches)

    assert at(1, 2) == at(1, 2)
    orders = [tuple(at(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 6 and all(sorted(one) == list(range(50)) for one in orders)
    walked = numbered(50, 8, seed=1)
    for _ in range(3):
        order(walked)  # an earlier walk of the same object leaves no trace
    assert order(walked) == at(1, 0)


def by_hand(x: torch.Tensor, padding: int, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """One image at a time, with the draws of `Augment` in their order: all tops, all lefts, all mirrors."""
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
def test_augment_is_the_loop_over_images(flip, padding, shape):
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


def test_a_batch_may_be_changed_in_place_and_the_others_do_not_notice():
    """By a network, or an attack's own step; and a graph of the one before is not broken by it."""
    scale = torch.ones(3, 1, 1, requires_grad=True)
    (first, *_), (second, *_), _ = toy_images(24).batches(8, seed=3)
    before = (first * scale).sum()
    second.mul_(scale)
    (before + second.sum()).backward()
    assert scale.grad is not None


def test_a_quarter_turn_by_hand(monkeypatch):
    """Of 6 x 10 pixels the middle 6 x 6 turn and zeros come in beside them; by what is drawn, either way or not."""
    draws = torch.tensor([1.0, 0.0, 0.5])
    monkeypatch.setattr(torch, "rand", lambda n: draws[:n].clone())
    x = torch.arange(3 * 3 * 60, dtype=torch.float64).view(3, 3, 6, 10)
    left = torch.nn.functional.pad(x.rot90(1, (2, 3))[:, :, 2:8], (2, 2))
    right = torch.nn.functional.pad(x.rot90(-1, (2, 3))[:, :, 2:8], (2, 2))
    found = random_rotate(x, 90.0)
    for i, expected in enumerate((left, right, x)):
        torch.testing.assert_close(found[i], expected[i], atol=1e-3, rtol=0)
    torch.testing.assert_close(random_rotate(x, 90.0, one_draw=True), left, atol=1e-3, rtol=0)


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


def index_images(n: int) -> Images:
    """n images of one pixel."""
    return Images.clean(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), torch.zeros(n, dtype=torch.long), 10)


@pytest.mark.parametrize(("n", "size", "first"), [
    (50_000, 2500, [25247, 49673, 27562, 2653, 16968]),
    (100_000, 5000, [50494, 99346, 55125, 5306, 33936]),
    (39_209, 1960, [25247, 27562, 2653, 16968, 33506]),
])  # fmt: skip
def test_the_clean_subset_is_the_published_list(n, size, first):
    """Seed 0 and 5 % give, in this order, the list that ships with the benchmark."""
    clean = clean_subset(index_images(n), 0.05, 0)
    assert clean.index[:5].tolist() == first and len(clean) == size == len(set(clean.index.tolist()))


@pytest.mark.parametrize("content", ["7\n20\n", "-1\n", "1.5\n", "x\n", "1" * 5000, "3\n7\n3\n", "\n", b"\xff\xfe\x00"])
def test_a_wrong_index_file_is_refused_and_named(tmp_path, content):
    file = tmp_path / "index.txt"
    file.write_text("7\n3\n\n11\n")
    assert clean_subset(index_images(20), 0.5, 0, str(file)).index.tolist() == [7, 3, 11]
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match="index.txt"):
        clean_subset(index_images(20), 0.5, 0, str(file))


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, float("nan")])
def test_a_clean_share_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ConfigError, match="ratio"):
        clean_subset(index_images(100), ratio, 0)
    with pytest.raises(DataError, match="--ratio"):
        clean_subset(index_images(19), 0.05, 0)  # less than one image


def test_digits_are_scaled_by_16_and_truncated():
    """Every pixel of the enlargement is a mean of the 8x8 grey levels 0..16 with weights that are multiples of 1/16, so
    it is k/256 of white; 255 k / 256 is truncated (after the thousandth that `quantise` adds)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    assert str(load("digits")[1]) == "Images(360 of 3x16x16, 10 classes, 0 poisoned)"
    for images, part in zip(load("digits"), parts, strict=True):
        assert images.labels.tolist() == labels[part].tolist() and images.num_classes == 10
        assert images.pixels.dtype == torch.uint8 and (images.role == 0).all()
        small = torch.from_numpy(pixels[part][:20]).double().view(-1, 1, 8, 8) / 16
        large = torch.nn.functional.interpolate(small, size=(16, 16), mode="bilinear", align_corners=False)
        exact = (large * 255 + 1e-3).floor().long()
        assert torch.equal(images.pixels[:20].long(), exact.expand(-1, 3, -1, -1))


def test_a_fingerprint_sees_pixels_labels_order_and_shape():
    images = toy_images(8)
    other = images.pixels.clone()
    other[3, 1, 2, 2] ^= 1
    pixels, labels = images.pixels, images.labels
    variants = [images, Images.clean(other, labels, 4), Images.clean(pixels, labels.flip(0), 4)]
    variants += [images[torch.arange(7, -1, -1)], Images.clean(pixels.view(8, 3, 8, 32), labels, 4)]
    assert len({fingerprint(one) for one in variants}) == len(variants)


def test_a_data_set_or_size_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="'cifar11'.*gtsrb"):
        source("cifar11")
    for name, size, allowed in (("folder", 7, "8 to 1024"), ("folder", 1025, "8 to 1024"), ("digits", 32, "16")):
        with pytest.raises(ConfigError, match=f"img_size is {size}.*{allowed}"):
            load(name, img_size=size)


NETWORK = {"name": "preactresnet18", "classes": 4, "width": 4, "shape": [3, 32, 32], "mean": [0.5], "std": [0.5]}
VICTIM = AttackResult(
    path=Path("a"), dataset="digits", dataset_path="./data", network=NETWORK, weights={}, triggered=None, poisoned=None,
    recipe=None, digest="", fingerprints=None, lengths=(None, None),
)  # fmt: skip


def test_a_record_is_read_beside_the_images_that_its_attack_saw(monkeypatch, tmp_path):
    train, test = toy_images(20, size=32), toy_images(12, size=32)
    monkeypatch.setattr("sau.data.sources.load", lambda dataset, path, size: (train, test))
    found = replace(VICTIM, path=tmp_path)
    fewer = replace(found, lengths=(20, 8)).images()
    assert (len(fewer[0]), len(fewer[1])) == (20, 8) and "first 8 of 12 test images" in fewer[2][-1]
    last = [images[torch.tensor([len(images) - 1])] for images in (train, test)]
    beyond = [replace(images, index=images.index + 1) for images in last]
    assert replace(found, poisoned=last[0], triggered=last[1]).images()[:2] == (train, test)
    moved = replace(last[1], true_labels=last[1].true_labels + 1)
    for wrong in ({"lengths": (21, None)}, {"lengths": (None, 13)}, {"poisoned": beyond[0]}, {"triggered": beyond[1]},
                  {"triggered": moved}):  # fmt: skip
        with pytest.raises(RecordError, match="other digits images"):
            replace(found, **wrong).images()


def test_a_record_is_not_read_by_a_download_to_where_it_says(monkeypatch, tmp_path):
    """A stranger's record may name any folder; what the user names is another matter."""
    monkeypatch.setattr(readers, "_download", lambda root, official: (_ for _ in ()).throw(DataError("downloading")))
    found = replace(VICTIM, path=tmp_path, dataset="cifar10", dataset_path=str(tmp_path))
    with pytest.raises(DataError, match="give its --dataset_path"):
        found.images()
    with pytest.raises(DataError, match="downloading"):
        replace(found).images(str(tmp_path))


def test_a_defense_is_given_poisons_where_it_needs_them_and_there_are_any(tmp_path):
    train = toy_images(8)
    poisoned = replace(train[torch.tensor([3])], labels=torch.tensor([1]))
    found = replace(VICTIM, path=tmp_path, poisoned=poisoned, settings={"pratio": 0.1})
    images, kind = found.training_images(train, "poisoned")
    assert images.labels[3] == 1 and kind == "poisoned" and found.training_images(train, "clean") == (train, "clean")
    clean = replace(found, poisoned=None, settings={"pratio": 0})
    assert clean.training_images(train, "poisoned") == (train, "clean")
    for settings in ({"pratio": 0.1}, None):
        with refuses(RecordError, "no poisoned training images"):
            replace(clean, settings=settings).training_images(train, "poisoned")
        assert replace(clean, settings=settings).training_images(train, "clean") == (train, "clean")
