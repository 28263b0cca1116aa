"""The tensors of anybody's file, whatever its format, and the network among them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sau.compat import torch_file
from sau.errors import RecordError

NARROW = (torch.float32, torch.float16, torch.bfloat16)
FLOATS = (*NARROW, torch.float64)
VALUES, DEEPEST = 10_000_000, 50  # of a file, so that one that holds itself comes to an end
SAFE, ONNX = "safetensors", "ONNX"
_CLASSES = ("classes", "class_names", "class_to_idx", "idx_to_class", "id2label", "label2id")
_SIZES = ("img_size", "image_size", "input_size")
_FACTS = {"clean_data", "mean", "std", *_CLASSES, *_SIZES}


class SeveralError(RecordError):
    """A file holds a network more than once, under several prefixes."""

    def __init__(self, path: Path, prefixes: Sequence[str]) -> None:
        self.under = ", ".join(f"{prefix[:100]!a}" for prefix in prefixes[:5])
        times = f"{path} holds the network {len(prefixes)} times"
        super().__init__(f"{times}: under {self.under}; name one with --model_prefix")


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file holds.

    Args:
        path: of the file.
        kind: its format, a torch file, safetensors or ONNX.
        digest: SHA-256 of the file.
        tensors: its tensors by their places in it, joined by dots: `state_dict.model.conv1.weight`.
        facts: what else it says of its training, by place: values of `mean`, `class_to_idx`, `img_size` and the like.
    """

    path: Path
    kind: str
    digest: str
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def classes(self) -> list[str] | None:
        """Names of the network's classes in the order of its outputs, where the file holds them."""
        found = (_names(value) for place, value in self.facts.items() if _key(place) in _CLASSES)
        return next((names for names in found if names), None)

    @property
    def input_size(self) -> int | None:
        """Height or width, the larger one, of the images that the network was trained with, where the file says so."""
        for place, value in self.facts.items():
            sides = value if isinstance(value, list | tuple) else [value]
            if _key(place) in _SIZES and sides and all(type(side) is int for side in sides):
                return max(sides)
        return None

    def under(self, names: Iterable[str]) -> str:
        """The prefix under which all of `names` lie, and nothing else does; RecordError says which name is missing.

        What lies beside the prefix, like an optimiser's tensors, does not matter. Names decide, never positions.
        """
        names = list(names)
        found = {place[: -len(names[0])] for place in self.tensors if f".{place}".endswith(f".{names[0]}")}
        if not found:
            raise RecordError(f"{self.path} has no {names[0]!r}, which the network begins with")
        wanted, faults, fitting = {*names}, [], []
        for prefix in sorted(found, key=len):
            inside = {place.removeprefix(prefix) for place in self.tensors if place.startswith(prefix)}
            lacks, more = wanted - inside, inside - wanted
            if not lacks and not more:
                fitting.append(prefix)
            fault, name = ("lacks", min(lacks)) if lacks else ("has an unknown", min(more, default=""))
            faults.append((len(lacks) + len(more), f"{self.path} {fault} {prefix + name!r}"))
        if len(fitting) > 1:
            raise SeveralError(self.path, fitting)
        if not fitting:
            raise RecordError(f"{min(faults)[1]}: its names are not those of the network, {len(names)} tensors")
        return fitting[0]

    def of(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the network whose state dict is `own`, in its order and types.

        RecordError for another name, shape or kind of number, and for values that are not finite.
        """
        prefix = self.fitting(own)
        try:
            return {name: fit(self.tensors[prefix + name], tensor, name, FLOATS) for name, tensor in own.items()}
        except RecordError as error:
            raise RecordError(f"{self.path}: {error}") from None

    def fitting(self, own: Mapping[str, Tensor]) -> str:
        """The prefix of the network whose state dict is `own`, by names and shapes; RecordError says what differs."""
        prefix = self.under(own)
        for name, tensor in own.items():
            if (got := self.tensors[prefix + name].shape) != tensor.shape:
                raise RecordError(
                    f"{self.path}: {prefix}{name} has shape {list(got)}, but the network has {list(tensor.shape)}"
                )
        return prefix

    def packed(self, prefix: str) -> bytes:
        """The tensors under `prefix` as safetensors, named without it; RecordError if safetensors cannot hold them."""
        chosen = {place.removeprefix(prefix): v for place, v in self.tensors.items() if place.startswith(prefix)}
        try:
            return safetensors.torch.save({name: value.contiguous().clone() for name, value in chosen.items()})
        except (KeyError, ValueError, RuntimeError, safetensors.SafetensorError) as error:  # a type or name it lacks
            raise RecordError(f"safetensors cannot hold it ({ascii(str(error))[1:-1][:100]})") from None


def _key(place: str) -> str:
    return place.split(".")[-1].lower()


def _names(value: Any) -> list[str] | None:
    """Class names in the order of their numbers, from a list, {name: number} or {number: name}; None for all else."""
    if isinstance(value, dict):
        pairs = [(key, name) if isinstance(name, str) else (name, key) for key, name in value.items()]
        if sorted(str(number) for number, _ in pairs) != sorted(map(str, range(len(pairs)))):
            return None
        value = [name for _, name in sorted(pairs, key=lambda pair: int(pair[0]))]
    if not isinstance(value, list | tuple) or len(value) < 2 or not all(isinstance(name, str) for name in value):
        return None
    return list(value) if len({*value}) == len(value) else None


def fit(value: Tensor, own: Tensor, name: str, floats: Iterable[torch.dtype] = NARROW) -> Tensor:
    """`value`, dense and of the shape of `own`, in the type of `own`.

    Any of `floats` stands for floats; for all else the types have to be equal. RecordError says what is wrong.
    """
    types = tuple(floats) if own.is_floating_point() else (own.dtype,)
    if value.dtype not in types:
        raise RecordError(f"{name} has type {value.dtype}, allowed is {' or '.join(map(str, types))}")
    value = value.to(own.dtype).contiguous()
    if not bool(torch.isfinite(value).all()) or (name.endswith("running_var") and bool((value < 0).any())):
        raise RecordError(f"{name} holds a value that is not finite (NaN or infinity), or a negative variance")
    return value


def file_format(path: Path, raw: bytes) -> str:
    """The format of a file that may be harmful or damaged; "" for none that is known here."""
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

    Nothing in it is run. `raw` is the file's content where it has been read. RecordError, in one line, for anything
    that cannot be read so.
    """
    raw = torch_file.content(path) if raw is None else raw
    kind = file_format(path, raw)
    if kind == SAFE:
        return _safetensors(path, raw)
    if kind == ONNX:
        return _onnx(path, raw)
    content, digest = torch_file.load(path, raw)
    walk = _Walk(path, VALUES)
    walk.over(content, "", 0)
    return Weights(path, kind, digest, walk.tensors, walk.facts)


@dataclass
class _Walk:
    """Over everything in a file.

    Args:
        path: of the file.
        left: values that may still come.
        tensors: those found so far.
        facts: as in `Weights`.
    """

    path: Path
    left: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def over(self, value: Any, place: str, depth: int) -> None:
        """Everything in `value`, which is found at `place`."""
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise RecordError(f"{self.path} holds too much, or parts of it hold themselves; save a state dict alone")
        if _key(place) in _FACTS:
            self.facts[place] = value.values.tolist() if isinstance(value, torch_file.Array) else value
        if isinstance(value, Tensor):
            self.tensors[place or "tensor"] = _plain(value, place, self.path)
        elif isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                if isinstance(key, str | int):
                    self.over(inner, f"{place}.{key}" if place else str(key), depth + 1)


def dense(value: Any) -> Tensor | None:
    """The tensor alone, for the file may have given the object attributes of its own; None unless dense, on the CPU."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        return None
    return Tensor.detach(value)


def _plain(given: Tensor, place: str, path: Path) -> Tensor:
    if (value := dense(given)) is None:
        raise RecordError(f"{path}: {place[:100]!a} is no dense tensor on the CPU; save a state dict of such")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RecordError(f"{path}: {place[:100]!a} claims shape {list(value.shape)[:8]}, but holds fewer values")
    return value


def _safetensors(path: Path, raw: bytes) -> Weights:
    try:
        tensors = safetensors.torch.load(raw)
    except Exception as error:  # a header that is no UTF-8, an unknown type, an offset outside
        raise RecordError(f"{path} cannot be read: {ascii(str(error))[1:-1][:160]}") from None
    return Weights(path, SAFE, hashlib.sha256(raw).hexdigest(), tensors)


def _onnx(path: Path, raw: bytes) -> Weights:
    try:
        import onnx
    except ModuleNotFoundError:
        raise RecordError(f"{path} is an ONNX file; reading those needs: pip install -e '.[onnx]'") from None
    tensors = {}
    try:
        model = onnx.load_from_string(raw)
        for tensor in model.graph.initializer:
            if tensor.external_data:
                raise RecordError(f"{path}: {tensor.name[:100]!a} lies in another file, which is not opened")
            tensors[tensor.name] = torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy())
    except RecordError:
        raise
    except Exception as error:  # protobuf and numpy have their own
        raise RecordError(f"{path} cannot be read: {ascii(str(error))[1:-1][:160]}") from None
    return Weights(path, ONNX, hashlib.sha256(raw).hexdigest(), tensors)
