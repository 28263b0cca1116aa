"""One process at a time uses a result folder.

The lock is a file beside the folder, `.NAME.lock`, held with `filelock` (flock). The system releases it when the
process dies, also on kill -9. The empty file stays: deleting it would let two processes lock two files of one name.
"""

import fcntl
import os
from pathlib import Path

from filelock import FileLock, Timeout

from sau.errors import LockedError, os_error
from sau.files import open_regular

WAIT = 0.5  # seconds that `acquire` waits, longer than `in_use` takes
_locks: dict[Path, FileLock] = {}  # of the folders that this process has locked


def acquire(folder: Path) -> bool:
    """Lock `folder` for this process; False if this process has it already.

    Raises:
        LockedError: another process uses it.
        RecordError: the lock file cannot be written, or is a link.
    """
    key = _resolve(folder)
    if key in _locks:
        return False
    try:
        key.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_lock_file(key), timeout=WAIT, thread_local=False)
        lock.acquire()
    except Timeout:
        raise LockedError(f"{folder} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise os_error(error, f"cannot lock {folder}: {error.strerror}") from None
    _locks[key] = lock
    return True


def release(folder: Path) -> None:
    """Unlock `folder`, if this process has it."""
    if lock := _locks.pop(_resolve(folder), None):
        lock.release()


def release_all() -> None:
    """Unlock every folder that this process has."""
    for folder in list(_locks):
        release(folder)


def in_use(folder: Path) -> bool:
    """Whether a process, this one included, uses `folder`; a folder that can only be read is probed, too."""
    try:
        file = open_regular(_lock_file(folder), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise os_error(error, f"cannot read the lock of {folder}: {error.strerror}") from None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def first() -> Path | None:
    """The folder that this process locked first: that of the run, not of a trigger made for it."""
    return next(iter(_locks), None)


def _resolve(folder: Path) -> Path:
    return Path(os.path.realpath(folder.parent)) / folder.name  # Path.resolve raises on circular links


def _lock_file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"
