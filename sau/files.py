"""Folder names that stay below their root, reading of untrusted files, atomic writing, SHA-256, locks on folders."""

import errno
import hashlib
import json
import os
import re
import stat
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, TypeGuard

from filelock import FileLock, Timeout

from sau.errors import DataError, LockedError, RecordError, os_error

MOST = 10**12  # of any figure in a file; seconds and megabytes come nearest
SMALL = 16 << 20  # bytes of a text file of a record
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_PARTIAL = ".partial"  # ends the names of the temporary files that `write` makes


def safe_join(root: str | Path, *names: str) -> Path:
    """`root/name/...`; RecordError for a name that is not a plain folder name, and for a link out of its folder."""
    path = Path(root)
    for name in names:
        if not _NAME.fullmatch(name) or name.endswith("."):
            allowed = "up to 100 letters, digits, '.', '_' and '-' after the first, and no '.' at the end"
            raise RecordError(f"folder name {name[:120]!r}; allowed are {allowed}")
        base, path = path, path / name
        if os.path.dirname(os.path.realpath(path)) != os.path.realpath(base):
            raise RecordError(f"{path} is a link that leads out of {base}; name a real folder")
    return path


def existing(root: str | Path, target: str) -> Path:
    """A folder name below `root`, or any folder given as a path; RecordError if it is neither."""
    if os.sep in target and Path(target).is_dir():
        return Path(target)
    name = target.rstrip(os.sep)
    if os.sep in name:
        raise RecordError(f"there is no folder {target}; allowed is a name below {root}, or the path of a folder")
    return safe_join(root, name)


def read(path: Path, most: int = SMALL) -> bytes:
    """An untrusted file's content; OSError if it is not regular (a FIFO could block) or has more than `most` bytes."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file")
        if found.st_size > most:
            raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, allowed are {most:,}")
        return file.read()


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value from JSON is a finite number that a figure of ours can be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; OSError, ValueError or RecursionError if there is none."""
    content = json.loads(read(path))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, allowed is an object")
    return content


def append(path: Path, text: str) -> None:
    """Add text to the end of a file, which is made if need be; RecordError if it cannot be written or is a link, which
    in an untrusted folder may lead to any file of the user."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        with open(file, "a", errors="backslashreplace") as log:  # a file name in the text need not be text
            log.write(text)
    except OSError as error:
        raise os_error(error, f"cannot write {path}: {error.strerror}") from None


def temp_files(folder: Path) -> list[Path]:
    """The temporary files that a killed `write` left in a folder."""
    return [file for file in folder.glob(f".*{_PARTIAL}") if file.is_file() and not file.is_symlink()]


def write(path: Path, content: bytes) -> None:
    """Write all of `content` or nothing: temporary file, flush to disk, rename. RecordError if the disk is full."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL, delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
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


# Locks. One process at a time uses a result folder: the lock is a file beside it, `.NAME.lock`, which the system
# releases when the process dies, also on kill -9. The file stays: deleting it would let two processes lock two files.

_locks: dict[Path, FileLock] = {}  # that this process has, by their files


def acquire(folder: Path, wait: float = 0.5) -> None:
    """Lock `folder` for this process, which may have it already. LockedError if another process still uses it after
    `wait` seconds, longer than `in_use` takes; RecordError if the lock file cannot be written, or is a link."""
    file = _lock_file(folder)
    if file in _locks:
        return
    lock = FileLock(file, thread_local=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(wait)
    except Timeout:
        raise LockedError(f"{folder} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise os_error(error, f"cannot lock {folder}: {error.strerror}") from None
    _locks[file] = lock


def release(folder: Path) -> None:
    """Unlock `folder`, if this process has it."""
    if lock := _locks.pop(_lock_file(folder), None):
        lock.release()


def release_all() -> None:
    """Unlock every folder that this process has."""
    while _locks:
        _locks.popitem()[1].release()


def in_use(folder: Path) -> bool:
    """Whether a process, this one included, uses `folder`; of another user's lock it cannot be told, so False."""
    file = _lock_file(folder)
    if file in _locks or not os.access(file, os.W_OK):
        return file in _locks
    try:
        acquire(folder, wait=0.0)
    except LockedError:
        return True
    release(folder)
    return False


def _lock_file(folder: Path) -> Path:
    return Path(os.path.realpath(folder.parent)) / f".{folder.name}.lock"  # Path.resolve raises on circular links
