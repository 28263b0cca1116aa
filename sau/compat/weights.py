"""The tensors of anybody's file, whatever its format, and the network that they belong to: found by its weights, by a
name, or made by code that the user trusts."""

import hashlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sau.compat import torch_file
from sau.errors import ConfigError, RecordError, printable
from sau.models import MODELS, has_width, state_dict_spec, torchvision_names, unwrapped
from sau.settings import OwnRun

SAFE = "safetensors"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEEPEST = 50  # levels of nested containers
_CLASSES = ("classes", "class_names", "class_to_idx", "idx_to_class", "id2label", "label2id")
_FIRST = ("resnet", "vgg", "densenet", "mobilenet", "wide", "googlenet", "vit", "efficientnet")  # most used


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a file.

    Args:
        path: the file.
        kind: its format: a torch file or safetensors.
        digest: SHA-256 of the file.
        tensors: its tensors by their places in it, joined by dots: `state_dict.model.conv1.weight`.
        classes: names of the classes in the order of the logits, if the file holds them.
    """

    path: Path
    kind: str
    digest: str
    tensors: dict[str, Tensor]
    classes: list[str] | None = None

    def prefixes(self, own: Mapping[str, Tensor]) -> list[str]:
        """The prefixes under which the names and shapes of the state dict `own` lie, and nothing else.

        What lies beside a prefix, like an optimiser's tensors, does not matter.
        """
        return [prefix for prefix in self._candidates(own) if not any(self._faults(prefix, own))]

    def prefix(self, own: Mapping[str, Tensor]) -> str:
        """The one of `prefixes`; RecordError says what differs, or that there are several."""
        fitting = self.prefixes(own)
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            under = [prefix[:50] for prefix in fitting[:3]]
            raise RecordError(f"{self.path} holds the network under {under!a}; name one with --model_prefix")
        faults = [list(self._faults(prefix, own)) for prefix in self._candidates(own)]
        closest = min(faults, key=len)[0] if faults else f"has no {next(iter(own))!r}"
        raise RecordError(f"{self.path} {closest}: it is not the network, which has {len(own)} tensors")

    def _candidates(self, own: Mapping[str, Tensor]) -> list[str]:
        first = next(iter(own))
        found = {place[: -len(first)] for place in self.tensors if f".{place}".endswith(f".{first}")}
        return sorted(found, key=lambda prefix: (len(prefix), prefix))

    def _faults(self, prefix: str, own: Mapping[str, Tensor]) -> Iterator[str]:
        inside = {place.removeprefix(prefix) for place in self.tensors if place.startswith(prefix)}
        for name in sorted(inside ^ own.keys()):
            yield f"{'lacks' if name in own else 'has an unknown'} {prefix + name!r}"
        for name in sorted(inside & own.keys()):
            if (got := list(self.tensors[prefix + name].shape)) != (wanted := list(own[name].shape)):
                yield f"has {prefix + name!r} of shape {got}, but the network has {wanted}"

    def of(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors for the state dict `own`, in its order and types; RecordError as in `prefix` and `_fit`."""
        prefix = self.prefix(own)
        return {name: _fit(self.tensors[prefix + name], tensor, f"{self.path}: {name}") for name, tensor in own.items()}

    def packed(self, prefix: str) -> bytes:
        """The tensors under `prefix` as safetensors, named without it; RecordError if safetensors cannot hold them."""
        chosen = {place.removeprefix(prefix): v for place, v in self.tensors.items() if place.startswith(prefix)}
        try:
            return safetensors.torch.save({name: value.contiguous().clone() for name, value in chosen.items()})
        except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:  # a type or name it lacks
            raise RecordError(f"safetensors cannot hold it ({printable(str(error))[:100]})") from None


