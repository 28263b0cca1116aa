"""Random number generators of a run, whose results depend on the seed alone; numbers and tables as text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import torch

from sau.errors import printable, require

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


def duration(seconds: float) -> str:
    """Like 45 s, 12 min or 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def short(value: float) -> str:
    """A whole number as one, anything else with four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def at_most(bound: float) -> str:
    """The largest number of four digits that is not above `bound`, which is above 0."""
    text = f"{bound:.4g}"
    return text if float(text) <= bound else f"{bound - 10.0 ** (math.floor(math.log10(bound)) - 3) / 2:.4g}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. Names in it may be a stranger's, so signs of its own and of HTML are written out."""
    plain = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|"})
    lines = [[printable(text).translate(plain) for text in line] for line in (head, *body)]
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(head), "|\n", *rows[1:]])


def marked(name: str, selection: str | None) -> str:
    """The name of a defense, marked where test data chose something of it: `selection` is a summary's."""
    return f"{name} (oracle)" if selection == "oracle" else name
