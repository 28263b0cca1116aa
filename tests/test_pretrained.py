"""Folders of timm and transformers: used as their libraries use them, and saved in the layout that they came in."""

import json
import shutil
import socket
import sys
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
transformers.utils.logging.disable_progress_bar()  # as the command has it, before the first import
transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
CLASSES, KINDS = ["cat", "dog", "ant"], ["timm_resnet", "timm_vit", "resnet", "vit"]  # classes out of order


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> Path:
    """A folder of each of `KINDS`, for images of 32 or 16 pixels, with a pickle that nobody may open."""
    root, labels = tmp_path_factory.mktemp("networks"), {2: "ant", 0: "cat", 1: "dog"}
    torch.manual_seed(0)
    said = {"label_names": CLASSES, "pretrained_cfg": {"input_size": (3, 32, 32), "crop_pct": 0.8}}
    for name, how in (("test_resnet", {}), ("test_vit", {"img_size": 32})):
        place, net = root / name.replace("test", "timm"), timm.create_model(name, num_classes=3, **how)
        timm.models.save_for_hf(net, place, model_config=said, safe_serialization=True)
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "patch_size": 4}
    vit = transformers.ViTConfig(hidden_size=32, image_size=16, id2label=labels, **small)
    resnet = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], id2label=labels)
    for part in (transformers.ViTForImageClassification(vit), transformers.ViTImageProcessor(size=(16, 16))):
        part.save_pretrained(root / "vit")
    processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 16})
    for part in (transformers.ResNetForImageClassification(resnet), processor):
        part.save_pretrained(root / "resnet")
    for name in KINDS:
        (root / name / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    return root


@pytest.fixture
def clean(tmp_path) -> Path:
    """Six images a class, higher than wide."""
    images = toy_images(18, classes=3)
    for i, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        (place := tmp_path / "clean" / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).resize((33, 47)).save(place / f"{i}.png")
    return tmp_path / "clean"


def flags(place: Path, clean: Path, *more: str) -> tuple[str, ...]:
    fast = ("--epochs", "1", "--risk_steps", "2", "--risk_samples", "8", *QUICK)
    return ("defense", "ft", "--model_file", str(place), "--clean_dir", str(clean), *fast, *more)


def changed(place: Path, to: Path, file: str, keys: dict) -> Path:
    shutil.copytree(place, to)
    (to / file).write_text(json.dumps({**json.loads((to / file).read_text()), **keys}))
    return to


def answer_of_library(place: Path, image: Image.Image) -> torch.Tensor:
    if "timm" in place.name:
        net = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
        return net(timm.data.create_transform(**timm.data.resolve_model_data_config(net))(image)[None])
    net = transformers.AutoModelForImageClassification.from_pretrained(place)
    return net(**transformers.AutoImageProcessor.from_pretrained(place)(image, return_tensors="pt")).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_comes_back_as_its_library_opens_it(kind, networks, clean, tmp_path, here, monkeypatch):
    monkeypatch.setattr(socket, "socket", None)  # nothing is downloaded
    saved, seen = pretrained.saved, []
    monkeypatch.setattr(pretrained, "saved", lambda net: seen.append(net) or saved(net))
    status, out, err = here(*flags(networks / kind, clean))
    assert status == 0 and f"purified folder: record/{kind}_ft" in out, err
    assert "from the folder: mean" in out and "0 = cat, 1 = dog, 2 = ant (names in the file)" in out
    after = tmp_path / "record" / f"{kind}_ft"
    old, new = (safetensors.torch.load_file(place / "model.safetensors") for place in (networks / kind, after))
    assert old.keys() == new.keys() and not all(torch.equal(old[name], value) for name, value in new.items())
    image, came = Image.open(next(clean.rglob("*.png"))), pretrained.open_folder(after)
    x = to_float(came.view.apply(image).to(torch.uint8)[None])
    for net in (seen[0], came.net):
        answer = Normalized(net, came.said["mean"], came.said["std"]).eval()(x)
        torch.testing.assert_close(answer, answer_of_library(after, image))


@pytest.mark.parametrize("kind", ["timm_resnet", "vit"])
def test_inspection_of_a_folder_says_what_its_library_would_open(kind, networks, tmp_path, here):
    status, out, err = here("inspect", str(networks / kind))
    arch = "timm:test_resnet" if kind == "timm_resnet" else "ViTForImageClassification"
    assert (status, err) == (0, "") and out.splitlines()[-1].endswith(f"tensors, {arch} with 3 classes")
    assert "0 = cat, 1 = dog, 2 = ant" in out and "\nimages    mean" in out
    broken = changed(networks / kind, tmp_path / "broken", "config.json", {"architecture": "x", "architectures": ["x"]})
    status, out, err = here("inspect", str(broken))
    assert status == 2 and out.splitlines()[-1].startswith("unreadable: ")


def test_class_folders_are_numbered_by_name_or_number(networks, clean, tmp_path, here, refused):
    (clean / "ant").rename(clean / "zebra")
    said = refused(*flags(networks / "vit", clean))
    assert "the folder 'zebra' names no class" in said and "0 = cat, 1 = dog, 2 = ant" in said
    place = changed(networks / "timm_vit", tmp_path / "unnamed", "config.json", {"label_names": None})
    assert "0 = cat, 1 = dog, 2 = zebra (folders in order)" in here(*flags(place, clean))[1]
    (clean / "dog").rename(clean / "1"), (clean / "zebra").rename(clean / "2"), shutil.rmtree(clean / "cat")
    assert "0 = cat, 1 = dog, 2 = ant (folders by number)" in here(*flags(networks / "vit", clean))[1]


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
    ("vit", "config.json", {"hidden_size": 10**7}, "has weights of other shapes than ViTForImageClassification"),
    ("vit", "config.json", {"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}, "contains custom code"),
    ("vit", "preprocessor_config.json", {"rescale_factor": 0.1}, "does more than resize, crop, scale"),
    ("vit", "preprocessor_config.json", {"size": {"height": 16, "width": 20}}, "wants images of 16x20"),
])  # fmt: skip
def test_what_is_refused_in_one_line(kind, file, keys, said, networks, clean, tmp_path, refused):
    place = changed(networks / kind, tmp_path / "net", file, keys)
    assert said in refused(*flags(place, clean))
    torch.save({}, place / "model.safetensors")
    assert "is no safetensors file" in refused(*flags(place, clean))
    (place / "model.safetensors").unlink()
    assert "has no model.safetensors; save the network as one such file" in refused(*flags(place, clean))


def test_a_name_of_timm_with_a_weights_file(clean, tmp_path, here, refused, monkeypatch):
    torch.save(unwrapped("timm:test_resnet", 3).state_dict(), tmp_path / "net.pt")
    named = flags(tmp_path / "net.pt", clean, "--arch")
    assert "purified weights: record/net_ft/model.pt" in here(*named, "timm:test_resnet")[1]
    assert "has no network 'hf-hub:some/one'" in refused(*named, "timm:hf-hub:some/one")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "the network needs timm; pip install -e '.[models]'" in refused(*named, "timm:test_resnet")


@pytest.mark.parametrize("defense", ["sau", "sau-sam", "ft-sam"])
def test_the_image_tower_of_clip_is_purified_under_the_names_of_the_classes(defense, clean, tmp_path, here):
    open_clip, place = pytest.importorskip("open_clip"), tmp_path / "clip"
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
    towers = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": towers, "preprocess_cfg": {"std": [0.3] * 3}}
    place.mkdir()
    (place / pretrained.CLIP_CONFIG).write_text(json.dumps(config))
    torch.manual_seed(0)
    net = open_clip.create_model(f"local-dir:{place}", load_weights=False)
    safetensors.torch.save_file(net.state_dict(), place / pretrained.CLIP_WEIGHTS)
    status, out, err = here("defense", defense, *flags(place, clean)[2:])
    assert (status, err) == (0, ""), out
    net, _, view = open_clip.create_model_and_transforms(f"local-dir:{place}")
    after = open_clip.create_model(f"local-dir:{tmp_path / 'record' / f'clip_{defense}'}")
    for name, tensor in after.state_dict().items():
        assert torch.equal(tensor, net.state_dict()[name]) == (not name.startswith("visual.")), name
    image, opened = Image.open(next(clean.glob("cat/*"))), pretrained.open_folder(place, sorted(CLASSES))
    prompts = open_clip.get_tokenizer(f"local-dir:{place}")([f"a photo of a {name}." for name in sorted(CLASSES)])
    theirs, words, scale = net(view(image)[None], prompts)
    ours = Normalized(opened.net, opened.said["mean"], opened.said["std"]).eval()
    logits = ours(to_float(opened.view.apply(image).to(torch.uint8)[None]))
    assert torch.allclose(logits, scale * theirs @ words.T, atol=0.2)
    assert "0 = ant, 1 = cat, 2 = dog (names in the file)" in out
