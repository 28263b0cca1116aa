"""The cores and the memory that this process may use, and how busy others keep the cores; nothing here needs torch."""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import joblib

GROUPS, MEMBER = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # all control groups, and which are this process's
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # what glibc's malloc.h calls these settings


def usable() -> int:
    """Cores that this process may use, by affinity and control groups."""
    return joblib.cpu_count()


def free() -> int:
    """Cores of those that other processes do not keep busy at this moment, at least 1."""
    return max(1, min(usable(), int(len(_places()) - (busy() or 0.0) + 0.5)))


def threads(earlier: int | None = None) -> int:
    """CPU threads of a run that names no number: OMP_NUM_THREADS, or `earlier`, or the free cores.

    `earlier` is the number that an interrupted run began with: other numbers round differently.
    """
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested teams
    return int(first) if first.isdecimal() and int(first) else earlier or free()


def memory() -> int:
    """Bytes of memory that this process may use: of the machine, within what its control group is granted."""
    allowed = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for group in _groups("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            with suppress(OSError, ValueError):  # no such file, or "max" in it, where nothing is limited
                allowed.append(int((group / name).read_text()))
    return min(allowed)


def keep_memory() -> bool:
    """Have this process keep what it frees, for its next update wants as much again.

    By default glibc hands large pieces back to the system, and every page of one that it asks for again is cleared and
    mapped anew, a tenth of the time of wide networks in fp32. False, and nothing done, where another C library is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(MMAP_MAX, 0) and mallopt(TRIM_THRESHOLD, -1))


def _groups(controller: str) -> Iterator[Path]:
    """The control groups of this process for a controller, of either version of Linux's, and all that those lie in."""
    with suppress(OSError):
        for line in MEMBER.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            root = GROUPS / controller if controllers else GROUPS
            parts = [part for part in place.split("/") if part not in ("", "..")]
            yield from (root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))


def busy(seconds: float = 0.2) -> float | None:
    """How many of the cores that this process may run on are busy while it sleeps; None where no system says so."""
    try:
        before = _spent()
        time.sleep(seconds)
        after = _spent()
    except OSError:
        return None
    spans = [(idle - before[core][0], total - before[core][1]) for core, (idle, total) in after.items()]
    return sum(1 - idle / max(1, total) for idle, total in spans)


def _spent() -> dict[str, tuple[int, int]]:
    """Time of each core so far: idle, and in all."""
    mine = {f"cpu{place}" for place in _places()}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return {row[0]: (int(row[4]) + int(row[5]), sum(map(int, row[1:9]))) for row in rows if row[0] in mine}


def _places() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def taken(threads: int) -> str | None:
    """What to say where others keep the cores busy that `threads` threads are to run on; None where they do not."""
    others, places = busy(), len(_places())
    if others is None or others + threads <= places + 0.5:
        return None
    return f"others keep {others:.1f} of {places} cores busy"


def crowded(threads: int) -> str | None:
    """The same of the threads of one run, which wait for each other; None of a single one."""
    said = taken(threads) if threads > 1 else None
    return said and (
        f"{said}, and this run wants {threads} threads; threads that wait for "
        "each other can be many times slower: try --threads 1, or wait"
    )
