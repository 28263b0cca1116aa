"""Opening a torch file that somebody else made, without running anything in it.

`torch.load(weights_only=True)` calls only functions on a list. Ordinary checkpoints also hold numpy arrays, paths,
an argparse.Namespace and the like, so their names are added to that list (`ALLOWED`). What the names lead to here are
stand-ins that copy values and run nothing: numpy's own dtype, for one, can be brought into states by a file that numpy
takes on trust (an int64 type that claims to hold Python objects).
"""

import builtins
import hashlib
import io
import pickletools
import re
import sys
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from sau.errors import RecordError, short_repr
from sau.files import mistaken, read

LARGEST = 8 << 30  # bytes of a file; it is read into memory whole
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch before 1.6 pickles first
ZIP = b"PK\x03\x04"
_PLAIN = "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split()
_STANDARD = {*sys.stdlib_module_names, *IMPORT_MAPPING}  # of Python 3, and of 2, whose names are in files
_PLACES = ("state_dict", "model_state_dict", "model", "net", "network", "weights")  # where checkpoints keep weights


class ProgramError(RecordError):
    """A file asks for a function or class that weights do not need, or holds a program."""


class Inert:
    """In place of an object that weights do not need: takes any arguments and any state, and holds nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class Namespace(dict[str, Any]):
    """In place of argparse.Namespace and types.SimpleNamespace: its attributes as a dictionary."""

    def __setstate__(self, state: Any) -> None:
        self.update(state)


class Picture:
    """A Pillow image from a file: `pixels` is uint8 [H, W, 3]; ValueError if it is not RGB or its size is wrong."""

    pixels: np.ndarray = np.zeros((0, 0, 3), np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, mode, (width, height), _, content = state
        if mode != "RGB":
            raise ValueError(f"an image has mode {short_repr(mode)}, allowed is RGB")
        self.pixels = np.frombuffer(content, np.uint8).reshape(height, width, 3)


class _Type:
    """A numpy dtype from a file; `dtype` is None for one that does not hold plain numbers, like text or objects."""

    dtype: np.dtype[Any] | None = None

    def __init__(self, code: Any, align: Any = False, copy: Any = True) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if self.code in _PLAIN:
            if tuple(state[2:8]) != (None, None, None, -1, -1, 0):
                raise ValueError("a numpy dtype of numbers that claims to hold something else")
            self.dtype = np.dtype(self.code).newbyteorder(state[1])


class Array:
    """A numpy array from a file: `values` is a copy, or an array of the one object None where it holds no numbers."""

    values: np.ndarray = np.array(None)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        if kind.dtype is not None:
            self.values = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if fortran else "C")


def _array(kind: Any, shape: Any, code: Any) -> Array:
    return Array()  # its content follows in __setstate__


def _scalar(kind: Any, content: Any) -> Any:
    return Inert() if kind.dtype is None else np.frombuffer(content, kind.dtype)[0].item()


def _path(*parts: str) -> str:
    return str(PurePosixPath(*parts))


def _dict(*args: Any) -> dict[Any, Any]:
    return {}  # of a defaultdict; its items follow


def _list(*args: Any) -> list[Any]:
    return []  # of a deque; its items follow


_INERT = """
builtins.bool builtins.dict builtins.float builtins.frozenset builtins.int builtins.list builtins.range builtins.slice
builtins.str builtins.tuple datetime.date datetime.datetime datetime.time datetime.timedelta datetime.timezone
decimal.Decimal fractions.Fraction random.Random uuid.UUID torch.torch_version.TorchVersion
numpy.random._pickle.__bit_generator_ctor numpy.random._pickle.__generator_ctor
numpy.random._pickle.__randomstate_ctor numpy.random._mt19937.MT19937 numpy.random._pcg64.PCG64
numpy.random._pcg64.PCG64DXSM numpy.random._philox.Philox numpy.random._sfc64.SFC64
numpy.random.bit_generator.SeedSequence numpy.random.bit_generator.__pyx_unpickle_SeedSequence
""".split()
_PATHS = [
    f"pathlib{part}.{pure}{system}Path"
    for part in ("", "._local")
    for pure in ("", "Pure")
    for system in ("Posix", "Windows")
]
ALLOWED: list[Any] = [
    *((Inert, name) for name in _INERT),
    *((_path, name) for name in _PATHS),
    *((Namespace, name) for name in ("argparse.Namespace", "types.SimpleNamespace")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_dict, "collections.defaultdict"),
    (_list, "collections.deque"),
    (Array, "numpy.ndarray"),
    (_Type, "numpy.dtype"),
    (Picture, "PIL.Image.Image"),
]


def content(path: Path) -> bytes:
    """A file's bytes; RecordError if it cannot be read, is not a regular file, or is no file of weights at a glance."""
    try:
        raw = read(path, LARGEST)
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}") from None
    if what := mistaken(raw[:200]):
        raise RecordError(f"{path} {what}")
    return raw


