"""The tensors of anybody's file, whatever its format, and the network that they belong to: found by its weights, by a
name, or made by code that the user trusts."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from sau.compat import torch_file
from sau.compat.torch_file import LEGACY, ZIP
from sau.errors import ConfigError, RecordError, printable
from sau.models import MODELS, TIMM, state_dict_spec, torchvision_names, unwrapped
from sau.record.attack_result import check_state_dict
from sau.run import OwnRun

SAFE = "safetensors"
_CLASSES = ("classes", "class_names", "class_to_idx", "idx_to_class", "id2label", "label2id")
_WIDEST = 1024  # width of a network that is looked for
_FIRST = ("resnet", "vgg", "densenet", "mobilenet", "wide", "googlenet", "vit", "efficientnet")  # most used, in order


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a file."""

    path: Path
    kind: str  # its format: a torch file or safetensors
    digest: str  # SHA-256 of the file
    tensors: dict[str, Tensor]  # by their places in it, joined by dots: `state_dict.model.conv1.weight`
    classes: list[str] | None = None  # their names in the order of the logits, if the file holds them

    def prefix(self, own: Mapping[str, Tensor]) -> str | None:
        """The prefix under which the names and shapes of the state dict `own` lie, and nothing else; None without one,
        RecordError if there are several. What lies beside it, like an optimiser's tensors, does not matter."""
        fitting = [start for start in self.starts(next(iter(own))) if _shapes(self.below(start)) == _shapes(own)]
        if len(fitting) > 1:
            under = [prefix[:50] for prefix in fitting[:3]]
            raise RecordError(f"{self.path} holds the network under {under!a}; name one with --model_prefix")
        return fitting[0] if fitting else None

    def starts(self, name: str) -> list[str]:
        """The prefixes under which there is a tensor `name`, the shortest one first."""
        found = (place.removesuffix(name) for place in self.tensors if f".{place}".endswith(f".{name}"))
        return sorted(found, key=len)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under `prefix`, named without it."""
        return {place.removeprefix(prefix): value for place, value in self.tensors.items() if place.startswith(prefix)}

    def of(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors for the state dict `own`, in its order and types; RecordError says what differs."""
        if (prefix := self.prefix(own)) is None:
            starts = self.starts(next(iter(own)))
            check_state_dict(own, self.below(starts[0]) if starts else {}, self.path, "the network")
        inside = self.below(str(prefix))
        return {name: fit(inside[name], tensor, f"{self.path}: {name}") for name, tensor in own.items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _names(value: Any) -> list[str] | None:
    """Class names in the order of their numbers, from a list, {name: number} or {number: name}, else None."""
    if isinstance(value, dict):
        pairs = [(key, name) if isinstance(name, str) else (name, key) for key, name in value.items()]
        numbered = {str(number): name for number, name in pairs}
        value = [numbered.get(str(number)) for number in range(len(pairs))]
    named = isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)
    return list(value) if named and len({*value}) == len(value) > 1 else None


def fit(value: Tensor, own: Tensor, name: str) -> Tensor:
    """`value` in the type of `own`: any float for a float, any type for a count (`num_batches_tracked`), else the same
    type; RecordError if it is not finite."""
    count, floats = own.dtype == torch.int64 and not own.ndim, value.is_floating_point() and own.is_floating_point()
    if value.dtype != own.dtype and not (count or floats):
        raise RecordError(f"{name} has type {value.dtype}, allowed is {own.dtype}")
    cast = value.to(own.dtype).contiguous()
    if not bool((torch.isfinite(value) & torch.isfinite(cast)).all()):
        raise RecordError(f"{name} holds a value that is not finite (NaN or infinity)")
    return cast


def file_format(raw: bytes) -> str:
    """The format of an untrusted file, by its content; "" for an unknown one."""
    if raw[8:9] == b"{":
        return SAFE
    starts = {LEGACY: "torch before 1.6", b"\x80": "pickle", ZIP: "torch zip archive" if b"/data.pkl" in raw else "zip"}
    return next((kind for start, kind in starts.items() if raw.startswith(start)), "")


def read(path: Path, raw: bytes | None = None) -> Weights:
    """Read a `.pt`, `.pth`, `.ckpt` or `.safetensors` file without running anything in it; `raw` is its content, if it
    has been read, and tells the format. RecordError if it cannot be read."""
    raw = torch_file.content(path) if raw is None else raw
    kind, digest = file_format(raw), hashlib.sha256(raw).hexdigest()
    if kind != SAFE:
        return collect(path, torch_file.load(path, raw), kind, digest)
    try:
        return Weights(path, kind, digest, dict(sorted(safetensors.torch.load(raw).items())))  # which come in no order
    except Exception as error:  # safetensors has its own
        raise RecordError(f"{path} cannot be read: {printable(str(error))[:160]}") from None