def _names(value: Any) -> list[str] | None:
    """Class names in the order of their numbers, from a list, {name: number} or {number: name}, else None."""
    if isinstance(value, dict):
        pairs = [(key, name) if isinstance(name, str) else (name, key) for key, name in value.items()]
        if sorted(str(number) for number, _ in pairs) != sorted(map(str, range(len(pairs)))):
            return None
        value = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    if not isinstance(value, list | tuple) or len(value) < 2 or not all(isinstance(name, str) for name in value):
        return None
    return list(value) if len({*value}) == len(value) else None


def _fit(value: Tensor, own: Tensor, name: str) -> Tensor:
    """`value` in the type of `own`: any float for a float, else the same type; RecordError if it is not finite."""
    types = _FLOATS if own.is_floating_point() else (own.dtype,)
    if value.dtype not in types:
        raise RecordError(f"{name} has type {value.dtype}, allowed is {' or '.join(map(str, types))}")
    value = value.to(own.dtype).contiguous()
    if not bool(torch.isfinite(value).all()):
        raise RecordError(f"{name} holds a value that is not finite (NaN or infinity)")
    return value


def file_format(raw: bytes) -> str:
    """The format of an untrusted file, by its content; "" for an unknown one."""
    if raw[8:9] == b"{":
        return SAFE
    if raw.startswith(torch_file.LEGACY):
        return "torch before 1.6"
    if raw.startswith(torch_file.ZIP):
        return "torch zip archive" if b"/data.pkl" in raw else "zip archive"
    return "pickle" if raw[:1] == b"\x80" else ""


def read(path: Path, raw: bytes | None = None) -> Weights:
    """Read a `.pt`, `.pth`, `.ckpt` or `.safetensors` file; its content tells the format, not its name.

    Nothing in it is run. `raw` is its content, if it has been read. RecordError if it cannot be read.
    """
    raw = torch_file.content(path) if raw is None else raw
    kind = file_format(raw)
    if kind != SAFE:
        content, digest = torch_file.load(path, raw)
        return collect(path, content, kind, digest)
    try:
        return Weights(path, kind, hashlib.sha256(raw).hexdigest(), safetensors.torch.load(raw))
    except Exception as error:  # safetensors has its own
        raise RecordError(f"{path} cannot be read: {printable(str(error))[:160]}") from None


def collect(path: Path, content: Any, kind: str = "", digest: str = "") -> Weights:
    """All tensors in nested containers, each container once, and class names; RecordError for too many levels."""
    tensors: dict[str, Tensor] = {}
    classes: list[list[str]] = []
    seen: set[int] = set()  # a container may hold itself, or the same one many times

    def visit(value: Any, place: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise RecordError(f"{path} has more than {_DEEPEST} levels; save a state dict alone")
        if place.split(".")[-1].lower() in _CLASSES and (names := _names(value)):
            classes.append(names)
        if isinstance(value, Tensor):
            tensors[place or "tensor"] = _dense(value, f"{path}: {place[:100]!a}")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str | int):
                    visit(inner, f"{place}.{key}" if place else str(key), depth + 1)

    visit(content, "", 0)
    return Weights(path, kind, digest, tensors, classes[0] if classes else None)


