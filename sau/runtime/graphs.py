"""A training step in micro-batches where memory runs out, and replayed as a CUDA graph where possible."""

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sau.errors import OutOfMemory, first_line, lacks_memory
from sau.loop import RunContext
from sau.optim import Descent

Step = Callable[[dict[str, Any], Tensor, Tensor], dict[str, Tensor]]  # (state, x, y) -> what to report
Compose = Callable[[dict[str, Any], Tensor, Tensor], tuple[Tensor, Tensor]]
MAX_GRAPHS = 4  # shapes of batches with a graph of their own, each of which keeps the memory of a step


class MicroBatchedStep:
    """A step that repeats its batch in 2, 4, ... micro-batches once memory runs out; later batches keep the number.

    The gradients of the micro-batches, weighted by their sizes, sum up to the batch's: the update is the same up to
    rounding where each image's loss is its own. Batch norm in train mode sees one micro-batch at a time, and its
    running statistics count the images of the failed attempt, too.

    Args:
        step: (state, x, y) -> what to report.
        state: of the step, with its `model` and its `descent`.
        session: prints a line and notes the number of micro-batches in the record.
        supports_microbatch: whether the step makes one update, from a mean over its images; see `Method`.
        graph_safe: whether the step may be replayed as a CUDA graph; see `Method`.
        compose: (state, x, y) -> the batch of the step; for random sampling, which a replay would not repeat.
    """

    def __init__(
        self, step: Step, state: dict[str, Any], session: RunContext, *, supports_microbatch: bool,
        graph_safe: bool = False, compose: Compose | None = None,
    ) -> None:  # fmt: skip
        self.step, self.state, self.session = step, state, session
        self.supports_microbatch, self.compose, self.parts = supports_microbatch, compose, 1
        self.graphed = GraphedStep(step, state, session, enabled=graph_safe)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from the whole batch; OutOfMemory if memory holds no part of it."""
        while True:
            try:
                batch = (x, y) if self.compose is None else self.compose(self.state, x, y)
                return self.graphed(*batch) if self.parts == 1 else self._in_parts(*batch)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            # Outside the except block, so that the tensors of the failed attempt are freed.
            if not self.graphed.release():
                self._double_parts(len(y))
            if x.is_cuda:
                torch.cuda.empty_cache()

    def _double_parts(self, size: int) -> None:
        if not self.supports_microbatch or self.parts >= size:
            images = -(-size // self.parts)
            raise OutOfMemory(f"out of memory with {images} images; try a smaller --batch_size")
        self.parts *= 2
        self.session.say(
            f"out of memory: batches of {size} go through in {self.parts} parts from here on; the updates are the "
            "same, but batch norm in train mode sees one part at a time"
        )
        self.session.note(parts=self.parts)

    def _in_parts(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        n = min(self.parts, len(y))
        pairs = [(x[i::n], y[i::n]) for i in range(n)]  # every n-th image: an attack's batch begins with triggered ones
        descent, reports = self.state["descent"], []
        shares = [len(labels) / len(y) for _, labels in pairs]
        try:
            for i, (part, labels) in enumerate(pairs):
                descent.share, descent.first, descent.last = shares[i], i == 0, i == n - 1
                reports.append(self.step(self.state, part, labels))
        finally:
            descent.share, descent.first, descent.last = 1.0, True, True
        return _merged(reports, shares)


def _merged(reports: Sequence[dict[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Means weighted by images, sums of counts."""
    merged = {}
    for name, value in reports[0].items():
        values = [report[name].detach() for report in reports]
        if value.is_floating_point():
            values = [one * share for one, share in zip(values, shares, strict=True)]
        merged[name] = torch.stack(values).sum(0)
    return merged


@dataclass
class _Graph:
    """A captured step for one shape of batch, with the memory of its batch and of its report."""

    x: Tensor
    y: Tensor
    report: dict[str, Tensor]
    replay: Callable[[], None]


