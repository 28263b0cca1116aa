"""Folders of timm and transformers: opened as their libraries use them, and back in the layout that they came in."""

import json
import shutil
import socket
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from toys import QUICK, toy_images

from sau.compat import pretrained
from sau.data.images import to_float
from sau.models import Normalized, unwrapped

timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()  # as the command does it, before the first import
transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
CLASSES = ["cat", "dog", "ant"]  # not in order
KINDS = ["timm_resnet", "timm_vit", "resnet", "vit"]
FAST = ("--epochs", "1", "--risk_steps", "2", "--risk_samples", "8", *QUICK)


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder of each of `KINDS`, for images of 32 pixels or 16, with a pickle that nobody may open."""
    root, labels = tmp_path_factory.mktemp("networks"), {2: "ant", 0: "cat", 1: "dog"}
    torch.manual_seed(0)
    for name, how in (("test_resnet", {}), ("test_vit", {"img_size": 32})):
        net = timm.create_model(name, num_classes=3, **how)
        place = root / name.replace("test", "timm")
        said = {"label_names": CLASSES, "pretrained_cfg": {"input_size": (3, 32, 32), "crop_pct": 0.8}}
        timm.models.save_for_hf(net, place, model_config=said, safe_serialization=True)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
    vit = transformers.ViTConfig(hidden_size=32, image_size=16, id2label=labels, **small)
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=labels)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(root / "vit")
    transformers.ResNetForImageClassification(resnet).save_pretrained(root / "resnet")
    transformers.ConvNextImageProcessor(size={"shortest_edge": 16}).save_pretrained(root / "resnet")
    for name in KINDS:
        (root / name / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return root


@pytest.fixture
def clean(tmp_path) -> Path:
    """Six images a class, higher than wide, in folders named after the classes."""
    images = toy_images(18, classes=3)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
        (tmp_path / "clean" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((33, 47))
        image.save(tmp_path / "clean" / CLASSES[label] / f"{i}.png")
    return tmp_path / "clean"


def flags(place: Path, clean: Path, *more: str) -> tuple[str, ...]:
    return ("defense", "ft", "--model_file", str(place), "--clean_dir", str(clean), *FAST, *more)


def edited(file: Path, **keys) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def answer_of_library(place: Path, image: Image.Image) -> torch.Tensor:
    """What a user of the library gets of an image."""
    if "timm" in place.name:
        net = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
        return net(timm.data.create_transform(**timm.data.resolve_model_data_config(net))(image)[None])
    net = transformers.AutoModelForImageClassification.from_pretrained(place).eval()
    return net(**transformers.AutoImageProcessor.from_pretrained(place)(image, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_as_its_library_opens_it(kind, networks, clean, tmp_path, here, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # nothing is downloaded
    saved, seen = pretrained.saved, []
    monkeypatch.setattr(pretrained, "saved", lambda net: seen.append(net) or saved(net))
    status, out, err = here(*flags(networks / kind, clean))
    assert status == 0, err
    assert "classes: 0 = cat, 1 = dog, 2 = ant (names in the file)" in out.splitlines()
    assert "from the folder: mean" in out and f"purified folder: record/{kind}_ft" in out
    before, after = (place / "model.safetensors" for place in (networks / kind, tmp_path / "record" / f"{kind}_ft"))
    assert {*map(lambda file: file.name, before.parent.glob("*.json"))} <= {
        file.name for file in after.parent.iterdir()
    }
    old, new = map(safetensors.torch.load_file, (before, after))
    assert old.keys() == new.keys() and not all(torch.equal(old[name], value) for name, value in new.items())
    image = Image.open(next(clean.rglob("*.png")))
    came = pretrained.open_folder(after.parent)
    x = to_float(came.view.apply(image).to(torch.uint8)[None])
    wanted = answer_of_library(after.parent, image)
    for net in (seen[0], came.net):
        torch.testing.assert_close(Normalized(net.eval(), came.said["mean"], came.said["std"])(x), wanted)


def test_class_folders_are_never_numbered_by_their_order(networks, clean, tmp_path, here, refused):
    (clean / "ant").rename(clean / "zebra")
    said = refused(*flags(networks / "vit", clean))
    assert "the folder 'zebra' names no class" in said and "0 = cat, 1 = dog, 2 = ant" in said
    place = Path(shutil.copytree(networks / "timm_vit", tmp_path / "unnamed"))
    edited(place / "config.json", label_names=None)
    assert (
        "classes: 0 = cat, 1 = dog, 2 = zebra (folders in order)" in here(*flags(place, clean))[1]
    )  # nobody names them
    for number, name in enumerate(("cat", "dog", "zebra")):
        (clean / name).rename(clean / str(number))
    shutil.rmtree(clean / "0")
    status, out, err = here(*flags(networks / "vit", clean))
    assert status == 0, err
    assert "classes: 0 = cat, 1 = dog, 2 = ant (folders by number)" in out.splitlines()


def test_flags_agree_with_the_folder_or_are_refused(networks, clean, here, refused):
    given = flags(networks / "vit", clean, "--mean", "0.5,0.5,0.5", "--std", "0.5,0.5,0.5")
    assert "std is (0.5, 0.5, 0.4), but" in refused(*given[:-1], "0.5,0.5,0.4")
    assert "input_size is 32, but" in refused(*given, "--input_size", "32")
    assert "arch is resnet18, but" in refused(*given, "--arch", "resnet18")
    assert "npd adds a layer" in refused("defense", "npd", *given[2:6])
    status, out, err = here(*given, "--input_size", "16", "--trust_code", "true")
    assert status == 0 and "flags without effect here: --trust_code" in out, err


@pytest.mark.parametrize(("kind", "file", "keys", "said"), [
    ("timm_vit", "config.json", {"architecture": "unknown"}, "Unknown model (unknown)"),
    ("timm_vit", "config.json", {"model_args": {"pretrained": True}}, "multiple values for keyword argument"),
    ("timm_vit", "config.json", {"label_names": ["cat"]}, "names 1 classes, but its network has 3"),
    ("timm_resnet", "config.json", {"model_args": {"num_classes": 4}}, "fc.weight has (3, "),
    ("vit", "config.json", {"architectures": ["ViTModel"]}, "says ViTModel, allowed is a network ...ForImage"),
    ("vit", "config.json", {"num_hidden_layers": 3}, "differ in 16 weights"),
    ("vit", "config.json", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "contains custom code"),
    ("vit", "preprocessor_config.json", {"rescale_factor": 0.1}, "does more than resize, crop, scale"),
    ("vit", "preprocessor_config.json", {"size": {"height": 16, "width": 20}}, "wants images of 16x20"),
])  # fmt: skip
def test_what_is_refused_in_one_line(kind, file, keys, said, networks, clean, tmp_path, refused):
    place = Path(shutil.copytree(networks / kind, tmp_path / "net"))
    edited(place / file, **keys)
    assert said in refused(*flags(place, clean))


def test_a_name_of_timm_with_a_weights_file(networks, clean, tmp_path, here, refused, monkeypatch):
    torch.save(unwrapped("timm:test_resnet", 3).state_dict(), tmp_path / "net.pt")
    named = partial(flags, tmp_path / "net.pt", clean, "--arch")
    status, out, err = here(*named("timm:test_resnet"))
    assert status == 0 and "timm:test_resnet from" in out, err
    assert "timm has no network" in refused(*named("timm:hf-hub:some/one")).replace(timm.__version__ + " ", "")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    assert "the network needs timm; pip install -e '.[models]'" in refused(*named("timm:test_resnet"))
