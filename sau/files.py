"""Names of folders, atomic writing, checksums: nothing lands outside its root, nothing is ever half-written."""

import errno
import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from sau.errors import DataError, RecordError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def folder(root: str | Path, name: str) -> Path:
    """`root/name`; RecordError if the name could lead out of the root or is no plain folder name."""
    base = Path(root)
    if not _NAME.fullmatch(name) or name.endswith("."):
        raise RecordError(
            f"folder name {name[:120]!r}; allowed are up to 100 letters, digits, '.', '_' and '-' after the first"
        )
    path = base / name
    if path.resolve().parent != base.resolve():
        raise RecordError(f"{path} is a link that leads out of {base}; name a real folder")
    return path


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
            free = shutil.disk_usage(path.parent).free
            raise RecordError(
                f"no room for {path}: {len(content):,} bytes needed, {free:,} free; free some and start again to resume"
            ) from None
        raise RecordError(f"cannot write {path}: {error}") from None
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
