"""The most that the device does: operations a second of large matrix products and convolutions, in this very run."""

import argparse

import torch
import torch.nn.functional as F
from bench_parts.measure import Work, interleaved

TRIES, CALLS = 5, 3
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peaks(args: argparse.Namespace) -> dict[str, float]:
    """Operations a second by precision: the better of a matrix product and a 3x3 convolution, each at its best try."""
    found = {}
    for name, dtype in PRECISIONS.items():
        product, convolution = (
            _rate(*_product(args.device, dtype), args),
            _rate(*_convolution(args.device, dtype), args),
        )
        found[name] = max(product, convolution)
        print(f"peak {name}: matrix product {product / 1e9:,.0f}, convolution {convolution / 1e9:,.0f} GFLOP/s")
    return found


def _product(device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def _convolution(device: torch.device, dtype: torch.dtype) -> tuple[Work, int]:
    n, channels, size = 1024 if device.type == "cuda" else 16, 256, 16
    x = torch.randn(n, channels, size, size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1), 2 * n * size**2 * channels**2 * 9


def _rate(work: Work, operations: int, args: argparse.Namespace) -> float:
    work()
    often = argparse.Namespace(repeats=TRIES, device=args.device, clock=args.clock)
    seconds = interleaved({"work": lambda: lambda: [work() for _ in range(CALLS)]}, often)["work"]
    return CALLS * operations / min(seconds)