class GraphedStep:
    """A step that runs eagerly on the first batch of each shape, is captured then, and replayed for later batches.

    A CUDA graph replays kernels only. A step is therefore not captured if it draws random numbers on the CPU, waits for
    the device (CUDA refuses that), moves a `Descent` more than once, has an optimiser that is not fused or keeps its
    gradients, or a network that does not allow it (`Normalized.graph_safe`).

    Args:
        step: (state, x, y) -> what to report.
        state: of the step.
        session: prints a line and notes in the record whether steps are captured.
        enabled: whether steps may be captured; set to False where one cannot be.
    """

    def __init__(self, step: Step, state: dict[str, Any], session: RunContext, *, enabled: bool) -> None:
        self.step, self.state, self.session, self.enabled = step, state, session, enabled
        self.graphs: dict[tuple[Any, ...], _Graph] = {}

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update; what is reported holds until the next one."""
        if not (self.enabled and has_graphs(x.device) and self._is_safe()):
            return self.step(self.state, x, y)
        if (graph := self.graphs.get((x.shape, y.shape))) is not None:
            return self._replay(graph, x, y)
        if len(self.graphs) == MAX_GRAPHS:
            return self.step(self.state, x, y)
        moves, rng = [one.moves for one in self._descents()], _cpu_rng_state()
        report = self._detached(x, y)
        if _cpu_rng_state() != rng:
            self._disable("it draws random numbers on the CPU")
        elif any(one.moves != before + 1 for one, before in zip(self._descents(), moves, strict=True)):
            self._disable("it updates the weights more than once")
        else:
            self._capture(x.clone(), y.clone())
        return report

    def release(self) -> bool:
        """Free the memory of the graphs and make no more; False if there are none."""
        found = bool(self.graphs)
        if found:
            self.graphs.clear()
            self._disable("its memory is needed")
        return found

    def _is_safe(self) -> bool:
        networks = [getattr(thing, "__self__", thing) for thing in self.state.values()]  # or the method of one
        descents = self._descents()
        steady = bool(descents) and all(one.fused and not one.keeps for one in descents)
        return steady and all(getattr(network, "graph_safe", True) for network in networks)

    def _descents(self) -> list[Descent]:
        return [thing for thing in self.state.values() if isinstance(thing, Descent)]

    def _detached(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.step(self.state, x, y).items()}

    def _disable(self, reason: str) -> None:
        self.enabled = False
        self.session.note(captured=False)
        self.session.say(f"note: the training step is not replayed as a CUDA graph: {reason}")

    def _capture(self, x: Tensor, y: Tensor) -> None:
        try:
            with ExitStack() as stack:
                for descent in self._descents():
                    stack.enter_context(descent.capturing())
                report, replay = capture(lambda: self._detached(x, y))
        except RuntimeError as error:  # out of memory is one, too
            self._disable(first_line(error.__context__ or error))  # what broke a capture says more than its end
            return
        if not self.graphs:
            self.session.note(captured=True)
            self.session.say("the training step is replayed as a CUDA graph")
        self.graphs[x.shape, y.shape] = _Graph(x, y, report, replay)

    def _replay(self, graph: _Graph, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        graph.x.copy_(x)
        graph.y.copy_(y)
        for descent in self._descents():
            descent.refresh()
        graph.replay()
        for descent in self._descents():
            descent.advance()
        return graph.report


def has_graphs(device: torch.device) -> bool:
    """Whether the device can capture work as a graph."""
    return device.type == "cuda"


def capture(work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    """What `work` returns, and a function that does its work on the device; none of it is done yet.

    Other threads, like one that pins a loader's images, may use CUDA meanwhile. RuntimeError where CUDA refuses; stream
    and generator are then as before, which torch leaves as they were inside.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    before = generator.clone_state()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            report = work()
    except RuntimeError:
        torch.cuda.set_stream(stream)
        generator.graphsafe_set_state(before)
        raise
    return report, graph.replay


def _cpu_rng_state() -> tuple[Any, ...]:
    """The state of the CPU's generators of torch, Python and numpy."""
    _, numbers, position, *_ = np.random.get_state(legacy=True)
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), np.asarray(numbers).tobytes(), position