def load(path: Path, raw: bytes | None = None) -> tuple[Any, str]:
    """What a file of `torch.save` holds, with stand-ins for all that is no tensor or plain value, and its SHA-256.

    `raw` is the file's content where it has been read. The format of torch before 1.6 has no checksums: damage to a
    weight in it is not noticed.

    Raises:
        ProgramError: the file asks for a function or class outside the list, or is TorchScript; nothing of it has run.
        RecordError: the file is damaged or of another format.
    """
    raw = content(path) if raw is None else raw
    try:
        if raw.startswith(ZIP):
            _check_archive(raw)
        elif not raw.startswith(b"\x80"):
            raise ValueError("it is no file of torch.save; save the network's state_dict with torch.save")
        with safe_globals(ALLOWED), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch warns of, like sparse tensors, is refused later
            found = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except ProgramError as error:
        raise ProgramError(f"{path} {error}") from None
    except Exception as error:  # torch and zipfile raise a dozen types on damaged files
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ProgramError(_wants(path, wanted[1], raw)) from None
        raise RecordError(f"{path} cannot be read: {_reason(error)}") from None
    return found, hashlib.sha256(raw).hexdigest()


def _check_archive(raw: bytes) -> None:
    """Refuse an archive by its table of contents: ProgramError, ValueError, or what zipfile raises."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = archive.namelist()
        if any("/code/" in name or name.endswith("/constants.pkl") for name in names):
            raise ProgramError("is TorchScript, a program; save the network's state_dict with torch.save")
        pickles = [name for name in names if name.endswith(".pkl")]
        if len(pickles) > 1:
            raise ProgramError(f"holds {len(pickles)} pickles, allowed is one; save the network's state_dict again")
        if not pickles:
            raise ValueError("it is a zip archive, but not of torch.save; unpack it first")
        if len({*names}) < len(names):
            raise ValueError("its archive has two members of one name")
        if sum(member.file_size for member in archive.infolist()) > len(raw):
            raise ValueError("its archive declares more bytes than the file has")
        if (bad := archive.testzip()) is not None:
            raise ValueError(f"the checksum of {ascii(bad)[:60]} differs; copy or download the file again")


def imports(raw: bytes) -> list[str]:
    """The names that the file's pickles import, each once, in their order, by reading their opcodes; nothing is run."""
    names: dict[str, None] = {}
    with suppress(Exception):  # zipfile and pickletools raise a dozen types on damaged files, which `load` refuses
        if raw.startswith(ZIP):
            with zipfile.ZipFile(io.BytesIO(raw)) as archive:
                pickles = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        else:
            pickles = [raw]
        for pickle in pickles:
            stream, texts = io.BytesIO(pickle), [""]
            for _ in range(5 if raw.startswith(LEGACY) else 1):  # number, version, system, content, storages
                for opcode, argument, _ in pickletools.genops(stream):
                    if opcode.name in ("GLOBAL", "INST"):
                        names.setdefault(str(argument).replace(" ", ".", 1))
                    elif opcode.name == "STACK_GLOBAL":
                        names.setdefault(".".join(texts[-2:]))
                    elif isinstance(argument, str):
                        texts.append(argument)
    return list(names)


def _wants(path: Path, name: str, raw: bytes) -> str:
    """The refusal of a file that asks for `name`, with the line that saves its weights alone unless that is harmful."""
    shown = ascii(name)[1:-1][:100]
    text = f"{path} asks for {shown}, which weights do not need; nothing of it was run"
    if name.split(".")[0] in _STANDARD or hasattr(builtins, name):  # torch leaves "builtins." out
        return f"{text}. Do not load it otherwise: it may be harmful"
    key = next((key for key in _PLACES if b"X" + len(key).to_bytes(4, "little") + key.encode() in raw), None)
    get = "" if key is None else f"[{key!r}]"
    get += ".state_dict()" if b"\x08\x00\x00\x00_modules" in raw else ""
    return (
        f'{text}. Only if you trust whoever made it, save the weights alone: python -c "import torch; '
        f"torch.save(torch.load({str(path)!r}, weights_only=False){get}, 'weights.pth')\""
    )


def _reason(error: Exception) -> str:
    """One printable line, from texts that may be long and may quote the file."""
    text = str(error)
    found = re.search(r"WeightsUnpickler error: *(.*)", text)  # after torch's advice to run the file
    line = ascii(found[1] if found else text.split("\n")[0])[1:-1][:160]
    if type(error) in (ValueError, zipfile.BadZipFile):
        return line
    return f"its content is damaged or not from torch.save ({type(error).__name__}: {line})"
