"""Time, operations and memory of works."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sau.device import peak_memory_mb

Work = Callable[[], object]
Makers = dict[str, Callable[[], Work]]  # name -> makes the work anew, untimed


def versions(ours: Callable[..., Work], reference: Callable[[], Work]) -> Makers:
    """Our work in bf16 and in fp32 (`amp`), and the released one."""
    return {"bf16": partial(ours, amp=True), "fp32": partial(ours, amp=False), "released": reference}


def compare(
    title: str, makers: Makers, model: nn.Module, x: Tensor, images: int, setting: Any, unit: str, per: int = 1
) -> list[dict[str, Any]]:
    """A row for each of `makers` but the last, against the last.

    `details` of a row are images a second, forward passes an image (a backward pass is two) and the peak of memory.

    Args:
        title: begins the names of the rows.
        makers: of works that all go through the same images.
        model: whose forward pass is the unit of work.
        x: an image [1, C, H, W] to count it with.
        images: how many a work goes through.
        setting: `repeats` and `device`.
        unit: of the seconds, like s/step.
        per: how many of the unit a work has.
    """
    unit_flops = forward_flops(model, x)
    facts: dict[str, dict[str, float]] = {}
    for name, make in makers.items():  # warms up, too
        passes = flops(make()) / unit_flops / images
        facts[name] = {"passes_per_image": passes, "peak_mb": peak_mb(make(), setting.device)}
    seconds = interleaved(makers, setting.repeats, setting.device, warm_up=False)
    for name, fact in facts.items():
        fact["images_per_second"] = images / statistics.median(seconds[name])
        print(
            f"{name:12}{fact['images_per_second']:10.1f} images/s{fact['passes_per_image']:8.2f} passes/image"
            f"{fact['peak_mb']:10.1f} MB at most"
        )
    *ours, reference = makers
    return [
        {**row(f"{title}, {name}", seconds[name], seconds[reference], unit, per),
         "details": {"ours": facts[name], "reference": facts[reference]}}
        for name in ours
    ]  # fmt: skip


def interleaved(makers: Makers, repeats: int, device: torch.device, warm_up: bool = True) -> dict[str, list[float]]:
    """Seconds of each work in each repetition. Works take turns, so that a drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in makers}
    for repeat in range(-warm_up, repeats):
        for name, make in makers.items():
            work = make()
            _wait(device)
            started = time.perf_counter()
            work()
            _wait(device)
            seconds[name] += [time.perf_counter() - started] if repeat >= 0 else []
    return seconds


def row(name: str, ours: list[float], reference: list[float], unit: str, per: int = 1) -> dict[str, Any]:
    """Medians of both, divided by `per`, and of their ratios by repetition, with the range."""
    ratios = [slow / fast for fast, slow in zip(ours, reference, strict=True)]
    return {
        "name": name,
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "ours": statistics.median(ours) / per,
        "reference": statistics.median(reference) / per,
        "unit": unit,
    }


class Count(TorchDispatchMode):
    """Adds up operations by torch's formulas. Torch's own counter keeps the graph of every batch until the end, which
    are gigabytes after some hundred updates."""

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
    """Operations of the convolutions and matrix products of `work`; a multiplication and an addition are two."""
    with torch.compiler.set_stance("force_eager"), Count() as counter:
        work()
    return counter.total


def forward_flops(model: nn.Module, x: Tensor) -> int:
    """Operations of one forward pass of `model` for one image like those of `x`."""
    with torch.no_grad():
        return flops(lambda: model(x[:1]))


def peak_mb(work: Work, device: torch.device) -> float:
    """Most memory in use during `work`: of the device's allocator on CUDA, of the whole process elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # only Linux can reset the peak; elsewhere it is that of the process so far
            Path("/proc/self/clear_refs").write_text("5")
    work()
    _wait(device)
    return peak_memory_mb(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
