"""Networks of timm, transformers and open_clip, opened from the folders that these libraries write, and saved as they
came. Nothing is downloaded, no pickle is opened, and no code of a folder runs.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sau.compat import weights
from sau.compat.weights import Weights
from sau.data.decode import Preparation
from sau.data.images import to_float
from sau.errors import ConfigError, RecordError, SauError, first_line, one_line
from sau.files import read
from sau.models import TIMM, Normalized, library
from sau.record.folder import on_cpu
from sau.run import OwnRun

CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
CLIP_CONFIG, CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
PROMPT = "a photo of a {}."
_PROBE = Image.fromarray((np.arange(48 * 64 * 3) % 251).astype(np.uint8).reshape(48, 64, 3))


class Logits(nn.Module):
    """A classifier of transformers, which answers with its logits alone."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net: Any = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(pixel_values=x, return_dict=True).logits


class ZeroShot(nn.Module):
    """The image tower of CLIP (Radford et al., ICML 2021), with the names of the classes as its fixed last layer:

    logits_c = scale * <image, text_c>,     both of length 1, text_c that of a prompt with the name of class c
    """

    def __init__(self, clip: Any, prompts: Tensor) -> None:
        super().__init__()
        self.net: nn.Module = clip.visual
        self.rest = [clip]  # in a list, for its text tower is no part of the classifier
        with torch.no_grad():
            head = clip.logit_scale.exp() * F.normalize(clip.encode_text(prompts), dim=1)
        self.head: Tensor = nn.Buffer(head.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.net(x), dim=1) @ self.head.T


@dataclass(frozen=True, eq=False)
class Pretrained:
    """The network of a folder, and what the folder says of its use."""

    said: dict[str, Any]  # settings of `OwnRun`: arch, mean, std and input_size
    net: nn.Module  # takes normalised images [B, 3, size, size], returns logits
    found: Weights  # with the names of its classes, if it has them
    view: Preparation
    configs: dict[str, bytes]  # its other files

    def settle(self, own: OwnRun, asked: set[str]) -> OwnRun:
        """`own` with what the folder says; ConfigError where the user `asked` for something else."""
        for name, value in self.said.items():
            if name in asked and getattr(own, name) not in (value, "auto"):
                raise ConfigError(f"{name} is {getattr(own, name)}, but {own.model_file} says {value}; leave it out")
        return replace(own, **self.said)


def weights_file(folder: Path) -> Path:
    """The file with the weights of a folder; RecordError if it is not there."""
    path = folder / (CLIP_WEIGHTS if (folder / CLIP_CONFIG).exists() else WEIGHTS)
    if not path.exists():
        how = "save the network as one such file (timm: safe_serialization=True)"
        raise RecordError(f"{folder} has no {path.name}; {how}")
    return path


def open_folder(folder: Path, names: Sequence[str] = ()) -> Pretrained:
    """The network in `folder`; ConfigError, RecordError or OSError if it cannot be used as its library uses it. `names`
    are those of the classes for a network that answers with the likeness of images and words."""
    found = weights.read(weights_file(folder))
    clip = found.path.name == CLIP_WEIGHTS
    if found.kind != weights.SAFE:
        raise ConfigError(f"{found.path} is no safetensors file, but {found.kind}; its library would not open it")
    files = [CLIP_CONFIG] if clip else [CONFIG, *([PROCESSOR] if (folder / PROCESSOR).exists() else [])]
    configs = {name: read(folder / name) for name in files}
    digest = hashlib.sha256(b"".join([found.digest.encode(), *configs.values()])).hexdigest()
    try:
        opened: Any = partial(_open_clip, names=names)
        if not clip:
            opened = _transformers if "architectures" in json.loads(configs[CONFIG]) else _timm
        arch, net, shown, mean, std, apply, settings = opened(folder, found)
        _, height, width = apply(_PROBE).shape
    except (SauError, MemoryError):
        raise
    except Exception as error:  # on what they do not know the libraries raise a dozen types
        raise ConfigError(f"{folder} cannot be opened: {type(error).__name__}: {first_line(error)}") from None
    if height != width:
        raise ConfigError(f"{folder} wants images of {height}x{width}, allowed are squares")
    how = ", ".join(f"{name} {value}" for name, value in settings.items())
    view = Preparation(width, apply, one_line(f"mean {mean}, std {std}, images {width}x{height}, {how}"))
    said = {"arch": arch, "mean": tuple(mean), "std": tuple(std), "input_size": width}
    return Pretrained(said, net, replace(found, digest=digest, classes=shown and [*map(str, shown)]), view, configs)


