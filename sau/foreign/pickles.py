"""Which functions a file's pickles would import, found by reading their opcodes; nothing is run.

`torchfile` decides by a list of what is allowed while it reads. This is the other half: the names of everything that
an ordinary reader would import, also in files that are refused.
"""

import io
import pickletools
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import count, islice
from typing import Any

from torch import _weights_only_unpickler as torchs

from sau.foreign import torchfile
from sau.foreign.archive import holds_program

UNKNOWN = "a name put together on the stack"
MALFORMED = "what follows bytes that only other readers understand"
OPCODES = 20_000_000  # of one file; a list of 110,000 pictures takes 3 million
LEGACY_PICKLES = 5  # of a file of torch before 1.6: magic number, version, system, content, names of its storages
MOST = 1_000  # different names of a file that are looked at; those that may pass are some hundred
SPARSE = 1 << 16  # bytes of a sparse member of a tar archive, which may claim any size; torch wrote none
UNSURE = 1_000_000  # opcodes of what may be a text; each costs a microsecond
_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_KEEP = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


def allowed() -> set[str]:
    """The names that reading with `torchfile` lets pass: torch's own list, and ours for lists of pictures."""
    return {*torchs._get_allowed_globals(), *(name for _, name in torchfile.ALLOWED)}


def imports(raw: bytes) -> list[str]:
    """The dotted names that the pickles in a file would import, each once, in their order.

    Looks into torch's zip files (every member that is a pickle), torch's older format, tar archives and bare pickles.
    A name that is not written down but computed comes as `UNKNOWN`. What is certainly a pickle and cannot be followed
    to its end, though there is more of it, ends in `MALFORMED`, for other readers may go on; of one that is cut off
    there are the names up to there. What may be anything, as of protocol 0, counts only if it comes to an end. What
    looks like safetensors counts up to where it is no pickle, for a file can be made to be both.
    """
    names: dict[str, None] = {}
    with suppress(Exception):  # zipfile and tarfile raise a dozen types; reading such a file says what is wrong with it
        for content, pickles in _pickles(raw):
            tensors = _is_safetensors(content)
            if pickles or _looks_pickled(content) or tensors or _ends(content):
                for name in _names(content, pickles, 2 if tensors else 0):
                    names.setdefault(name)
                    if len(names) > MOST:
                        return [*names, UNKNOWN]
    return list(names)


def _pickles(raw: bytes) -> Iterator[tuple[bytes, int]]:
    """Every part that may be pickled, and how many pickles at least follow each other in it, if it is one; 0 where it
    may be anything. Other things may come behind them, as storages do."""
    if raw[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(raw)) as archive:
            for member in archive.infolist():
                if member.file_size > max(len(raw), 1 << 20):
                    continue  # compressed beyond measure; such an archive is refused anyway
                member.CRC = None  # type: ignore[assignment]  # torch reads members whose sum is wrong, too
                content = b""
                with suppress(Exception):  # as above; the others can be read nevertheless
                    content = archive.read(member)
                if member.filename.endswith(".pkl") or _looks_pickled(content):
                    yield content, int(member.filename.endswith(".pkl"))  # a storage may look like one by chance
    elif raw[257:262] == b"ustar":
        with tarfile.open(fileobj=io.BytesIO(raw)) as archive:
            for entry in archive:
                file = archive.extractfile(entry) if entry.isreg() else None
                if file is not None:
                    yield file.read(SPARSE if entry.issparse() else -1), 0
    elif raw.startswith(torchfile.LEGACY):
        yield raw, LEGACY_PICKLES
    else:  # one of protocol 0 begins with any letter, and safetensors with any byte
        yield raw, int(_looks_pickled(raw) and not _is_safetensors(raw))


def _is_safetensors(content: bytes) -> bool:
    return content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content)


def _ends(content: bytes) -> bool:
    """Whether what may be a pickle of protocol 0, which begins with any letter, comes to an end before long."""
    with suppress(Exception):  # see `_names`
        return sum(1 for _ in islice(pickletools.genops(content), UNSURE)) < UNSURE
    return False


def _looks_pickled(content: bytes) -> bool:
    return len(content) > 2 and content[0] == 0x80 and 2 <= content[1] <= 5


def _names(content: bytes, pickles: int, first: int) -> Iterator[str]:
    """Of every import its name. A computed one among the `first` opcodes has nothing that it could be computed from,
    and is a length or a number that looks like one."""
    stream, seen = io.BytesIO(content), 0
    for number in count(1):
        if stream.tell() == len(content):
            return
        memo: dict[Any, str | None] = {}
        pushed: list[str | None] = []  # what the last opcodes pushed, as far as it is known
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                seen += 1
                if seen > OPCODES:
                    yield UNKNOWN
                    return
                name = opcode.name
                if name in ("GLOBAL", "INST"):
                    yield str(argument).replace(" ", ".", 1)
                elif seen <= first:
                    pass
                elif name == "STACK_GLOBAL":
                    yield ".".join(map(str, pushed[-2:])) if len(pushed) > 1 and None not in pushed[-2:] else UNKNOWN
                elif name.startswith("EXT"):
                    yield UNKNOWN  # a number in a table of the process that reads it
                if name in _KEEP:
                    memo[len(memo) if argument is None else argument] = pushed[-1] if pushed else None
                elif name in _TEXT:
                    pushed = [*pushed[-1:], str(argument)]
                elif name in ("GET", "BINGET", "LONG_BINGET"):
                    pushed = [*pushed[-1:], memo.get(argument or 0)]
                elif name != "FRAME":
                    pushed = []
        except Exception:  # pickletools raises half a dozen types on what is no pickle, as raw storages are not
            if number <= pickles and stream.tell() < len(content):
                yield MALFORMED
            return


def scripted(raw: bytes) -> bool:
    """Whether a file is a zip archive with TorchScript, a program, in it."""
    with suppress(Exception), zipfile.ZipFile(io.BytesIO(raw)) as found:  # see `imports`
        return holds_program(found.namelist())
    return False
