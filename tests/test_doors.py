"""Other people's folders, data sets and networks through the command line."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from toys import QUICK

from sau.models import build, has_width

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}

# name, side of the images, classes, entries of the state dict and last of them, enlarged or not
NETWORKS = [
    ("resnet18", 32, 7, 122, "fc.bias", False),
    ("mobilenet_v3_large", 32, 10, 312, "classifier.3.bias", False),
    ("googlenet", 32, 10, 344, "fc.bias", False),
    ("alexnet", 32, 10, 16, "1.classifier.6.bias", True),
    ("vit_b_32", 32, 10, 152, "1.heads.head.bias", True),
]


@pytest.mark.parametrize(("name", "side", "classes", "entries", "last", "enlarged"), NETWORKS)
def test_torchvisions_classifiers_fit_the_data(name, side, classes, entries, last, enlarged):
    model = build(name, classes, shape=(3, side, side), **PLAIN).eval()
    keys = list(model.net.state_dict())
    assert (len(keys), keys[-1]) == (entries, last)
    assert model(torch.rand(2, 3, side, side)).shape == (2, classes)
    assert isinstance(next(iter(model.net.children())), nn.Upsample) is enlarged and not has_width(name)


@pytest.mark.usefixtures("few_digits")
def test_a_resnet_is_attacked_and_defended(here):
    small = ("--dataset", "digits", "--model", "resnet18", "--epochs", "1", *QUICK)
    assert here("attack", "badnet", *small, "--save_folder_name", "a")[0] == 0
    assert here("defense", "ft", "--result_file", "a", "--epochs", "1", *QUICK)[0] == 0
    assert "width" in here("attack", "badnet", *small, "--width", "8")[2]


def own_images(root: Path) -> None:
    for split, count in (("train", 12), ("test", 4)):
        for number, colour in enumerate(("red", "green", "blue")):
            folder = root / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                shade = 20 * i + (10 if split == "test" else 0)  # no test image is a training image
                Image.new("RGB", (20 + i, 24), (90 * number, shade, 90)).save(folder / f"{i}.png")


def test_own_images_of_any_size(here, tmp_path, monkeypatch):
    monkeypatch.setenv("SAU_CACHE", str(tmp_path / "cache"))
    own_images(tmp_path / "mine")
    flags = ("--dataset", "folder", "--dataset_path", str(tmp_path / "mine"), "--img_size", "24", "--width", "4")
    status, out, err = here("attack", "badnet", *flags, "--epochs", "1", "--save_folder_name", "a", *QUICK)
    assert status == 0, err
    status, out, err = here("defense", "ft", "--result_file", "a", "--epochs", "1", "--ratio", "0.5", *QUICK)
    assert status == 0, err
    summary = json.loads((tmp_path / "record/a/summary.json").read_text())
    assert summary["acc_count"][1] == 12 and summary["asr_count"][1] == 8


def test_subsets_are_said_and_recorded(here, real_data, tmp_path, monkeypatch):
    monkeypatch.setenv("SAU_CACHE", str(tmp_path / "cache"))
    flags = ("--dataset_path", str(real_data), "--width", "4", "--epochs", "0", *QUICK)
    for name in ("cifar100", "gtsrb", "tiny"):
        status, out, err = here("attack", "badnet", "--dataset", name, "--save_folder_name", name, *flags)
        assert status == 0 and f"note: subset of {name}" in out, err
        (note,) = yaml.safe_load((tmp_path / "record" / name / "config.yaml").read_text())["notes"]
        assert note.endswith(f"no figure from it speaks for {name}")


@pytest.fixture
def theirs(real_data: Path, tmp_path: Path) -> Path:
    """The folder that BackdoorBench wrote, below ./record."""
    packed = real_data.parent / "fixtures" / "backdoorbench_badnet.tar.xz"
    if not packed.is_file():
        pytest.skip(f"no {packed}")
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "record", filter="data")
    return tmp_path / "record" / "backdoorbench_badnet"


def test_a_folder_of_backdoorbench_is_defended_like_ours(here, theirs, real_data, tmp_path, monkeypatch):
    """ACC 45 of 200, ASR 77 of 180, R-ACC 30 of 180 before (expected.json)."""
    monkeypatch.setenv("SAU_CACHE", str(tmp_path / "cache"))
    flags = ("--dataset_path", str(real_data), "--epochs", "1", *QUICK)
    status, out, err = here("defense", "ft", "--result_file", f"./record/{theirs.name}", *flags)
    assert status == 0 and "first 600 of 50000 training images" in out, err
    before = json.loads((theirs / "defense" / "ft" / "summary.json").read_text())["before"]
    assert [before[f"{figure}_count"] for figure in ("acc", "asr", "racc")] == [[45, 200], [77, 180], [30, 180]]
