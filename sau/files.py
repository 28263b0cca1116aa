"""Names of folders, reading, atomic writing, checksums: nothing lands outside its root, nothing is half-written."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any, TypeGuard

from sau.errors import DataError, FaultError, RecordError, os_error

MOST = 10**12  # of any figure in a file; seconds and megabytes come nearest
SMALL = 16 << 20  # bytes of a text of a record; 100,000 places of clean pictures take one
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_HALF = re.compile(r"\..+\.(yaml|jsonl|json|bin|safetensors|pt)\.[a-z0-9_]{8}")  # as `write` calls them


def safe_join(root: str | Path, *names: str) -> Path:
    """`root/name/...`; RecordError if a name could lead out of what it lies in, or is no plain folder name."""
    path = Path(root)
    for name in names:
        if not _NAME.fullmatch(name) or name.endswith("."):
            raise RecordError(
                f"folder name {name[:120]!r}; allowed are up to 100 letters, digits, '.', '_' and '-' after the first, "
                "and no '.' at the end"
            )
        base, path = path, path / name
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(base):
            raise RecordError(f"{path} is a link that leads out of {base}; name a real folder")
    return path


def open_regular(path: Path, flags: int) -> int:
    """The descriptor of a plain file, opened with `flags`; OSError for a FIFO or a device, which could take for ever.

    Who writes to a file that may have come from others asks for O_NOFOLLOW: a link would lead to any file of the user.
    """
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is no plain file")
    return file


def read(path: Path, most: int = SMALL) -> bytes:
    """The content of a file that may have come from others; OSError if it is no plain one or has over `most` bytes."""
    with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > most else file.read(size + 1)
    if max(size, len(content)) > most:
        raise OSError(errno.EFBIG, f"it has {max(size, len(content)):,} bytes, allowed are {most:,}")
    return content


def mistaken(content: bytes) -> str:
    """What a file is that users often have in place of the one they wanted; "" if it is none of these."""
    if not content:
        return "is empty (0 bytes); copy or download it again"
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run: git lfs pull"
    if content.lstrip(b"\xef\xbb\xbf \t\r\n")[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a saved web page (HTML), not the file itself; download the file that the page links to"
    return ""


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is an int or a float that a figure of ours can be: finite, and of no more than thirteen digits."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def parse_json(content: str | bytes) -> Any:
    """What JSON that may have come from others says; ValueError if it is none, or none that can be read."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object that a small JSON file holds; OSError or ValueError if it cannot be read, or holds something else."""
    content = parse_json(read(path))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, allowed is an object")
    return content


def append(path: Path, text: str) -> None:
    """Add to the end of a text, which is made if need be; OSError if it is a link or no plain file."""
    with os.fdopen(open_regular(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW), "a") as file:
        file.write(text)


def temp_files(place: Path) -> list[Path]:
    """What writes that were killed left in a folder."""
    there = place.iterdir() if place.is_dir() else ()
    return [file for file in there if _HALF.fullmatch(file.name) and file.is_file() and not file.is_symlink()]


def clear(place: Path, first: str, last: str) -> None:
    """Empty a folder, so that whoever finds it half empty knows by what goes `first` and `last` how it stands."""
    for entry in sorted(place.iterdir(), key=lambda entry: (entry.name == last, entry.name != first)):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def existing(root: str | Path, target: str) -> Path:
    """A folder name below `root`, or any folder written as a path; RecordError if it is neither."""
    name = target.rstrip(os.sep)
    if os.sep in target and Path(target).is_dir():
        return Path(target)
    if os.sep in name:
        raise RecordError(f"there is no folder {target}; allowed is a name below {root}, or the path of a folder")
    return safe_join(root, name)


def write(path: Path, content: bytes) -> None:
    """All of `content` or nothing: temporary file, flush to disk, rename. RecordError if the disk is full."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(next(place for place in path.absolute().parents if place.exists())).free
            raise FaultError(
                f"no room for {path}: {len(content):,} bytes needed, {free:,} free; free some and start again to resume"
            ) from None
        raise os_error(error, f"cannot write {path}: {error}") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """The SHA-256 of a file that is given as data; DataError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
