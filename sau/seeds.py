"""Random number generators of a run: results depend on the seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch

from sau.errors import require

RngState = dict[str, Any]  # of torch's global generators


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation, on the CPU: the same numbers on every device."""
    return generator((seed * 1_000_003 + epoch) % 2**63)


def check_seed(seed: Any, end: int = 2**63) -> None:
    """ConfigError unless the seed is a whole number from 0 to below `end`."""
    require("seed", seed, isinstance(seed, Integral) and 0 <= int(seed) < end, f"a whole number from 0 to {end - 1}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore their state after it."""
    check_seed(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # without `devices` it warns of many
        torch.manual_seed(seed)
        yield


def get_rng_state() -> RngState:
    """The state of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: RngState) -> None:
    """Restore the state; a run may resume with more or fewer CUDA devices."""
    torch.set_rng_state(state["cpu"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)
