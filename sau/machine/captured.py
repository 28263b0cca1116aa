"""A step that CUDA captures once and then repeats as one thing (a CUDA graph), so that Python launches nothing."""

import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from sau.errors import first_line
from sau.optim.descent import Descent

StatefulStep = Callable[[dict[str, Any], Tensor, Tensor], dict[str, Tensor]]
SHAPES = 4  # of batches, each of which keeps the memory of a step


@dataclass
class _Capture:
    """What one shape of batch is repeated with: the batch and the report have their places in memory."""

    x: Tensor
    y: Tensor
    report: dict[str, Tensor]
    replay: Callable[[], None]


@dataclass
class Captured:
    """`step`, which must make one update of each `Descent` in `state`: the first batch of each shape goes through
    Python, then the step is captured with its shape, and later ones are replayed.

    What is replayed is the work of the device and nothing else. So a step that drew random numbers on the CPU, that
    reads the device (which CUDA refuses), whose optimiser takes its rate from Python or keeps its gradients is not
    captured; nor is one whose network is told not to be (`Normalized.captured`).

    Args:
        step: (state, x, y) -> what to report.
        state: of the step.
        say: prints a line.
        note: adds facts, by name, to what is recorded of the run.
        off: whether no update is captured; set where one cannot be.
        captures: by the shapes of the batch.
        crowded: whether a batch has come for which there is no room among them.
    """

    step: StatefulStep
    state: dict[str, Any]
    say: Callable[[str], None]
    note: Callable[..., None]
    off: bool = False
    captures: dict[tuple[Any, ...], _Capture] = field(default_factory=dict)
    crowded: bool = False

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update; what is reported holds until the next one."""
        if self.off or not self._may(x):
            return self.step(self.state, x, y)
        known = self.captures.get((x.shape, y.shape))
        if known is not None:
            return self._repeat(known, x, y)
        if len(self.captures) == SHAPES:
            if not self.crowded:
                self.say(f"note: batches of {SHAPES} shapes are repeated by CUDA, Python launches those of others")
                self.crowded = True
            return self.step(self.state, x, y)
        before = _draws()
        report = {name: value.detach() for name, value in self.step(self.state, x, y).items()}
        if _draws() == before:
            self._capture(x, y)
        else:
            self._launch("they draw random numbers on the CPU")
        return report

    def forget(self) -> bool:
        """Give back the memory of the captures and make no more; False if there are none."""
        found = bool(self.captures)
        if found:
            self.captures.clear()
            self._launch("their memory is wanted")
        return found

    def _may(self, x: Tensor) -> bool:
        if not capable(x.device):
            return False
        networks = [getattr(thing, "__self__", thing) for thing in self.state.values()]  # or the method of one
        descents = self._descents()
        steady = bool(descents) and all(one.fused and not one.keeps for one in descents)
        wanted = all(getattr(network, "captured", True) for network in networks)
        seen = is_in_torch_dispatch_mode()  # one that looks on would see no operation of what is replayed
        return wanted and steady and not seen

    def _descents(self) -> list[Descent]:
        return [thing for thing in self.state.values() if isinstance(thing, Descent)]

    def _launch(self, why: str) -> None:
        self.off = True
        self.note(captured=False)
        self.say(f"note: updates are not captured and repeated by CUDA, so Python launches each: {why}")

    def _capture(self, x: Tensor, y: Tensor) -> None:
        x, y = x.clone(), y.clone()

        def work() -> dict[str, Tensor]:
            return {name: value.detach() for name, value in self.step(self.state, x, y).items()}

        try:
            with ExitStack() as stack:
                for descent in self._descents():
                    stack.enter_context(descent.capturing())
                report, replay = capture(work)
        except RuntimeError as error:  # want of memory is one, too
            self._launch(first_line(error.__context__ or error))  # what ends a capture says less than what broke it
            return
        if not self.captures:
            self.note(captured=True)
            self.say("updates are captured and repeated by CUDA (a CUDA graph)")
        self.captures[x.shape, y.shape] = _Capture(x, y, report, replay)

    def _repeat(self, known: _Capture, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        known.x.copy_(x)
        known.y.copy_(y)
        for descent in self._descents():
            descent.refresh()
        known.replay()
        for descent in self._descents():
            descent.advance()
        return known.report


def capable(where: torch.device) -> bool:
    """Whether the device can capture work."""
    return where.type == "cuda"


def capture(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What `work` returns, and what does its work on the device, over again; none of it is done yet.

    Other threads, like one that pins a loader's pictures, may use CUDA meanwhile. RuntimeError where CUDA refuses;
    then stream and generator are as before, which torch leaves as they were inside.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    spare = generator.clone_state()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            report = work()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(spare)
        raise
    return report, graph.replay


def _draws() -> tuple[Any, ...]:
    """Where the generators of the CPU stand."""
    _, numbers, place, *_ = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(numbers).tobytes(), place
