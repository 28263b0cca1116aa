"""Timing, counting and memory: what every part of the benchmark measures with."""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sau.runtime.device import MMAP_MAX, TRIM_THRESHOLD, keep_memory, peak_memory_mb

Work = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
REFERENCES = ("released", "reference")  # how names of works in the released order end
MMAP_THRESHOLD = -3  # of glibc's malloc.h
MAPPED = 2  # the bit by which glibc's malloc marks, in the word before it, a piece that is not of the heap
LARGE = 2**25  # bytes of a piece that glibc, as it comes, soon asks the system for
HELD: list[int] = []  # large pieces of the heap that the reference is not to get


@dataclass(frozen=True)
class Task:
    """What several works do alike.

    Args:
        pictures: how many they go through.
        model: the network.
        x: some pictures in [0, 1], to count a forward pass with.
        needed: forward passes a picture without which it cannot be done.
        peak: operations a second of the device by precision; see `roofline.peaks`.
    """

    pictures: int
    model: nn.Module
    x: torch.Tensor
    needed: float
    peak: dict[str, float]


def compare(
    title: str, makers: dict[str, Callable[[], Work]], task: Task, args: argparse.Namespace, unit: str, per: int = 1
) -> list[dict[str, Any]]:
    """A row for each of `makers` but the last, against the last; each name begins with its precision.

    The rows' details have images a second, forward passes made and needed for each picture, the share of the device's
    peak that the convolutions reach, and the most memory.
    """
    *ours, reference = makers
    unit_flops = forward_flops(task.model, task.x)
    facts: dict[str, dict[str, float]] = {}
    for name, make in makers.items():  # these runs also warm everything up
        heap_of(name)
        done = flops(make())
        facts[name] = {
            "passes_per_image": done / unit_flops / task.pictures,
            "passes_needed": task.needed,
            "flops": done,
        }
        facts[name]["peak_mb"] = peak_mb(make(), args.device)
    seconds = interleaved(makers, args)
    for name, fact in facts.items():
        middle = statistics.median(seconds[name])
        fact["images_per_second"] = task.pictures / middle
        fact["share_of_peak"] = fact.pop("flops") / middle / task.peak[name.split()[0]]
        fact["peak_flops"], fact["forward_flops"] = task.peak[name.split()[0]], unit_flops
        print(
            f"{name:24}{fact['images_per_second']:10.1f} images/s{fact['passes_per_image']:8.2f} passes/image"
            f"{100 * fact['share_of_peak']:8.1f} % of the peak{fact['peak_mb']:10.1f} MB at most"
        )
    details = {name: {"ours": facts[name], "reference": facts[reference]} for name in ours}
    return [
        {**row(f"{title}, {name}", seconds[name], seconds[reference], unit, per), "details": details[name]}
        for name in ours
    ]


def interleaved(makers: dict[str, Callable[[], Work]], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each work in each repetition, the works taking turns so that drifts of the machine meet all alike.

    Args:
        makers: name -> what makes the work anew, untimed, so that every repetition starts from the same state.
        args: `repeats`, how often; `device`, where the work is done, which is waited for; `clock`, wall or cpu.
    """
    now = CLOCKS[args.clock]
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(args.repeats):
        for name, make in makers.items():
            heap_of(name)
            work = make()
            _wait(args.device)
            started = now()
            work()
            _wait(args.device)
            seconds[name].append(now() - started)
    return seconds


def heap_of(name: str) -> None:
    """Treat freed memory as this work's program does: ours keeps it; the released one leaves glibc as it comes, which
    soon sends pieces above 32 MB, and what is free at the end of the heap above 64 MB, back to the system. It does not
    get what ours kept, either."""
    glibc = ctypes.CDLL(None)
    while HELD:
        glibc.free(ctypes.c_void_p(HELD.pop()))
    if keep_memory() and name.endswith(REFERENCES):
        for setting, value in ((MMAP_MAX, 65536), (MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, 2 * LARGE)):
            glibc.mallopt(setting, value)
        _trim()
        _hold(glibc)


def _hold(glibc: ctypes.CDLL) -> None:
    """Take the large pieces that are free inside the heap, below something that lives: trimming clears their pages, but
    leaves them to whoever asks next. Nothing is written to them, so they cost no memory."""
    glibc.malloc.restype = ctypes.c_void_p
    while True:
        place = glibc.malloc(ctypes.c_size_t(LARGE))
        if not place or ctypes.c_size_t.from_address(place - ctypes.sizeof(ctypes.c_size_t)).value & MAPPED:
            glibc.free(ctypes.c_void_p(place))
            return
        HELD.append(place)


class Count(TorchDispatchMode):
    """Adds up operations by torch's formulas. Its own counter would also keep the graph of every batch until the end,
    which are gigabytes after some hundred updates."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


def flops(work: Work) -> int:
    """Operations of the convolutions and matrix products of `work`, a multiplication and an addition being two.

    Compiled networks are run as they stand, because the operations of compiled code cannot be counted.
    """
    with torch.compiler.set_stance("force_eager"), Count() as counter:
        work()
    return counter.total


def passes(work: Work, model: nn.Module, x: torch.Tensor) -> float:
    """Multiplications of `work`, backward passes included, in units of one forward pass of `model` for one picture."""
    return flops(work) / forward_flops(model, x)


def forward_flops(model: nn.Module, x: torch.Tensor) -> float:
    """Operations of one forward pass of `model` for one picture like those of `x`."""
    with torch.no_grad():
        return flops(lambda: model(x[:1]))


def peak_mb(work: Work, device: torch.device) -> float:
    """Most memory in use during `work`: of the device's allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _trim()  # what works before this one left
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


def _trim() -> None:
    """Hand what is free in the heap back to the system, where the C library can."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda spare: None)(0)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
