"""The result folders that this process writes to: one process at a time has a folder, and may begin it again."""

import atexit
from pathlib import Path

from sau.lock import Lock

_held: dict[Path, Lock] = {}


def hold(folder: Path) -> bool:
    """Take `folder` by a lock file beside it; whether it was not this process's before.

    LockedError names who else has it. A process that was killed has nothing any more.
    """
    place = _real(folder)
    if place in _held:
        return False
    lock = Lock(place.parent / f".{place.name}.lock", str(folder))
    lock.acquire()
    _held[place] = lock
    return True


def give_back(folder: Path) -> None:
    """Let others have `folder`, if this process has it."""
    if (lock := _held.pop(_real(folder), None)) is not None:
        lock.release()


@atexit.register
def _give_all_back() -> None:
    for lock in _held.values():
        lock.release()


def _real(folder: Path) -> Path:
    return folder.parent.resolve() / folder.name
