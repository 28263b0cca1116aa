"""The tensors of anybody's file, whatever its format, and the network among them."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sau.errors import RecordError
from sau.foreign import torchfile as foreign

ZIP, LEGACY, SAFE, ONNX = "torch zip archive", "torch before 1.6", "safetensors", "ONNX"


@dataclass(frozen=True, eq=False)
class Weights:
    """What a file holds.

    Args:
        path: of the file.
        kind: its format, one of `ZIP`, `LEGACY`, `SAFE`, `ONNX`.
        digest: SHA-256 of the file.
        tensors: its tensors by their places in it, joined by dots: `state_dict.model.conv1.weight`.
        texts: its texts by their places, like `clean_data` in BackdoorBench's files.
    """

    path: Path
    kind: str
    digest: str
    tensors: dict[str, Tensor]
    texts: dict[str, str]

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
            raise RecordError(f"{self.path} holds the network {len(fitting)} times: under {', '.join(fitting)!r}")
        if not fitting:
            raise RecordError(f"{min(faults)[1]}: its names are not those of the network, {len(names)} tensors")
        return fitting[0]

    def of(self, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the network whose state dict is `own`, in its order; RecordError for another name or shape."""
        prefix = self.under(own)
        for name, tensor in own.items():
            if (got := self.tensors[prefix + name].shape) != tensor.shape:
                raise RecordError(
                    f"{self.path}: {prefix}{name} has shape {list(got)}, but the network has {list(tensor.shape)}"
                )
        return {name: self.tensors[prefix + name] for name in own}


def read(path: Path, raw: bytes | None = None) -> Weights:
    """Read a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.onnx` file; its content tells the format, not its name.

    Nothing in it is run. `raw` is the file's content where it has been read. RecordError, in one line, for anything
    that cannot be read so.
    """
    raw = foreign.content(path) if raw is None else raw
    if raw[8:9] == b"{":
        return _safetensors(path, raw)
    if raw[:1] == b"\x08" and path.suffix == ".onnx":  # a protobuf has no mark of its own
        return _onnx(path, raw)
    content, digest = foreign.load(path, old=True, raw=raw)
    tensors: dict[str, Tensor] = {}
    texts: dict[str, str] = {}
    _flatten(content, "", tensors, texts, path)
    return Weights(path, LEGACY if raw.startswith(foreign.LEGACY) else ZIP, digest, tensors, texts)


def _flatten(value: Any, place: str, tensors: dict[str, Tensor], texts: dict[str, str], path: Path) -> None:
    if isinstance(value, Tensor):
        tensors[place or "tensor"] = _plain(value, place, path)
    elif isinstance(value, str):
        texts[place] = value[:200]
    elif isinstance(value, dict | list | tuple) and place.count(".") < 50:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str | int):
                _flatten(inner, f"{place}.{key}" if place else str(key), tensors, texts, path)


def _plain(value: Tensor, place: str, path: Path) -> Tensor:
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        raise RecordError(f"{path}: {place[:100]!a} is no dense tensor on the CPU; save a state dict of such")
    value = Tensor.detach(value)  # the file may have given the object attributes of its own
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RecordError(f"{path}: {place[:100]!a} claims shape {list(value.shape)[:8]}, but holds fewer values")
    return value


def _safetensors(path: Path, raw: bytes) -> Weights:
    try:
        tensors = safetensors.torch.load(raw)
    except Exception as error:  # a header that is no UTF-8, an unknown type, an offset outside
        raise RecordError(f"{path} cannot be read: {ascii(str(error))[1:-1][:160]}") from None
    return Weights(path, SAFE, hashlib.sha256(raw).hexdigest(), tensors, {})


def _onnx(path: Path, raw: bytes) -> Weights:
    try:
        import onnx
    except ModuleNotFoundError:
        raise RecordError(f"{path} is an ONNX file; reading those needs: pip install 'sau[onnx]'") from None
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
    return Weights(path, ONNX, hashlib.sha256(raw).hexdigest(), tensors, {})
