"""Where a script computes: the flags that say so, and what they come to."""

import argparse
import sys

import torch

from sau.machine.device import choose_device, fallback, prepare, set_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--device` and `--threads`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or one like cuda:1 [auto]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 means all cores [0]")


def settle(asked: argparse.Namespace) -> torch.device:
    """Use as many threads as asked for; returns the device, and warns where it is another one than was asked for."""
    set_threads(asked.threads)
    where = prepare(choose_device(asked.device))
    if elsewhere := fallback(asked.device):
        print(f"warning: {elsewhere}", file=sys.stderr)
    return where
