"""Fast updates: CUDA graphs, micro-batches where memory runs out, batch norm with fixed statistics."""

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sau.errors import ConfigError, OutOfMemory, first_line, lacks_memory
from sau.loop import RunContext
from sau.models.normalized import copied
from sau.optim import Descent, Method

Report = dict[str, Tensor]
Step = Callable[[dict[str, Any], Tensor, Tensor], Report]  # (state, x, y) -> what to report
Compose = Callable[[dict[str, Any], Tensor, Tensor], tuple[Tensor, Tensor]]
MAX_GRAPHS = 4  # shapes of batches with a graph of their own, each of which keeps the memory of a step


class MicroBatchedStep:
    """A step that repeats its batch in 2, 4, ... micro-batches once memory runs out; later batches keep the number.

    The gradients of the micro-batches, weighted by their sizes, sum up to the batch's: the update is the same up to
    rounding where each image's loss is its own. SAU's patches move once a micro-batch. Batch norm in train mode sees
    one micro-batch at a time, and its running statistics count the images of the failed attempt, too.

    `state` is that of the step, with its `model` and its `descent`. `compose` makes the batch of the step: it does the
    random sampling, which a replay would not repeat. For `supports_microbatch` and `graph_safe` see `Method`.
    """

    def __init__(
        self, method: Method, step: Step, state: dict[str, Any], session: RunContext, compose: Compose | None = None
    ) -> None:
        self.method, self.step, self.state, self.session = method, step, state, session
        self.compose, self.parts = compose, 1
        self.graphed = GraphedStep(step, state, session, enabled=method.graph_safe)

    def __call__(self, x: Tensor, y: Tensor) -> Report:
        """One update from the whole batch; OutOfMemory if memory holds no part of it."""
        while True:
            try:
                batch = (x, y) if self.compose is None else self.compose(self.state, x, y)
                return self.graphed(*batch) if self.parts == 1 else self._in_parts(*batch)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            # Outside the except block, so that the tensors of the failed attempt are freed.
            if self.graphed.graphs:
                self.graphed.disable("its memory is needed")
            elif not self.method.supports_microbatch() or self.parts >= len(y):
                raise OutOfMemory(f"out of memory with {-(-len(y) // self.parts)} images; try a smaller --batch_size")
            else:
                self.parts *= 2
                how = f"{self.parts} parts from now on, each of which batch norm in train mode normalises on its own"
                self.session.say(f"out of memory: batches of {len(y)} are split into {how}")
                self.session.note(parts=self.parts)
            if x.is_cuda:
                torch.cuda.empty_cache()

    def _in_parts(self, x: Tensor, y: Tensor) -> Report:
        n = min(self.parts, len(y))
        descent, merged = self.state["descent"], Report()
        try:
            for i in range(n):
                part, labels = x[i::n], y[i::n]  # every n-th image: an attack's batch begins with triggered ones
                descent.share, descent.first, descent.last = len(labels) / len(y), i == 0, i == n - 1
                for name, value in self.step(self.state, part, labels).items():  # means and counts
                    value = value.detach() * (descent.share if value.is_floating_point() else 1)
                    merged[name] = merged[name] + value if i else value
        finally:
            descent.share, descent.first, descent.last = 1.0, True, True
        return merged


def checked(made: Any) -> Report:
    """What a step returned; ConfigError unless it is what a step must return."""
    if not isinstance(made, dict) or not all(isinstance(x, Tensor) and not x.ndim for x in made.values()):
        raise ConfigError(f"step returned {str(made)[:60]}, allowed is a dict of names and tensors of one number")
    return made


