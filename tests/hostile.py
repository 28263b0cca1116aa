"""Files that would do harm if they were read as pickles usually are."""

import io
import os
import pickle
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.collect_env import run

HERE = "CANARY"
KEYS = ("model_name", "num_classes", "model", "img_size", "clean_data", "bd_train", "bd_test")  # of BackdoorBench


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def in_zip(code: bytes) -> bytes:
    """An archive of torch.save whose pickle is this code; nothing is compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"x": torch.zeros(2)}))) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            ours = member.filename.endswith("data.pkl")
            new.writestr(member.filename, b"\x80\x02" + code + b"." if ours else old.read(member))
    return out.getvalue()


def tarred(command: str) -> bytes:
    """The format of torch 0.1: a tar archive of pickles."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            content = pickle.dumps(Call(os.system, command), protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def deflated(megabytes: int) -> bytes:
    out = io.BytesIO()
    raw = saved({"x": torch.zeros(1)})
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            large = member.filename.endswith("data/0")
            new.writestr(member.filename, bytes(megabytes << 20) if large else old.read(member))
    return out.getvalue()


def touch(canary: Path) -> str:
    return f"touch {canary}"


def false_dtype() -> bytes:
    """An int64 dtype that is told, after an array was made of it, that it holds Python objects."""
    kind = b"cnumpy\ndtype\n(" + text("i8") + b"\x89\x88tRq\x01"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text("b") + b"tR"
    state = b"(K\x01(K\x04th\x01\x89c_codecs\nencode\n(" + text("A" * 32) + text("latin1") + b"tRtb"
    return in_zip(kind + array + state + b"h\x01(K\x03" + text("<") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x3ftb")


def hostile(canary: Path) -> dict[str, tuple[bytes, str]]:
    """Files that do harm to an ordinary reader, most by creating `canary`, and a word of their refusal."""
    command, opening = touch(canary), f"open({str(canary)!r}, 'w')"
    chain = b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(" + text("os") + b"tR" + text("system") + b"tR("
    item = b"coperator\ngetitem\n(cnumpy\n__builtins__\n" + text("eval") + b"tR("
    attribute = b"ctorch.serialization\nos.system\n(" + text(command) + b"tR"
    array = np.array([Call(os.system, command)], dtype=object)
    script = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is said to be on its way out
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), script)
    return {
        "os.system": (saved(Call(os.system, command)), "system"),
        "eval": (saved(Call(eval, opening)), "eval"),
        "getattr chain": (in_zip(chain + text(command) + b"tR"), "getattr"),
        "module attribute": (in_zip(attribute), "torch.serialization.os.system"),
        "object array": (saved({**dict.fromkeys(KEYS), "bd_test": array}), "posix.system"),
        "nested pickle": (saved(Call(pickle.loads, pickle.dumps(Call(os.system, command)))), "loads"),
        "legacy": (saved(Call(os.system, command), _use_new_zipfile_serialization=False), "posix.system"),
        "tar": (tarred(command), "no file of torch.save"),
        "TorchScript": (script.getvalue(), "TorchScript"),
        "whole module": (saved(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear"),
        "deflate bomb": (deflated(200), "declares more bytes than the file has"),
        "false dtype": (false_dtype(), "dtype"),
        "torch.utils": (saved(Call(run, command)), "torch.utils.collect_env.run"),
        "builtins of numpy": (in_zip(item + text(opening) + b"tR"), "operator.getitem"),
    }


EVENTS = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.remove", "os.rename", "subprocess.", "socket.")


def watched(places: list[Path]) -> str:
    """A program that opens each of `places` in turn in three ways and prints what Python's audit hook saw beside
    reading: programs started, sockets, files opened for writing, renamed or removed."""
    return f"""
import sys
from pathlib import Path
from sau.compat import backdoorbench, inspect, torch_file, weights
from sau.errors import RecordError
from sau.models import torchvision_names
torchvision_names()
def watch(event, arguments):
    wrote = event == "open" and isinstance(arguments[1], str) and any(mode in arguments[1] for mode in "wax+")
    if wrote or event.startswith({EVENTS!r}):
        print("event", event, arguments[:1])
sys.addaudithook(watch)
for path in map(Path, {[str(place) for place in places]!r}):
    for read in (lambda path: torch_file.load(path, torch_file.content(path)), weights.read, inspect.inspect):
        try:
            read(path)
        except RecordError as error:
            print("refused", error)
"""
