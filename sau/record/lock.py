"""A lock file that names its holder: pid, host and start; what a dead holder left is taken over."""

import fcntl
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from sau.errors import LockedError, RecordError, in_a_line, unable
from sau.files import descriptor, parsed, read

BEAT = 15.0  # seconds between two signs of life
LEASE = 120.0  # seconds after which a silent holder on another machine counts as dead
AHEAD = 3600.0  # seconds by which the clock of the file may be ahead of this one
LONGEST = 10_000  # bytes of a lock file
_BOOT, _PIDS = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")


@dataclass(frozen=True)
class Holder:
    """Who has a lock.

    Args:
        pid: its process.
        host: name of its machine.
        boot: which boot of the machine, and in which of its tables of processes (containers have their own) `pid`
            stands; empty where the system does not say.
        start: when the process started, as the system counts it, so that a later process of the same pid is another.
        since: when the lock was taken, seconds since 1970.
    """

    pid: int
    host: str
    boot: str
    start: str
    since: float

    def __post_init__(self) -> None:
        """TypeError or ValueError for what no process can have written."""
        kinds = {"pid": int, "host": str, "boot": str, "start": str, "since": float}
        if any(type(getattr(self, name)) is not kind for name, kind in kinds.items()):
            raise TypeError
        if not (0 < self.pid < 1 << 32 and math.isfinite(self.since) and abs(self.since) < 1 << 36):
            raise ValueError

    def __str__(self) -> str:
        since = time.strftime("%F %T", time.localtime(self.since))
        return f"process {self.pid} on {in_a_line(self.host[:100])} since {since}"


class Lock:
    """`with Lock(path):` or `acquire` and `release`; the second taker fails at once.

    On one machine a holder is dead when its process is; on another one, sharing the file system, when it has not
    touched the file for `LEASE` seconds (clocks should agree to a minute). The file system must have flock, which is
    held only while the file is read and written. A holder that was silent so long, like a suspended machine, and finds
    that the lock was taken over, leaves at once: what it would write is somebody else's now.

    Args:
        path: the lock file; its folder is made, and it is gone after `release`.
        what: what it guards, for the error; none means the file itself.
    """

    def __init__(self, path: Path, what: str | None = None) -> None:
        self.path, self.what = path, what or str(path)
        self._mine: Holder | None = None
        self._stop = threading.Event()

    def acquire(self) -> None:
        """Take the lock; LockedError names who has it, RecordError says why there can be no lock."""
        file = _open(self.path, create=True)
        try:
            holder, silent = _read(file), time.time() - os.fstat(file).st_mtime
            if holder is not None and _alive(holder, silent):
                raise LockedError(f"{self.what} is in use by {holder}; wait for it or stop it")
            self._mine = _self()
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(asdict(self._mine)).encode(), 0)
        except OSError as error:
            raise unable(error, f"cannot write {self.path}: {error.strerror}") from None
        finally:
            os.close(file)
        self._stop = threading.Event()
        threading.Thread(target=self._beat, args=(self._stop,), daemon=True).start()

    def release(self) -> None:
        """Give the lock back; a lock that was taken over meanwhile stays with its new holder."""
        self._stop.set()
        with suppress(RecordError):  # the folder is gone, and the lock with it
            file = _open(self.path, create=False)
            try:
                if _read(file) == self._mine:
                    self.path.unlink()
            finally:
                os.close(file)
        self._mine = None

    def _beat(self, stop: threading.Event) -> None:
        while not stop.wait(BEAT):
            with suppress(OSError):
                now = _parse(read(self.path, LONGEST))
                if now not in (None, self._mine) and not stop.is_set():  # what comes after a release is no matter
                    why = LockedError(f"{self.what} was taken over by {now} while this process was silent; it ends")
                    sys.stderr.write(f"error: {why}\n")
                    sys.stderr.flush()
                    os._exit(why.status)  # every file is written whole or not at all
                os.utime(self.path)

    def __enter__(self) -> "Lock":
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder(path: Path) -> Holder | None:
    """Who has the lock `path` now, or None; takes nothing and waits for nobody."""
    try:
        found, silent = _parse(read(path, LONGEST)), time.time() - path.stat().st_mtime
    except OSError:
        return None
    return found if found is not None and _alive(found, silent) else None


def _open(path: Path, *, create: bool) -> int:
    """The file `path` with flock held; a file that was unlinked while we waited is not it any more.

    A link, which a downloaded folder may have in its place, would lead to any file of the user; it is refused.
    """
    try:
        if create:
            path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = descriptor(path, os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if create else 0))
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.path.samestat(os.fstat(file), os.lstat(path)):
                    return file
            except FileNotFoundError:
                pass  # unlinked: the next turn makes a new one, or says that there is none
            except OSError:
                os.close(file)
                raise
            os.close(file)
    except OSError as error:
        raise unable(error, f"cannot lock {path}: {error.strerror}") from None


def _read(file: int) -> Holder | None:
    return _parse(os.pread(file, LONGEST, 0))


def _parse(content: bytes) -> Holder | None:
    try:
        return Holder(**parsed(content))
    except (ValueError, TypeError):
        return None  # empty, or the writer was killed in the middle, or no process wrote it: nobody holds it


def _self() -> Holder:
    boot = _BOOT.read_text().strip() if _BOOT.is_file() else ""
    with suppress(OSError):
        boot += f" {os.readlink(_PIDS)}"
    return Holder(os.getpid(), socket.gethostname(), boot, _start(os.getpid()) or "", time.time())


def _alive(found: Holder, silent: float) -> bool:
    here = _self()
    if (found.host, found.boot) != (here.host, here.boot):
        return -AHEAD < silent < LEASE  # a time to come is another machine's clock; far in it, an archive's
    return _start(found.pid) == found.start


def _start(pid: int) -> str | None:
    """When a process of this machine started; None if there is none, or only its remains."""
    if _BOOT.is_file():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return fields[19] if fields[0] not in "ZX" else None
    same = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}  # whoever asks, and wherever the machine has moved meanwhile
    asked = ["ps", "-o", "lstart=", "-p", str(pid)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False, env=same)
    return done.stdout.strip() or None
