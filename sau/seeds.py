"""Where methods draw from, so that they depend on the seed alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch

from sau.errors import require

RngState = dict[str, Any]  # where torch's global generators stand


def generator(seed: int) -> torch.Generator:
    """A generator of its own."""
    return torch.Generator().manual_seed(seed)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation, on the CPU, so that its numbers depend on no device."""
    return generator((seed * 1_000_003 + epoch) % 2**63)


def check_seed(seed: Any, end: int = 2**63) -> None:
    """ConfigError unless it is a whole number from 0 to below `end`."""
    require("seed", seed, isinstance(seed, Integral) and 0 <= int(seed) < end, f"a whole number from 0 to {end - 1}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, torch's global generator starts from `seed`; outside it goes on as if nothing had been drawn."""
    check_seed(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # left out, it warns of many
        torch.manual_seed(seed)
        yield


def get_rng_state() -> RngState:
    """Where torch's global generators stand."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(place: RngState) -> None:
    """Let them go on from there; a run may go on where more or fewer devices are seen."""
    torch.set_rng_state(place["cpu"])
    for device, state in zip(range(torch.cuda.device_count()), place["cuda"], strict=False):
        torch.cuda.set_rng_state(state, device)
