"""The processor cores that this process has, and how many of them others keep busy; nothing here needs torch."""

import os
import time
from contextlib import suppress
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time granted in each period, and the period


def usable() -> int:
    """How many cores this process may keep busy: those that it may run on, within what its control group is granted."""
    allowed = len(_places())
    with suppress(OSError, ValueError):  # no such file, or "max" in it, where nothing is limited
        granted, period = map(int, QUOTA.read_text().split())
        allowed = min(allowed, max(1, granted // period))
    return allowed


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


def crowded(threads: int) -> str | None:
    """What to say where others keep the cores busy that `threads` threads are to run on; None where they do not."""
    others, places = busy(), len(_places())
    if others is None or others + threads <= places + 0.5:
        return None
    return (
        f"others keep {others:.1f} of {places} cores busy and now {threads} threads more are to run there; threads "
        "that wait for each other can be many times slower, so use fewer --threads or wait"
    )
