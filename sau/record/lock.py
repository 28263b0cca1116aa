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
_locks: dict[Path, FileLock] = {}  # the folders that this process uses


def acquire(folder: Path) -> bool:
    """Lock `folder` for this process; False if this process has it already.

    Raises:
        LockedError: another process uses it.
        RecordError: the lock file cannot be written, or is a link.
    """
    place = _place(folder)
    if place in _locks:
        return False
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(_file(place), timeout=WAIT, thread_local=False)
        lock.acquire()
    except Timeout:
        raise LockedError(f"{folder} is in use by another process; wait for it or stop it") from None
    except OSError as error:
        raise os_error(error, f"cannot lock {folder}: {error.strerror}") from None
    _locks[place] = lock
    return True


def release(folder: Path) -> None:
    """Let other processes use `folder`, if this process has it."""
    if lock := _locks.pop(_place(folder), None):
        lock.release()


def release_all() -> None:
    """Release every folder that this process has."""
    for place in list(_locks):
        release(place)


def in_use(folder: Path) -> bool:
    """Whether a process, this one included, uses `folder`; RecordError if that cannot be found out."""
    try:
        file = open_regular(_file(folder), os.O_RDONLY | os.O_NOFOLLOW)
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


def _place(folder: Path) -> Path:
    return Path(os.path.realpath(folder.parent)) / folder.name  # `resolve` raises where links go in a circle


def _file(folder: Path) -> Path:
    return folder.parent / f".{folder.name}.lock"
