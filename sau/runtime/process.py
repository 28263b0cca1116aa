"""What a process may use, and what one that works for another needs; without torch, which takes seconds to import."""

import os
import time
from contextlib import suppress
from pathlib import Path

import sau


def available_memory() -> int:
    """Bytes of memory that this process may use: of the machine, or the limit of its control group (version 2)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # no control groups, or "max"
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        limits.append(int(Path(f"/sys/fs/cgroup{group}/memory.max").read_text()))
    return min(limits)


def python_path() -> str:
    """The PYTHONPATH of a process that is to import this library from where it is."""
    home = str(Path(sau.__file__).parents[1])
    return os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])


def outlive(parent: int) -> None:
    """Wait until the process `parent`, which started this one, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
