"""The machine: which device, how many threads, which precision is faster, how much memory was used."""

import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sau.errors import ConfigError
from sau.models import Normalized


def choose_device(wish: str) -> torch.device:
    """`auto` is CUDA where there is one; CUDA on a machine without falls back to the CPU, as in the benchmark."""
    if wish == "auto" or (wish.startswith("cuda") and not torch.cuda.is_available()):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise ConfigError(f"device is {wish!r}, allowed is auto, cpu, cuda or one like cuda:1") from None
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"device is {wish!r}; this machine has cpu and {torch.cuda.device_count()} cuda devices")
    return device


def set_threads(wish: int) -> int:
    """Use `wish` CPU threads, or as many as this process has cores if it is 0; returns how many are used."""
    if wish < 0:
        raise ConfigError(f"threads is {wish}, allowed is 0 (all cores) and more")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(wish or cores)
    return torch.get_num_threads()


def bf16_is_faster(model: Normalized, shape: Sequence[int], batch_size: int, device: torch.device) -> bool:
    """Time a few training steps of a copy's size in both precisions; leaves gradients and statistics as they were."""
    kept = {name: value.clone() for name, value in model.net.state_dict().items()}
    x = torch.rand(min(batch_size, 128), *shape, device=device)
    seconds = {}
    for amp in (False, True):
        model.amp = amp
        _step(model, x)
        started = time.monotonic()
        for _ in range(3):
            _step(model, x)
        seconds[amp] = time.monotonic() - started
    model.net.load_state_dict(kept)
    model.zero_grad(set_to_none=True)
    return seconds[True] < seconds[False]


def crowded(threads: int) -> str | None:
    """What to say where others keep the cores busy that `threads` threads are to run on; None where they do not.

    The load is an average over a minute, so one core's worth of it is taken for what has just ended.
    """
    if not hasattr(os, "getloadavg"):
        return None
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load + threads <= cores + 1:
        return None
    return (
        f"{cores} cores have {load:.1f} threads to run and now {threads} more; threads that wait for each other can be "
        "many times slower, so use fewer --threads or wait"
    )


def seconds_per_image(model: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """Seconds that a forward pass costs per picture, to forecast evaluations."""
    x = torch.rand(250, *shape, device=device)
    with torch.no_grad():
        float(model(x).sum())
        started = time.monotonic()
        float(model(x).sum())
    return (time.monotonic() - started) / len(x)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def _step(model: nn.Module, x: torch.Tensor) -> None:
    y = torch.zeros(len(x), dtype=torch.long, device=x.device)
    F.cross_entropy(model(x), y).backward()
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


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
