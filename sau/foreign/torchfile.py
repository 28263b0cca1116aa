"""Opening a `.pt` file that somebody else made, without running anything in it.

torch's restricted unpickler (`weights_only=True`) calls only functions on a list. BackdoorBench's files need numpy and,
if pictures were kept in memory, Pillow on that list, under their names in numpy 1 and in numpy 2. The
names are those; what they lead to here are stand-ins that check and copy, because a file can bring numpy's own dtype
objects into states that numpy takes on trust (an int64 type that claims to hold Python objects).
"""

import hashlib
import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import _weights_only_unpickler as torchs
from torch.serialization import safe_globals

from sau.errors import RecordError, quoted
from sau.files import read
from sau.foreign import archive
from sau.foreign.restraint import Few, restrained

LARGEST = 2 << 30  # bytes of a file; the largest network of the benchmark has 1.2 GB
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch before 1.6 pickles first
_TYPES = ("f8", "i8", "i4")  # i4 is what numpy 1 makes of int on Windows


class Picture:
    """A Pillow picture from a file: `pixels` is uint8 [H, W, 3]; ValueError if it is not RGB or its size is wrong."""

    pixels: np.ndarray = np.zeros((0, 0, 3), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, mode, (width, height), _, content = state
        if mode != "RGB":
            raise ValueError(f"a picture has mode {quoted(mode)}, allowed is RGB")
        self.pixels = np.frombuffer(content, np.uint8).reshape(height, width, 3)


class _Type:
    """A numpy dtype from a file: plain numbers in little-endian order."""

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        if code not in _TYPES:
            raise ValueError(f"a numpy array of {quoted(code)}, allowed are {', '.join(_TYPES)}")
        self.code: str = code

    def __setstate__(self, state: Any) -> None:
        if tuple(state) != (3, "<", None, None, None, -1, -1, 0):
            raise ValueError("a numpy dtype that is not a plain little-endian one")


class Vector:
    """A numpy array of one dimension from a file, as `values`; ValueError for anything else."""

    values: np.ndarray = np.zeros(0)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, _, content = state
        if len(shape) != 1:
            raise ValueError(f"a numpy array of {len(shape)} dimensions, allowed is one")
        values = np.frombuffer(content, np.dtype("<" + kind.code))
        if len(values) != shape[0]:
            raise ValueError("a numpy array of another length than it claims")
        self.values = values


def _array(kind: Any, shape: Any, code: Any) -> Vector:
    return Vector()  # its content follows in __setstate__


def _scalar(kind: Any, content: Any) -> int | float:
    (value,) = np.frombuffer(content, np.dtype("<" + kind.code)).tolist()
    return value


ALLOWED: list[Any] = [
    (Vector, "numpy.ndarray"),
    (_Type, "numpy.dtype"),
    (Picture, "PIL.Image.Image"),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def content(path: Path) -> bytes:
    """A file's bytes; RecordError if it cannot be read, is no plain file or is larger than `LARGEST`."""
    try:
        return read(path, LARGEST)
    except OSError as error:
        raise RecordError(f"{path} {_reason(error)}") from None


def load(path: Path, old: bool = False, raw: bytes | None = None) -> tuple[Any, str]:
    """What a torch zip file holds, numpy's vectors as `Vector`, and the SHA-256 of the file.

    The archive is checked before anything in it is read, by `archive.check`. The whole file, at most `LARGEST` bytes,
    is in memory while it is read, beside its content. `old` lets the format of torch before 1.6 pass too, which has no
    sums: damage to a weight in it is not noticed. `raw` is the file's content where it has been read.

    Raises:
        RecordError: in one line, for a file that is too large, damaged, of another format, or that asks for a function
            outside the list; nothing of it has run.
    """
    raw = content(path) if raw is None else raw
    try:
        if not (old and raw.startswith(LEGACY)):
            archive.check(raw)
        with safe_globals(ALLOWED), Few(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, like sparse tensors, is refused later
            if raw.startswith(LEGACY):
                with restrained(len(raw)):
                    _check_legacy(raw)
            with restrained(len(raw)):
                found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise a dozen types on damaged files
        raise RecordError(f"{path} {_reason(error)}") from None
    return found, hashlib.sha256(raw).hexdigest()


def _check_legacy(raw: bytes) -> None:
    """Refuse a file of torch before 1.6 without content for a storage: whatever was in that memory would be weights.

    It is pickles one after the other, the fourth with what was saved, the fifth with the names of the storages that
    follow. torch fills those that are named; here the names have to be those of all that the fourth makes.
    """
    stream, sizes = io.BytesIO(raw), dict[str, int]()

    def storage(saved: Any) -> Any:
        _, kind, name, _, count, _ = saved
        sizes[name] = count * kind.dtype.itemsize
        if not 0 <= sizes[name] <= len(raw):
            raise ValueError(f"a storage of it claims {sizes[name]:,} bytes, more than the file has")
        empty = torch.UntypedStorage(sizes[name], device="meta")
        return torch.storage.TypedStorage(wrap_storage=empty, dtype=kind.dtype, _internal=True)

    readers = [torchs.Unpickler(stream, encoding="utf-8") for _ in range(5)]
    readers[3].persistent_load = storage  # type: ignore[method-assign]
    *_, named = (reader.load() for reader in readers)
    if sorted(named) != sorted(sizes) or sum(sizes.values()) > len(raw):
        raise ValueError("some of its storages have no content in it")


def _reason(error: Exception) -> str:
    """One printable line, from texts that may be long and may quote the file."""
    if isinstance(error, OSError):
        return f"cannot be read: {error.strerror or error}"
    text = str(error)
    if wanted := re.search(r"GLOBAL (\S+)", text):
        name = ascii(wanted[1])[1:-1][:100]
        return f"asks for {name}, which weights and lists of pictures do not need; it is refused, nothing of it was run"
    found = re.search(r"WeightsUnpickler error: *(.*)", text)  # after torch's advice to run the file
    line = ascii(found[1] if found else text.split("\n")[0])[1:-1][:160]
    if type(error) in (ValueError, zipfile.BadZipFile):
        return f"cannot be read: {line}"
    return f"cannot be read: its content is damaged or not from torch.save ({type(error).__name__}: {line})"
