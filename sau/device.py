"""The device and its threads, precision and memory."""

import ctypes
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import joblib
import torch
from torch import nn

from sau.errors import ConfigError, require
from sau.evaluate import predict

CPU_INFO, MEMORY_INFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
MAX_THREADS = 1024
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # what glibc's malloc.h calls these settings


def choose_device(wish: str) -> torch.device:
    """The device that `wish` names; `auto` is CUDA where there is one. ConfigError if this machine does not have it."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cards = torch.cuda.device_count()
    try:
        device = torch.device(wish)
        there = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < cards)
    except RuntimeError:  # no kind of device
        there = False
    if not there:
        raise ConfigError(f"device is {wish!r}; allowed are auto, cpu, and cuda:N of the {cards} CUDA devices here")
    return device


def prepare(device: torch.device) -> torch.device:
    """Make it the device of this process. CUDA then searches for its fastest convolutions: batches have few sizes."""
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)  # else pinned memory would open the first device
    torch.backends.cudnn.benchmark = device.type == "cuda"
    return device


def set_threads(wish: int, earlier: int | None = None) -> int:
    """Use `wish` CPU threads in this process, and return how many are used.

    0 means OMP_NUM_THREADS, or `earlier`, the number that an interrupted run began with (other numbers round
    differently), or all cores that this process may use, by affinity and control group.
    """
    require("threads", wish, 0 <= wish <= MAX_THREADS, f"0 (OMP_NUM_THREADS, or all cores) to {MAX_THREADS}")
    variable = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()  # a list is for nested teams
    environment = int(variable) if variable.isdecimal() else 0
    torch.set_num_threads(wish or environment or earlier or joblib.cpu_count())
    # Keep freed memory, as the next update needs as much again. glibc hands large pieces back to the system, which
    # clears and maps each page again: a tenth of the time of wide networks in fp32. Other C libraries have no mallopt.
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)
    return torch.get_num_threads()


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: NVIDIA cards from Ampere on, and CPUs with AVX-512 BF16, AMX or Arm's
    BF16 (read in /proc/cpuinfo, so on Linux alone)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with suppress(OSError):  # no such file on other systems
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(CPU_INFO.read_text().split())
    return False


def seconds_per_image(model: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """Seconds of a forward pass an image, to forecast evaluations."""
    x = torch.rand(250, *shape, device=device)
    predict(model, x)
    started = time.monotonic()
    predict(model, x)
    return (time.monotonic() - started) / len(x)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far: of the device's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def free_memory(device: torch.device) -> float:
    """Bytes that new tensors may take: of the device on CUDA, elsewhere of the machine, and no more than its container
    may have (infinity but on Linux)."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + held)
    free = math.inf
    with suppress(OSError, KeyError):
        figures = dict(line.split(":") for line in MEMORY_INFO.read_text().splitlines())
        free = 2**10 * float(figures["MemAvailable"].split()[0])
    return min(free, memory_limit())


def memory_limit() -> float:
    """Bytes that the control group (version 2) of this process may have, as in a container; infinity without one."""
    with suppress(OSError, ValueError):  # no control groups, or "max"
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        return float(Path(f"/sys/fs/cgroup{group}/memory.max").read_text())
    return math.inf
