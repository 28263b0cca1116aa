"""The limits of a process that opens what it must not trust."""

import math
import resource
from pathlib import Path


def confine(memory: int, seconds: int) -> None:
    """For a process that opens what it must not trust: no file may be written, and at most `memory` bytes and `seconds`
    of computing more be used than so far. Where the system does not count memory (macOS), that limit is not set.
    """
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    used = resource.getrusage(resource.RUSAGE_SELF)  # importing torch may take longer than what is allowed here
    end = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (end, end))
    mapped = Path("/proc/self/statm")
    if mapped.is_file():
        limit = int(mapped.read_text().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
