"""The tensors of anybody's file, whatever its format, and the network that they belong to."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sau.compat import torch_file
from sau.errors import RecordError, printable
from sau.models import MODELS, has_width, state_dict_spec, torchvision_names, torchvision_plain

SAFE, ONNX = "safetensors", "ONNX"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_DEEPEST = 50  # levels of nested containers
_CLASSES = ("classes", "class_names", "class_to_idx", "idx_to_class", "id2label", "label2id")
_SIZES = ("img_size", "image_size", "input_size")
_FACTS = {"clean_data", "mean", "std", *_CLASSES, *_SIZES}
_FIRST = ("resnet", "vgg", "densenet", "mobilenet", "wide", "googlenet", "vit", "efficientnet")  # most used
_LEAST = 16  # tensors of the smallest known network, alexnet


class SeveralError(RecordError):
    """A file holds a network more than once, under several prefixes."""

    def __init__(self, path: Path, prefixes: list[str]) -> None:
        self.under = ", ".join(f"{prefix[:100]!a}" for prefix in prefixes[:5])
        times = f"{path} holds the network {len(prefixes)} times"
        super().__init__(f"{times}: under {self.under}; name one with --model_prefix")


@dataclass(frozen=True, eq=False)
class Weights:
    """The content of a file.

    Args:
        path: the file.
        kind: its format: a torch file, safetensors or ONNX.
        digest: SHA-256 of the file.
        tensors: its tensors by their places in it, joined by dots: `state_dict.model.conv1.weight`.
        facts: what else it holds about its training, by place: `mean`, `class_to_idx`, `img_size` and the like.
    """

    path: Path
    kind: str
    digest: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of the logits, if the file holds them."""
        found = (_names(value) for place, value in self.facts.items() if _key(place) in _CLASSES)
        return next((names for names in found if names), None)

    @property
    def input_size(self) -> int | None:
        """Height or width, the larger one, of the training images in pixels, if the file holds it."""
        for place, value in self.facts.items():
            sides = value if isinstance(value, list | tuple) else [value]
            if _key(place) in _SIZES and sides and all(type(side) is int for side in sides):
                return max(sides)
        return None

    def prefix(self, own: Mapping[str, Tensor]) -> str:
        """The prefix under which the names and shapes of the state dict `own` lie, and nothing else.

        What lies beside the prefix, like an optimiser's tensors, does not matter. RecordError says what differs,
        SeveralError that there is more than one.
        """
        first = next(iter(own))
        candidates = {place[: -len(first)] for place in self.tensors if f".{place}".endswith(f".{first}")}
        if not candidates:
            raise RecordError(f"{self.path} has no {first!r}, which the network begins with")
        faults = {prefix: list(self._faults(prefix, own)) for prefix in sorted(candidates, key=len)}
        fitting = [prefix for prefix, found in faults.items() if not found]
        if len(fitting) > 1:
            raise SeveralError(self.path, fitting)
        if not fitting:
            closest = min(faults.values(), key=len)
            raise RecordError(f"{self.path} {closest[0]}: it is not the network, which has {len(own)} tensors")
        return fitting[0]

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


def _key(place: str) -> str:
    return place.split(".")[-1].lower()


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
    if not bool(torch.isfinite(value).all()) or (name.endswith("running_var") and bool((value < 0).any())):
        raise RecordError(f"{name} holds a value that is not finite (NaN or infinity), or a negative variance")
    return value


def file_format(path: Path, raw: bytes) -> str:
    """The format of an untrusted file, by its content; "" for an unknown one."""
    if raw[8:9] == b"{":
        return SAFE
    if raw[:1] == b"\x08" and path.suffix == ".onnx":  # a protobuf has no mark of its own
        return ONNX
    if raw.startswith(torch_file.LEGACY):
        return "torch before 1.6"
    if raw.startswith(torch_file.ZIP):
        return "torch zip archive" if b"/data.pkl" in raw else "zip archive"
    return "pickle" if raw[:1] == b"\x80" else ""


