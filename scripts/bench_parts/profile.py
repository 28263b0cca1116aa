"""Where the time goes: the share of each kind of operation in a work."""

import warnings
from fnmatch import fnmatchcase
from typing import Any

import torch
from bench_parts.measure import Work
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from sau.runtime.device import keep_memory

# The first fit counts; whole names of torch's operations, or patterns.
KINDS: dict[str, str] = {
    "convolution, backward": "*convolution_backward ConvolutionBackward0",
    "convolution, forward": "convolution _convolution mkldnn_convolution cudnn_convolution conv2d",
    "batch norm": "*batch_norm *batch_norm_backward *BatchNormBackward0",
    "matrix products": "addmm mm linear bmm matmul",
    "optimiser": "_fused_sgd_ _fused_adam_ _fused_adamw_ _foreach* Optimizer*",
    "ReLU, addition, other arithmetic":
        "add add_ relu relu_ clamp* threshold_backward mul mul_ div div_ sub sub_ sum where sign neg",
    "pictures: gather, pad": "index index_put_ _index_put_impl_ gather constant_pad_nd randint randperm fill_",
    "copies, change of precision": "copy_ _to_copy to empty* zero_ zeros* cat clone contiguous resize_",
}  # fmt: skip


def kind(key: str) -> str:
    """The kind of an operation by the profiler's name for it, like `aten::addmm`."""
    name = key.split("::")[-1].split(": ")[-1].split("#")[0]
    fits = (kind for kind, names in KINDS.items() if any(fnmatchcase(name, pattern) for pattern in names.split()))
    return next(fits, "everything else")


def shares(work: Work, device: torch.device) -> dict[str, float]:
    """Percent of the time of `work` that each kind of operation takes by itself; on CUDA of the device's time."""
    cuda = device.type == "cuda"
    work()  # warms up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, about devices that are not there
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
            work()
    spent: dict[str, float] = {}
    for event in found.key_averages():
        if event.device_type == DeviceType.CPU:  # a kernel is an event of its own, too, and counts for its operation
            took = event.self_device_time_total if cuda else event.self_cpu_time_total
            spent[kind(event.key)] = spent.get(kind(event.key), 0.0) + took
    total = sum(spent.values()) or 1.0  # a profiler that may not look at the card sees nothing
    return {name: round(100 * took / total, 1) for name, took in sorted(spent.items(), key=lambda item: -item[1])}


def add(row: dict[str, Any], name: str, work: Work, device: torch.device) -> None:
    """Print where the time of `work`, which is ours, goes, and put it into its row."""
    keep_memory()
    row["profile"] = shares(work, device)
    print(f"{name}: " + ", ".join(f"{kind} {share:.1f} %" for kind, share in row["profile"].items()))
