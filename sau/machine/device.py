"""The machine: which device, how many threads, which precision, how much memory was used."""

import platform
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from sau.errors import ConfigError
from sau.evaluate import predict
from sau.machine import cores

CPU = Path("/proc/cpuinfo")
MOST = 1024  # threads


def choose_device(wish: str) -> torch.device:
    """The device that `wish` names; `auto` is CUDA where there is one. ConfigError if this machine does not have it."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        raise ConfigError(f"device is {wish!r}, allowed is auto, cpu, cuda or one like cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {wish!r}, but torch finds no CUDA device here; allowed is auto or cpu")
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"device is {wish!r}; this machine has cpu and {torch.cuda.device_count()} cuda devices")
    return device


def prepare(where: torch.device) -> torch.device:
    """Make it the device of this process. CUDA then searches for its fastest convolutions: batches have few sizes."""
    if where.type == "cuda":
        torch.cuda.set_device(where.index or 0)  # or what names no device, like pinned memory, would open the first one
    torch.backends.cudnn.benchmark = where.type == "cuda"
    return where


def set_threads(wish: int, earlier: int | None = None) -> int:
    """Use `wish` CPU threads, or if it is 0 those of `cores.threads(earlier)`; returns how many are used.

    It is for the process of a command: what the networks free it keeps until it ends, see `cores.keep_memory`.
    """
    if not 0 <= wish <= MOST:
        raise ConfigError(f"threads is {wish}, allowed is 0 (OMP_NUM_THREADS, or the free cores) to {MOST}")
    torch.set_num_threads(wish or cores.threads(earlier))
    cores.keep_memory()
    return torch.get_num_threads()


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 arithmetic: NVIDIA cards from Ampere on, and CPUs with AVX-512 BF16, AMX or Arm's
    BF16 (read in /proc/cpuinfo, so on Linux alone)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with suppress(OSError):  # no such file on other systems
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(CPU.read_text().split())
    return False


def processor(device: torch.device) -> str:
    """The name of the processor or card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in CPU.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def seconds_per_image(model: nn.Module, shape: Sequence[int], device: torch.device) -> float:
    """Seconds that an answer to a picture takes, to forecast evaluations."""
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