def _dense(value: Tensor, what: str) -> Tensor:
    """The tensor without attributes that the file gave it; RecordError unless it is dense and on the CPU."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        raise RecordError(f"{what} is no dense tensor on the CPU; save a state dict of such")
    value = Tensor.detach(value)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RecordError(f"{what} claims shape {list(value.shape)[:8]}, but holds fewer values")
    return value


@dataclass(frozen=True)
class Guess:
    """A network that a file's tensors fit by every name and shape.

    Args:
        name: of the network, as `build` takes it.
        width: of a network of `MODELS`, else None.
        classes: its logits.
        prefix: where its tensors lie in the file.
    """

    name: str
    width: int | None
    classes: int
    prefix: str


def guess(found: Weights) -> Guess | None:
    """The network whose names and shapes are in `found`, or None; RecordError if it is there more than once.

    Candidates are preactresnet18 of any width and torchvision's classifiers, except regnet, whose state dict cannot be
    had without memory for its weights.
    """
    names = sorted(torchvision_names(), key=lambda name: (not name.startswith(_FIRST), name))
    for name in [*MODELS, *(name for name in names if not name.startswith("regnet"))]:
        if fitting := _try(found, name):
            return fitting
    return None


def _try(found: Weights, name: str) -> Guess | None:
    """The guess `name` with the width and the classes of the file, if everything fits."""
    own = state_dict_spec(partial(unwrapped, name, 10, 64 if has_width(name) else None))
    first, last = next(iter(own)), list(own)[-1]
    for place, value in found.tensors.items():
        end = found.tensors.get(place[: -len(first)] + last)
        if not f".{place}".endswith(f".{first}") or end is None or 0 in (value.ndim, end.ndim):
            continue
        width = len(value) if has_width(name) else None
        if width is None or 0 < width <= 1024:
            spec = state_dict_spec(partial(unwrapped, name, len(end), width))
            if found.prefixes(spec):
                return Guess(name, width, len(end), found.prefix(spec))
    return None


def network(run: OwnRun, classes: int, found: Weights | None = None) -> tuple[nn.Module, Weights, str]:
    """The network with its weights, the content of their file, and the network's name.

    Args:
        run: the file and the architecture.
        classes: logits, where `arch` is a plain name.
        found: the content of the file, if it has been read.

    Raises:
        ConfigError: the network cannot be found or trusted.
        RecordError: the weights are of another network.
    """
    found = read(Path(str(run.model_file))) if found is None else found
    if run.model_prefix is not None:
        found = _below(found, run.model_prefix)
    name, make = _architecture(run, classes, found)
    own = make().state_dict() if ":" in name else state_dict_spec(make)  # no memory yet: the file may claim any width
    try:
        state = found.of(own)
    except RecordError as error:
        advice = f"; its tensors fit {known.name}, which --arch auto finds" if (known := guess(found)) else ""
        raise RecordError(f"{error}{advice}") from None
    net = make()
    net.load_state_dict(state)
    return net.eval(), found, name


def _architecture(run: OwnRun, classes: int, found: Weights) -> tuple[str, Callable[[], nn.Module]]:
    """The network's name and what makes it."""
    if ":" in run.arch:
        net = _imported(run)
        return run.arch, lambda: net
    if run.arch != "auto":
        # The width is that of the first convolution.
        width = next((len(value) for value in found.tensors.values() if value.ndim == 4), 64)
        return run.arch, partial(unwrapped, run.arch, classes, width if has_width(run.arch) else None)
    known = guess(found)
    if known is None:
        raise ConfigError(f"{found.path} holds no known network; name it with --arch NAME or module:function")
    return known.name, partial(unwrapped, known.name, known.classes, known.width)


def _below(found: Weights, prefix: str) -> Weights:
    """The tensors under `prefix` alone; RecordError if there are none."""
    whole = f"{prefix.removesuffix('.')}."  # `state_dict` is not `state_dict_ema`
    start = whole if any(place.startswith(whole) for place in found.tensors) else prefix
    chosen = {place: value for place, value in found.tensors.items() if place.startswith(start)}
    if not chosen:
        raise RecordError(f"{found.path} has no tensor under {prefix!r}; sau inspect lists them")
    return replace(found, tensors=chosen)


def _imported(run: OwnRun) -> nn.Module:
    module, _, function = run.arch.partition(":")
    if not run.trust_code:
        raise ConfigError(f"--arch {run.arch} would run code of {module}; say --trust_code true if you trust it")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        net = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever that code raises
        raise ConfigError(f"--arch {run.arch} failed: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--arch {run.arch} returned {type(net).__name__}, wanted is a torch.nn.Module")
    return net


def short_names(names: Iterable[str]) -> str:
    """Class names on one printable line: `0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck`."""
    pairs = [f"{number} = {name[:40]}" for number, name in enumerate(names)]
    return printable(", ".join(pairs if len(pairs) <= 5 else [*pairs[:3], "...", pairs[-1]]))
