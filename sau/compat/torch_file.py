"""Reading untrusted files of `torch.save`: nothing in them is run.

`torch.load(weights_only=True)` calls only functions on a list. `ALLOWED` adds what ordinary checkpoints hold beside
tensors: numpy arrays, paths, an argparse.Namespace and the like. The names lead to stand-ins that copy values: numpy's
own dtype can be put into states that numpy takes on trust (an int64 that claims to hold objects).
"""

import io
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from sau.errors import RecordError, printable
from sau.files import read

LARGEST = 8 << 30  # bytes of a file, which is read into memory whole
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch before 1.6 pickles first
ZIP = b"PK\x03\x04"
_NUMBERS = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()


class ProgramError(RecordError):
    """A file wants to import a function or class that weights do not need, or is a program (TorchScript)."""


class Inert(dict[str, Any]):
    """Stands in for an object that weights do not need: takes any arguments, holds attributes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.update(state)


class _Type:
    """Stands in for numpy.dtype; `dtype` is None for one of anything but numbers, like text or objects."""

    dtype: np.dtype[Any] | None = None

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if self.code in _NUMBERS:
            if tuple(state[2:8]) != (None, None, None, -1, -1, 0):
                raise ValueError("a numpy dtype of numbers that claims to hold something else")
            self.dtype = np.dtype(self.code).newbyteorder(state[1])


class Array:
    """Stands in for numpy.ndarray: `values` is a copy, or array(None) where it does not hold numbers."""

    values: np.ndarray = np.array(None)

    def __init__(self, *args: Any) -> None:  # __setstate__ follows
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        content = content.encode("latin1") if isinstance(content, str) else content  # bytes written by Python 2
        if kind.dtype is not None:
            self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _scalar(kind: Any, content: Any) -> Any:
    return Inert() if kind.dtype is None else np.frombuffer(content, kind.dtype)[0].item()


# Stand-ins, each for these names; pathlib's second module is that of Python 3.13.
_STAND_INS: dict[Any, str] = {
    Inert: """
        argparse.Namespace builtins.dict builtins.float builtins.int builtins.list builtins.str builtins.slice
        datetime.date datetime.datetime datetime.timedelta torch.torch_version.TorchVersion types.SimpleNamespace
        pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath
        pathlib._local.PosixPath pathlib._local.PurePosixPath pathlib._local.WindowsPath pathlib._local.PureWindowsPath
    """,
    Array: "numpy.ndarray numpy.core.multiarray._reconstruct numpy._core.multiarray._reconstruct",
    _scalar: "numpy.core.multiarray.scalar numpy._core.multiarray.scalar",
    _Type: "numpy.dtype",
    (lambda *args: {}): "collections.defaultdict",  # its items follow
}
ALLOWED: list[Any] = [(thing, name) for thing, names in _STAND_INS.items() for name in names.split()]


def content(path: Path) -> bytes:
    """A file's bytes; RecordError if it cannot be read, or is what a failed download leaves in its place."""
    try:
        raw = read(path, LARGEST)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    if not raw:
        raise RecordError(f"{path} is empty (0 bytes); copy or download it again")
    if raw.startswith(b"version https://git-lfs"):
        raise RecordError(f"{path} is a Git LFS pointer, not the file itself; run: git lfs pull")
    if raw[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise RecordError(f"{path} is a saved web page, not the file itself; download the file that it links to")
    return raw


def load(path: Path, raw: bytes) -> Any:
    """What `raw`, the content of a file of `torch.save`, holds, with stand-ins for what is no tensor or plain value;
    nothing of it is run. ProgramError if it imports what is not on the list, or is TorchScript; RecordError if it is
    damaged (files of torch before 1.6 have no checksums) or of another format."""
    try:
        if raw.startswith(ZIP):
            _check_archive(raw)
        elif not raw.startswith(b"\x80"):
            raise ValueError("it is no file of torch.save; save the network's state_dict with torch.save")
        with safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sparse tensors and the like, which are refused later
            return torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except ProgramError as error:
        raise ProgramError(f"{path} {error}") from None
    except Exception as error:  # torch and zipfile raise a dozen types on damaged files
        text = str(error)
        if name := re.search(r"GLOBAL (\S+)", text):
            wanted = f"{path} wants to import {name[1][:100]}, which weights do not need; nothing of it was run"
            raise ProgramError(f"{wanted}; if you made it, save model.state_dict() alone with torch.save") from None
        cause = re.search(r"WeightsUnpickler error: *(.*)", text)  # it follows advice to run the file
        line = printable(cause[1] if cause else text.split("\n")[0])[:160]
        raise RecordError(f"{path} cannot be read: {line or type(error).__name__}") from None


def _check_archive(raw: bytes) -> None:
    """Refuse an archive by its table of contents: ProgramError, ValueError, or what zipfile raises."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        if any("/code/" in name or name.endswith("/constants.pkl") for name in archive.namelist()):
            raise ProgramError("is TorchScript, a program; save the network's state_dict with torch.save")
        if sum(member.file_size for member in archive.infolist()) > len(raw):
            raise ValueError("its archive declares more bytes than the file has")
        if (bad := archive.testzip()) is not None:  # torch does not compare checksums
            raise ValueError(f"the checksum of {ascii(bad)[:60]} differs; copy or download the file again")
