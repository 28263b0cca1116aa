"""The machine: which device, how many threads, which precision is faster, how much memory was used."""

import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from sau.errors import ConfigError, lacks_memory
from sau.evaluate import predict
from sau.machine import cores
from sau.machine.captured import capture
from sau.models import Normalized

TRIES = 3  # steps of each precision that are timed
MOST = 1024  # threads


def choose_device(wish: str) -> torch.device:
    """`auto` is CUDA where there is one; CUDA on a machine without falls back to the CPU, as in the benchmark."""
    if wish == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wish)
    except RuntimeError:
        more = f"; several are --device cuda --devices {wish.count(',') + 1}" if "," in wish else ""
        raise ConfigError(f"device is {wish!r}, allowed is auto, cpu, cuda or one like cuda:1{more}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        return torch.device("cpu")
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"device is {wish!r}; this machine has cpu and {torch.cuda.device_count()} cuda devices")
    return device


def prepare(where: torch.device) -> torch.device:
    """Make it the device of this process. CUDA then searches for its fastest convolutions: batches have few sizes."""
    if where.type == "cuda":
        torch.cuda.set_device(where.index or 0)  # or what names no device, like pinned memory, would open the first one
    torch.backends.cudnn.benchmark = where.type == "cuda"
    return where


def fallback(wish: str) -> str | None:
    """What to say where CUDA is wished for and there is none; None where the wish can be met."""
    if choose_device(wish).type == "cuda" or not wish.startswith("cuda"):
        return None
    return f"--device is {wish}, but torch finds no CUDA device here, so the run is on the CPU"


def set_threads(wish: int) -> int:
    """Use `wish` CPU threads, or as many as this process has cores if it is 0; returns how many are used.

    It is for the process of a command: what the networks free it keeps until it ends, see `cores.keep_memory`.
    """
    if not 0 <= wish <= MOST:
        raise ConfigError(f"threads is {wish}, allowed is 0 (all cores) to {MOST}")
    torch.set_num_threads(wish or cores.usable())
    cores.keep_memory()
    return torch.get_num_threads()


def step_seconds(
    model: Normalized, shape: Sequence[int], batch_size: int, device: torch.device,
    precisions: Sequence[bool] = (False, True), captured: bool = False,
) -> dict[bool, float]:  # fmt: skip
    """Seconds a picture that a training step takes, in fp32 (False) and in bf16 (True): the best of a few, in turn; of
    one that CUDA repeats where it is `captured`, else of one that Python launches.

    The step is of `batch_size` pictures on CUDA, where small ones would time the launches, of up to 128 elsewhere, and
    of fewer where memory does not hold them. Weights and statistics are left as they were, gradients are cleared.
    """
    kept = {name: value.clone() for name, value in model.net.state_dict().items()}
    size, seconds = batch_size if device.type == "cuda" else min(batch_size, 128), dict[bool, float]()
    while not seconds:
        try:
            seconds = _best_steps(model, torch.rand(size, *shape, device=device), precisions, captured)
        except RuntimeError as error:
            if size == 1 or not lacks_memory(error):
                raise
            size = -(-size // 2)
        model.zero_grad(set_to_none=True)
    model.net.load_state_dict(kept)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what the probe took is not the run's
    return seconds


def _best_steps(model: Normalized, x: torch.Tensor, precisions: Sequence[bool], captured: bool) -> dict[bool, float]:
    steps: dict[bool, Callable[[], object]] = {amp: partial(_step, model, x, amp) for amp in precisions}
    for amp, step in steps.items():
        step()  # warms up
        if captured:
            with suppress(RuntimeError):  # what cannot be captured will be launched in the run, too
                steps[amp] = capture(step)[1]
    tries: dict[bool, list[float]] = {amp: [] for amp in precisions}
    for _ in range(TRIES):
        for amp, step in steps.items():
            _wait(x)
            started = time.monotonic()
            step()
            _wait(x)
            tries[amp].append(time.monotonic() - started)
    return {amp: min(seconds) / len(x) for amp, seconds in tries.items()}


def processor(device: torch.device) -> str:
    """The name of the processor or card."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
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


def _step(model: Normalized, x: torch.Tensor, amp: bool) -> None:
    model.amp = amp
    model.zero_grad(set_to_none=True)
    F.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long, device=x.device)).backward()


def _wait(x: torch.Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
