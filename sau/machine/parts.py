"""A batch that memory does not hold goes through in parts, with the same update."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sau.errors import OutOfMemory, lacks_memory
from sau.loop import Session
from sau.machine.captured import Captured, StatefulStep
from sau.optim.descent import WHOLE, Part

Compose = Callable[[dict[str, Any], Tensor, Tensor], tuple[Tensor, Tensor]]


class InParts:
    """A step that is repeated with its batch in 2, 4, ... parts once memory runs out; batches to come keep the number.

    The gradients of the parts, weighted by their pictures, sum up to the batch's, so the update is the same up to
    rounding where each picture's loss is its own. Where batch norm uses the statistics of a batch it is not: they are
    those of a part then, and the pictures of the attempt that failed count in the running ones.

    Args:
        step: (state, x, y) -> what to report.
        state: with the `descent` of the step.
        splits: whether the step makes one update, from a mean over its pictures; see `Method.splits`.
        session: prints a line and notes parts in the record.
        batch_statistics: whether the step itself puts batch norm into train mode for a while.
        repeats: whether CUDA may repeat the step; see `Method.repeats`.
        compose: (state, x, y) -> the batch of the step; for what is random, which cannot be repeated.
    """

    def __init__(
        self, step: StatefulStep, state: dict[str, Any], splits: bool, session: Session,
        batch_statistics: bool = False, repeats: bool = False, compose: Compose | None = None,
    ) -> None:  # fmt: skip
        self.step, self.state, self.splits, self.batch_statistics = step, state, splits, batch_statistics
        self.say, self.note, self.parts = session.say, session.note, 1
        self.compose = compose
        self.captured = Captured(step, state, session.say, session.note, off=not repeats)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from the whole batch; OutOfMemory if memory holds no part of it."""
        given = x, y
        while True:
            try:
                x, y = given if self.compose is None else self.compose(self.state, *given)
                return self._once(x, y)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
            # Mended here, where what the attempt held is free again.
            if self.captured.forget():
                torch.cuda.empty_cache()
                continue
            size = -(-len(y) // self.parts)
            if not self.splits or self.parts >= len(y):
                raise OutOfMemory(f"out of memory with {size} pictures; try a smaller --batch_size")
            self.parts *= 2
            if x.is_cuda:
                torch.cuda.empty_cache()
            same = "with batch statistics of a part" if self._trains_norm() else "with the same updates"
            self.say(f"out of memory: batches of {len(y)} go through in {self.parts} parts from here on, {same}")
            self.note(parts=self.parts)

    def _once(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.parts == 1:
            return self.captured(x, y)
        # Every n-th picture, for an attack's batch may begin with the triggered ones.
        n = min(self.parts, len(y))
        pairs = [(x[first::n], y[first::n]) for first in range(n)]
        descent, reports = self.state["descent"], []
        try:
            for number, (part, labels) in enumerate(pairs):
                descent.part = Part(len(labels) / len(y), number == 0, number == len(pairs) - 1)
                reports.append(self.step(self.state, part, labels))
        finally:
            descent.part = WHOLE
        return _joined(reports, [len(labels) for _, labels in pairs])

    def _trains_norm(self) -> bool:
        return any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (module.training or self.batch_statistics)
            for module in self.state["model"].modules()
        )


def _joined(reports: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Means weighted by pictures, sums of counts."""
    together: dict[str, Tensor] = {}
    for name, value in reports[0].items():
        values = [report[name].detach() for report in reports]
        if value.is_floating_point():
            values = [one * size / sum(sizes) for one, size in zip(values, sizes, strict=True)]
        together[name] = torch.stack(values).sum(0)
    return together
