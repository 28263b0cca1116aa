"""Checkpoints in memory, and runs that break off at one."""

import io
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sau.defense import Defense
from sau.loop import RunContext

NEVER, ALWAYS = 1e9, -1.0  # seconds between two checkpoints inside an epoch


class Tape:
    """A checkpoint in memory, through the same serialisation as a record's."""

    def __init__(self) -> None:
        self.content: bytes | None = None

    def save(self, place: dict[str, Any]) -> None:
        buffer = io.BytesIO()
        torch.save(place, buffer)
        self.content = buffer.getvalue()

    def load(self) -> dict[str, Any] | None:
        return None if self.content is None else torch.load(io.BytesIO(self.content), weights_only=True)


class Stopping(Tape):
    """Breaks the run off after so many saves; what was saved goes on being there."""

    def __init__(self, saves: int) -> None:
        super().__init__()
        self.left = saves

    def save(self, place: dict[str, Any]) -> None:
        super().save(place)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def resumed(defense: Defense, net: nn.Module, data: Any) -> Iterator[tuple[nn.Module, list[str]]]:
    """For every checkpoint of a run: what comes out when it is stopped there and resumed, and what was said then."""
    for n in itertools.count(1):
        tape, said = Stopping(n), []
        try:
            defense.purify(net, data, session=RunContext(checkpoint=tape, say=said.append, save_every=ALWAYS))
            return
        except KeyboardInterrupt:
            said.clear()
        torch.manual_seed(n)  # whatever was drawn in between
        again = RunContext(checkpoint=tape, say=said.append, save_every=ALWAYS)
        yield defense.purify(net, data, session=again), said