def saved(net: nn.Module) -> dict[str, bytes]:
    """The file of weights of the library of `net`; transformers has other names in files than in networks."""
    if not isinstance(net, Logits):
        file, whole = (CLIP_WEIGHTS, net.rest[0]) if isinstance(net, ZeroShot) else (WEIGHTS, net)
        return {file: safetensors.torch.save(on_cpu(whole.state_dict()))}
    with TemporaryDirectory() as place:
        net.net.save_pretrained(place, max_shard_size="1TB")
        return {WEIGHTS: (Path(place) / WEIGHTS).read_bytes()}


def _timm(folder: Path, found: Weights) -> tuple[Any, ...]:
    """Name, network, class names, mean, std, what makes pixels 0..255 [3, H, W] of an image, and its settings."""
    timm = library("timm")
    net: Any = weights.filled(partial(timm.create_model, f"local-dir:{folder}", pretrained=False), found)
    cfg, how = net.pretrained_cfg, timm.data.resolve_model_data_config(net)
    if (names := cfg.get("label_names")) and len(names) != net.num_classes:
        raise ConfigError(f"{folder / CONFIG} names {len(names)} classes, but its network has {net.num_classes}")
    apply = timm.data.create_transform(**how, is_training=False, normalize=False)
    settings = {name: how[name] for name in ("interpolation", "crop_pct", "crop_mode")}
    return TIMM + cfg["architecture"], net, names, how["mean"], how["std"], apply, settings


def _transformers(folder: Path, found: Weights) -> tuple[Any, ...]:
    """As `_timm`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    lib, local = library("transformers"), {"local_files_only": True, "trust_remote_code": False}
    config, processor = (each.from_pretrained(folder, **local) for each in (lib.AutoConfig, lib.AutoImageProcessor))
    (arch,) = config.architectures
    if not arch.endswith("ForImageClassification"):
        raise ConfigError(f"{folder / CONFIG} says {arch}, allowed is a network ...ForImageClassification")
    tensors = {name: weights.fit(value, value, f"{found.path}: {name}") for name, value in found.tensors.items()}
    # The tensors are given, so that no other file is looked for; every network has the eager attention.
    how = {"config": config, "state_dict": tensors, "attn_implementation": "eager", "dtype": torch.float32}
    try:
        net, differs = getattr(lib, arch).from_pretrained(None, **how, output_loading_info=True)
    except RuntimeError:  # before it takes memory, of which a configuration may claim any size
        raise ConfigError(f"{found.path} has weights of other shapes than {arch} by {CONFIG}") from None
    if wrong := sorted(str(name) for each in differs.values() for name in each):
        raise ConfigError(f"{found.path} and {arch} differ in {len(wrong)} weights, like {wrong[0]}")

    def answer(image: Image.Image, **how: bool) -> Tensor:
        return torch.as_tensor(processor(image, return_tensors="pt", **how)["pixel_values"][0])

    def apply(image: Image.Image) -> Tensor:
        return answer(image, do_rescale=False, do_normalize=False).clamp(0, 255).round()

    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    ours = Normalized(nn.Identity(), mean, std)(to_float(apply(_PROBE).to(torch.uint8)[None]))[0]
    if (ours - answer(_PROBE)).abs().max() > 0.5 / 255 / min(std) + 1e-4:
        raise ConfigError(f"{folder / PROCESSOR} does more than resize, crop, scale to [0, 1] and normalise")
    scaling = {"do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"}
    settings = {name: value for name, value in processor.to_dict().items() if name not in scaling}
    return arch, Logits(net.eval()), [config.id2label[i] for i in range(config.num_labels)], mean, std, apply, settings


def _open_clip(folder: Path, found: Weights, names: Sequence[str]) -> tuple[Any, ...]:
    """As `_timm`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    lib, place = library("open_clip"), f"local-dir:{folder}"
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it warns of weights that were not loaded yet
    try:
        clip: Any = weights.filled(partial(lib.create_model, place, load_weights=False), found)
    finally:
        logging.disable(before)
    how = lib.transform.PreprocessCfg(**clip.visual.preprocess_cfg)
    plain = lib.transform.image_transform_v2(replace(how, mean=(0.0,) * 3, std=(1.0,) * 3), is_train=False)
    prompts = lib.get_tokenizer(place)([PROMPT.format(name.replace("_", " ")) for name in names or ["thing"]])
    settings = {"interpolation": how.interpolation, "resize_mode": how.resize_mode, "prompts": PROMPT}

    def apply(image: Image.Image) -> Tensor:
        return (255 * plain(image)).round()

    return "open_clip", ZeroShot(clip, prompts), list(names), how.mean, how.std, apply, settings