def collect(path: Path, content: Any, kind: str = "", digest: str = "") -> Weights:
    """All tensors in nested containers, each container once, and class names; RecordError for a tensor that is not
    dense, on the CPU and whole."""
    tensors: dict[str, Tensor] = {}
    classes: list[str] | None = None
    seen: set[int] = set()  # a container may hold itself, or the same one many times
    waiting = [("", content)]
    while waiting:
        place, value = waiting.pop()
        if place.split(".")[-1].lower() in _CLASSES:
            classes = classes or _names(value)
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
                raise RecordError(f"{path}: {place[:100]!a} is no dense tensor on the CPU; save a state dict of such")
            value = Tensor.detach(value)  # without attributes that the file gave it
            if value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise RecordError(f"{path}: {place[:99]!a} claims shape {[*value.shape][:8]}, but holds fewer values")
            tensors[place or "tensor"] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = [*value.items()] if isinstance(value, dict) else [*enumerate(value)]
            for key, inner in reversed(items):  # the first one is taken first
                if isinstance(key, str | int):
                    waiting.append((f"{place}.{key}" if place else str(key), inner))
    return Weights(path, kind, digest, tensors, classes)


class Guess(NamedTuple):
    """A network that a file's tensors under `prefix` fit by every name and shape."""

    name: str  # as `build` takes it
    width: int | None  # None for a network of torchvision
    classes: int
    prefix: str


@cache
def _ends(name: str) -> tuple[str, str]:
    """The first and the last name in the state dict of a network, which width and classes do not change."""
    first, *_, last = state_dict_spec(partial(unwrapped, name, 10, 64))
    return first, last


def guess(found: Weights) -> Guess | None:
    """The network whose names and shapes are in `found`: preactresnet18 of any width, one of torchvision's classifiers
    (except regnet, which needs memory to be compared), or None; RecordError if it is there more than once."""
    names = sorted(torchvision_names(), key=lambda name: [not name.startswith(start) for start in _FIRST])
    for name in [*MODELS, *(name for name in names if not name.startswith("regnet"))]:
        first, last = _ends(name)
        for start in found.starts(first):
            head, tail = found.tensors[start + first], found.tensors.get(start + last)
            if tail is not None and 0 not in (head.ndim, tail.ndim) and 0 < len(head) <= _WIDEST:
                spec = state_dict_spec(partial(unwrapped, name, len(tail), len(head)))
                if (prefix := found.prefix(spec)) is not None:
                    return Guess(name, len(head) if name in MODELS else None, len(tail), prefix)
    return None


def network(run: OwnRun, classes: int, found: Weights) -> tuple[nn.Module, str]:
    """The network with the weights that its file, `run.model_file`, was `found` to hold, and its name; `classes` are
    its logits where `run.arch` is a plain name. ConfigError if the network cannot be found or trusted, RecordError if
    the weights are of another one."""
    if run.model_prefix is not None:
        # A whole name comes first: `state_dict` is not `state_dict_ema`.
        chosen = found.below(f"{run.model_prefix.removesuffix('.')}.") or found.below(run.model_prefix)
        if not chosen:
            raise RecordError(f"{found.path} has no tensor under {run.model_prefix!r}; sau inspect lists them")
        found = replace(found, tensors=chosen)
    name = run.arch
    if ":" in name and not name.startswith(TIMM):
        make = _imported(run)
    elif name != "auto":  # the width is that of the first convolution
        width = next((len(value) for value in found.tensors.values() if value.ndim == 4), 64)
        make = partial(unwrapped, name, classes, width)
    elif known := guess(found):
        name, make = known.name, partial(unwrapped, known.name, known.classes, known.width)
    else:
        raise ConfigError(f"{found.path} holds no known network; name it with --arch NAME or module:function")
    try:
        return filled(make, found), name
    except RecordError as error:
        advice = f"; its tensors fit {known.name}, which --arch auto finds" if (known := guess(found)) else ""
        raise RecordError(f"{error}{advice}") from None


def filled(make: Callable[[], nn.Module], found: Weights) -> nn.Module:
    """The network that `make` makes, with its weights in `found`; RecordError if they are of another one."""
    state = found.of(state_dict_spec(make))  # no memory yet: the file may claim any width
    net = make()
    net.load_state_dict(state)
    net.eval()
    return net


def _imported(run: OwnRun) -> Callable[[], nn.Module]:
    """What gives the network of the user's own function, which is called here, once."""
    if not run.trust_code:
        raise ConfigError(f"--arch {run.arch} would run that code; give --trust_code true if you trust it")
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does
    try:
        net = resolve_name(run.arch)()
    except Exception as error:  # whatever that code raises
        raise ConfigError(f"--arch {run.arch} failed: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(here)
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--arch {run.arch} returned {type(net).__name__}, allowed is a torch.nn.Module")
    return lambda: net


def short_names(names: Iterable[str]) -> str:
    """Class names on one printable line: `0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck`."""
    pairs = [f"{number} = {name[:40]}" for number, name in enumerate(names)]
    return printable(", ".join(pairs if len(pairs) <= 5 else [*pairs[:3], "...", pairs[-1]]))