class GraphedStep:
    """A step that runs eagerly on the first batch of each shape, is captured then, and replayed for later batches.

    A CUDA graph replays kernels only. A step is therefore not captured if it draws random numbers on the CPU, waits for
    the device (CUDA refuses that), moves a `Descent` more than once, has an optimiser that is not fused or keeps its
    gradients, or a network that does not allow it (`Normalized.graph_safe`).
    """

    def __init__(self, step: Step, state: dict[str, Any], session: RunContext, *, enabled: bool) -> None:
        self.session = session
        self.step = lambda x, y: {name: value.detach() for name, value in checked(step(state, x, y)).items()}
        self.descents = [thing for thing in state.values() if isinstance(thing, Descent)]
        networks = [getattr(thing, "__self__", thing) for thing in state.values()]  # or the method of one
        # A fused optimiser can read its rates from the device's memory.
        fused = [group.get("fused") for one in self.descents for group in one.optimizer.param_groups]
        steady = bool(fused) and all(fused) and not any(one.keeps for one in self.descents)
        self.enabled = enabled and steady and all(getattr(network, "graph_safe", True) for network in networks)
        # By the shape of a batch: memory for its images, its labels and its report, and what replays the graph.
        self.graphs: dict[tuple[Any, ...], tuple[Tensor, Tensor, Report, Callable[[], None]]] = {}

    def __call__(self, x: Tensor, y: Tensor) -> Report:
        """One update; what is reported holds until the next one."""
        if (x.shape, y.shape) in self.graphs:
            return self._replay(x, y)
        if len(self.graphs) == MAX_GRAPHS or not (self.enabled and has_graphs(x.device)):
            return self.step(x, y)
        moves, rng = [one.moves for one in self.descents], _cpu_rng_state()
        report = self.step(x, y)
        if _cpu_rng_state() != rng:
            self.disable("it draws random numbers on the CPU")
        elif [one.moves for one in self.descents] != [before + 1 for before in moves]:
            self.disable("it updates the weights more than once")
        else:
            self._capture(x.clone(), y.clone())
        return report

    def disable(self, reason: str) -> None:
        """Make no more graphs, and free the memory of those that there are."""
        self.enabled = False
        self.graphs.clear()
        self.session.note(captured=False)
        self.session.say(f"note: the training step is not replayed as a CUDA graph: {reason}")

    def _capture(self, x: Tensor, y: Tensor) -> None:
        try:
            with ExitStack() as stack:
                for descent in self.descents:
                    stack.enter_context(descent.capturing())
                report, replay = capture(lambda: self.step(x, y))
        except RuntimeError as error:  # out of memory is one, too
            self.disable(first_line(error.__context__ or error))  # what broke a capture says more than its end
            return
        if not self.graphs:
            self.session.note(captured=True)
            self.session.say("the training step is replayed as a CUDA graph")
        self.graphs[x.shape, y.shape] = x, y, report, replay

    def _replay(self, x: Tensor, y: Tensor) -> Report:
        images, labels, report, replay = self.graphs[x.shape, y.shape]
        images.copy_(x)
        labels.copy_(y)
        for descent in self.descents:
            descent.refresh()
        replay()
        for descent in self.descents:
            descent.advance()
        return report


def has_graphs(device: torch.device) -> bool:
    """Whether the device can capture work as a graph: it must be the current one."""
    return device.type == "cuda" and device.index in (None, torch.cuda.current_device())


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


class _FixedNorm(torch.autograd.Function):
    """Batch norm with fixed statistics: torch's forward pass, and a backward pass by the kernels of SyncBatchNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        learns = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if learns else None, mean, (var + eps).rsqrt(), weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, mean, inverse, weight) = gradients, ctx.saved_tensors
        wants_x, _, _, *learns, _ = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if wants_x:
            scale = inverse if weight is None else inverse * weight
            of_x = torch.batch_norm_elemt(gradient, None, None, torch.zeros_like(scale), scale, 0.0)
        if any(learns):
            last = x.is_contiguous(memory_format=torch.channels_last)
            alike = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            _, _, of_weight, of_bias = torch.batch_norm_backward_reduce(alike, x, mean, inverse, weight, False, *learns)
        return of_x, None, None, of_weight, of_bias, None


class FixedNorms(TorchFunctionMode):
    """Inside, batch norms with fixed statistics have a first derivative that is fast on CUDA: torch's own took a fifth
    of an update of SAU there, and the copies around it another."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        # F.batch_norm hands on its first three arguments by place and the others by name, however it was called.
        if func is F.batch_norm and args[1] is not None and torch.is_grad_enabled() and not given["training"]:
            return _FixedNorm.apply(*args, given["weight"], given["bias"], given["eps"])
        return func(*args, **given)


def fixed_norms(network: Any, x: Tensor) -> AbstractContextManager[Any]:
    """The context of an update that needs first derivatives of `network` at `x`: `FixedNorms` on CUDA, unless the
    network is compiled, which makes fast code of its own."""
    return FixedNorms() if x.is_cuda and not getattr(network, "compiled", False) else nullcontext()


def frozen_forward(model: Any) -> dict[str, Any]:
    """`{"frozen": forward}` of a copy of `model` that shares its tensors and forms no gradients of weights, for
    searches while it is trained; {} on the CPU, unless compiled.

    Compiled code and `FixedNorms` compute the gradients of weights even where `autograd.grad` asks for the input's
    alone, and changing `requires_grad` compiles anew.
    """
    if not getattr(model, "compiled", False) and not next(model.parameters()).is_cuda:
        return {}
    shared: dict[int, Tensor] = {id(weight): nn.Parameter(weight.data, False) for weight in model.parameters()}
    shared |= {id(buffer): buffer.data for buffer in model.buffers()}
    return {"frozen": copied(model.eval(), shared).forward}  # which copies nothing that its memo holds
