"""A step that CUDA records once and then repeats as one thing (a CUDA graph), so that Python launches nothing."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sau.descent import Descent
from sau.errors import first_line

StatefulStep = Callable[[dict[str, Any], Tensor, Tensor], dict[str, Tensor]]
SHAPES = 4  # of batches, each of which keeps the memory of a step


@dataclass
class _Recording:
    """What one shape of batch is repeated with: the batch and the report have their places in memory."""

    x: Tensor
    y: Tensor
    report: dict[str, Tensor]
    replay: Callable[[], None]


@dataclass
class Recorded:
    """`step`, which must make one update of `state["descent"]`: the first batch of each shape goes through Python, then
    the step is recorded with its shape, and later ones are replayed.

    What is replayed is the work of the device and nothing else. So a step that drew random numbers on the CPU, that
    reads the device (which CUDA does not record), or whose optimiser takes its rate from Python is not recorded; nor is
    one whose network is told not to be (`Normalized.recorded`) or has graphs of its own.

    Args:
        step: (state, x, y) -> what to report.
        state: of the step.
        say: prints a line.
        off: whether no update is recorded; set where one cannot be.
        recordings: by the shapes of the batch.
    """

    step: StatefulStep
    state: dict[str, Any]
    say: Callable[[str], None]
    off: bool = False
    recordings: dict[tuple[Any, ...], _Recording] = field(default_factory=dict)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update; what is reported holds until the next one."""
        if self.off or not self._may(x):
            return self.step(self.state, x, y)
        known = self.recordings.get((x.shape, y.shape))
        if known is not None:
            return self._repeat(known, x, y)
        before = _draws()
        report = {name: value.detach() for name, value in self.step(self.state, x, y).items()}
        if _draws() != before:
            self.off = True
        elif len(self.recordings) < SHAPES:
            self._record(x, y)
        return report

    def _may(self, x: Tensor) -> bool:
        model, descent = self.state["model"], self.state["descent"]
        wanted = getattr(model, "recorded", True) and getattr(model, "compiled", None) != "reduce-overhead"
        seen = is_in_torch_dispatch_mode()  # one that looks on would see no operation of what is replayed
        return capable(x.device) and wanted and descent.fused and not seen

    def _record(self, x: Tensor, y: Tensor) -> None:
        x, y = x.clone(), y.clone()
        descent: Descent = self.state["descent"]

        def work() -> dict[str, Tensor]:
            return {name: value.detach() for name, value in self.step(self.state, x, y).items()}

        try:
            with descent.recording():
                report, replay = record(work)
        except RuntimeError as error:  # want of memory is one, too
            self.off, reason = True, first_line(error)
            self.say(f"note: the updates cannot be recorded and repeated by CUDA, so Python launches each: {reason}")
            return
        self.recordings[x.shape, y.shape] = _Recording(x, y, report, replay)

    def _repeat(self, known: _Recording, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        descent: Descent = self.state["descent"]
        known.x.copy_(x)
        known.y.copy_(y)
        descent.refresh()
        known.replay()
        descent.advance()
        return known.report


def capable(where: torch.device) -> bool:
    """Whether the device records."""
    return where.type == "cuda"


def record(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What `work` returns, and what does its work on the device, over again; none of it is done yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = work()
    return report, graph.replay


def _draws() -> tuple[Any, ...]:
    """Where the generators of the CPU stand."""
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr(np.random.get_state())
