"""Timing, counting and memory: what every part of the benchmark measures with."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sau.device import peak_memory_mb

Work = Callable[[], object]


def interleaved(makers: dict[str, Callable[[], Work]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each work in each repetition, the works taking turns so that drifts of the machine meet all alike.

    Args:
        makers: name -> what makes the work anew, untimed, so that every repetition starts from the same state.
        repeats: how often.
        device: where the work is done; it is waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(repeats):
        for name, make in makers.items():
            work = make()
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            seconds[name].append(time.perf_counter() - started)
    return seconds


def passes(work: Work, model: nn.Module, x: torch.Tensor) -> float:
    """Multiplications of `work`, backward passes included, in units of one forward pass of `model` for one picture."""
    with FlopCounterMode(display=False) as unit, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as total:
        work()
    return total.get_total_flops() / unit.get_total_flops() * len(x)


def peak_mb(work: Work, device: torch.device) -> float:
    """Most memory in use during `work`: of the device's allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # only Linux forgets the peak; elsewhere the peak so far is all there is
            Path("/proc/self/clear_refs").write_text("5")
    work()
    _wait(device)
    return peak_memory_mb(device)


def row(name: str, ours: list[float], reference: list[float], unit: str, per: int = 1) -> dict[str, Any]:
    """Medians of both, each divided by `per`, and of their ratios by repetition with its range."""
    ratios = [slow / fast for fast, slow in zip(ours, reference, strict=True)]
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "ours": statistics.median(ours) / per,
        "reference": statistics.median(reference) / per,
        "unit": unit,
        "low": min(ratios),
        "high": max(ratios),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
