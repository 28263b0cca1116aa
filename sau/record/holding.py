"""The result folders that this process writes to: one process at a time has a folder, and may begin it again."""

import atexit
import os
from contextlib import suppress
from pathlib import Path

from sau.record.lock import Lock

_held: dict[Path, tuple[Lock, bool]] = {}  # and whether the folder around it was made for the lock


def hold(folder: Path) -> bool:
    """Take `folder` by a lock file beside it; whether it was not this process's before.

    LockedError names who else has it. A process that was killed has nothing any more.
    """
    place = _real(folder)
    if place in _held:
        return False
    lock, new = Lock(place.parent / f".{place.name}.lock", str(folder)), not place.parent.exists()
    lock.acquire()
    _held[place] = lock, new
    return True


def give_back(folder: Path) -> None:
    """Let others have `folder`, if this process has it."""
    place = _real(folder)
    if place in _held:
        lock, new = _held.pop(place)
        lock.release()
        if new:
            with suppress(OSError):  # something was written there, as it should be
                place.parent.rmdir()


def first() -> Path | None:
    """The folder that this process took first of those that it has: that of the run, not of a trigger made for it."""
    return next(iter(_held), None)


@atexit.register
def give_all_back() -> None:
    """Let others have every folder that this process has."""
    for place in list(_held):
        give_back(place)


def _real(folder: Path) -> Path:
    return Path(os.path.realpath(folder.parent)) / folder.name  # `resolve` raises where links go in a circle
