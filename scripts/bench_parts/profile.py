"""Where the time goes: the share of each kind of operation in a work."""

import warnings

import torch
from bench_parts.measure import Work
from torch.profiler import ProfilerActivity, profile

# The first fit counts; names are those of torch's operations.
KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("convolution, backward", ("convolution_backward", "ConvolutionBackward")),
    ("convolution, forward", ("convolution", "conv2d")),
    ("batch norm", ("batch_norm", "BatchNorm")),
    ("optimiser", ("fused_sgd", "fused_adam", "Optimizer", "_foreach")),
    ("ReLU, addition, other arithmetic", ("add", "relu", "clamp", "threshold", "mul", "div", "sub", "sum", "where")),
    ("pictures: gather, pad", ("index", "gather", "pad", "randint", "randperm", "fill")),
    ("copies, change of precision", ("copy", "to", "empty", "zero", "cat", "clone")),
)


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
        took = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = next((kind for kind, parts in KINDS if any(part in event.key for part in parts)), "everything else")
        spent[kind] = spent.get(kind, 0.0) + took
    total = sum(spent.values())
    return {kind: round(100 * took / total, 1) for kind, took in sorted(spent.items(), key=lambda item: -item[1])}