def read(path: Path, raw: bytes | None = None) -> Weights:
    """Read a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.onnx` file; its content tells the format, not its name.

    Nothing in it is run. `raw` is its content, if it has been read. RecordError if it cannot be read.
    """
    raw = torch_file.content(path) if raw is None else raw
    kind = file_format(path, raw)
    if kind in (SAFE, ONNX):
        try:
            tensors = safetensors.torch.load(raw) if kind == SAFE else _onnx(raw)
        except Exception as error:  # safetensors, protobuf and numpy have their own
            raise RecordError(f"{path} cannot be read: {printable(str(error))[:160]}") from None
        return Weights(path, kind, hashlib.sha256(raw).hexdigest(), tensors)
    content, digest = torch_file.load(path, raw)
    return collect(path, content, kind, digest)


def collect(path: Path, content: Any, kind: str = "", digest: str = "") -> Weights:
    """All tensors and facts in nested containers, each container once; RecordError for too many levels."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    seen: set[int] = set()  # a container may hold itself, or the same one many times

    def visit(value: Any, place: str, depth: int) -> None:
        if depth > _DEEPEST:
            raise RecordError(f"{path} has more than {_DEEPEST} levels; save a state dict alone")
        if _key(place) in _FACTS:
            facts[place] = value.values.tolist() if isinstance(value, torch_file.Array) else value
        if isinstance(value, Tensor):
            tensors[place or "tensor"] = _dense(value, f"{path}: {place[:100]!a}")
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str | int):
                    visit(inner, f"{place}.{key}" if place else str(key), depth + 1)

    visit(content, "", 0)
    return Weights(path, kind, digest, tensors, facts)


def _dense(value: Tensor, what: str) -> Tensor:
    """The tensor without attributes that the file gave it; RecordError unless it is dense, on the CPU and whole."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        raise RecordError(f"{what} is no dense tensor on the CPU; save a state dict of such")
    value = Tensor.detach(value)
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RecordError(f"{what} claims shape {list(value.shape)[:8]}, but holds fewer values")
    return value


def _onnx(raw: bytes) -> dict[str, Tensor]:
    try:
        import onnx
    except ModuleNotFoundError:
        raise RecordError("it is an ONNX file, which needs: pip install -e '.[onnx]'") from None
    found = onnx.load_from_string(raw).graph.initializer
    if outside := [tensor.name for tensor in found if tensor.external_data]:
        raise RecordError(f"{outside[0][:100]!a} lies in another file, which is not opened")
    return {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in found}


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
    """The network whose names and shapes are in `found`, or None; SeveralError if it is there more than once.

    Candidates are preactresnet18 of any width and torchvision's classifiers, except regnet, whose state dict cannot be
    had without memory for its weights.
    """
    names = [*MODELS, *sorted(torchvision_names(), key=lambda name: (not name.startswith(_FIRST), name))]
    for name in names if len(found.tensors) >= _LEAST else ():
        if not name.startswith("regnet") and (fitting := _try(found, name)):
            return fitting
    return None


def _try(found: Weights, name: str) -> Guess | None:
    """The guess `name` with the width and the classes of the file, if everything fits."""
    own = state_dict_spec(partial(unwrapped, name, 10, 64 if has_width(name) else None))
    first, last = next(iter(own)), list(own)[-1]
    for place, value in found.tensors.items():
        prefix = place[: -len(first)]
        end = found.tensors.get(prefix + last)
        if not f".{place}".endswith(f".{first}") or end is None or 0 in (value.ndim, end.ndim):
            continue
        width = len(value) if has_width(name) else None
        if width is None or 0 < width <= 1024:
            try:
                spec = state_dict_spec(partial(unwrapped, name, len(end), width))
                return Guess(name, width, len(end), found.prefix(spec))
            except SeveralError:
                raise
            except RecordError:
                continue
    return None


def unwrapped(name: str, classes: int, width: int | None) -> nn.Module:
    """The network by its name, as its authors wrote it; ConfigError for an unknown name."""
    return MODELS[name](classes, width) if has_width(name) else torchvision_plain(name, classes)


def short_names(names: Iterable[str]) -> str:
    """Class names on one printable line: `0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck`."""
    pairs = [f"{number} = {name[:40]}" for number, name in enumerate(names)]
    return printable(", ".join(pairs if len(pairs) <= 5 else [*pairs[:3], "...", pairs[-1]]))
