"""The command line of tools: flags by their whole names, one line for a mistake, and where a tool computes."""

import argparse
from typing import Any, NoReturn

import torch

from sau.device import choose_device, prepare, set_threads


class Parser(argparse.ArgumentParser):
    """Shows `description`, the docstring of a tool, as it stands; a mistake is a line and exit status 2."""

    def __init__(self, description: str | None = None, **given: Any) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False, **given)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see {self.prog} --help\n")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or one like cuda:1 [auto]")
    threads = "CPU threads; 0 means OMP_NUM_THREADS where it is set, else all cores [0]"
    parser.add_argument("--threads", type=int, default=0, help=threads)


def use_device(asked: argparse.Namespace) -> torch.device:
    """Set the number of threads and return the device; ConfigError if this machine does not have it."""
    set_threads(asked.threads)
    return prepare(choose_device(asked.device))
