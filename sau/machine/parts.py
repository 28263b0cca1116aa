"""A batch that memory does not hold goes through in parts, with the same update."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sau.errors import OutOfMemory
from sau.optim import WHOLE, Part

Step = Callable[[dict[str, Any], Tensor, Tensor], dict[str, Tensor]]


class InParts:
    """A step that is repeated with its batch in 2, 4, ... parts once memory runs out; batches to come keep the number.

    The gradients of the parts, weighted by their pictures, sum up to the batch's, so the update is the same up to
    rounding where each picture's loss is its own. Where batch norm uses the statistics of a batch it is not: they are
    those of a part then, and the pictures of the attempt that failed count in the running ones.

    Args:
        step: (state, x, y) -> what to report.
        state: with the `descent` of the step.
        splits: whether the step makes one update, from a mean over its pictures; see `Method.splits`.
        say: prints a line.
        train_mode: whether the step itself puts batch norm into train mode for a while.
    """

    def __init__(
        self, step: Step, state: dict[str, Any], splits: bool, say: Callable[[str], None], train_mode: bool = False
    ) -> None:
        self.step, self.state, self.splits, self.say, self.train_mode = step, state, splits, say, train_mode
        self.parts = 1

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from the whole batch; OutOfMemory if memory holds no part of it."""
        while True:
            try:
                return self._once(x, y)
            except torch.OutOfMemoryError:
                pass  # mended below, where what the attempt held is free again
            if not self.splits or self.parts >= len(x):
                raise OutOfMemory(f"out of memory with {-(-len(x) // self.parts)} pictures; try a smaller --batch_size")
            self.parts *= 2
            if x.is_cuda:
                torch.cuda.empty_cache()
            self.say(
                f"out of memory: batches of {len(x)} go through in {self.parts} parts from here on, {self._same()}"
            )

    def _once(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.parts == 1:
            return self.step(self.state, x, y)
        pairs = list(zip(x.chunk(self.parts), y.chunk(self.parts), strict=True))
        descent, reports = self.state["descent"], []
        try:
            for number, (part, labels) in enumerate(pairs):
                descent.part = Part(len(labels) / len(y), number == 0, number == len(pairs) - 1)
                reports.append(self.step(self.state, part, labels))
        finally:
            descent.part = WHOLE
        return _joined(reports, [len(labels) for _, labels in pairs])

    def _same(self) -> str:
        batch_norm = any(
            isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and (module.training or self.train_mode)
            for module in self.state["model"].modules()
        )
        return "with batch statistics of a part" if batch_norm else "with the same updates"


def _joined(reports: Sequence[dict[str, Tensor]], sizes: Sequence[int]) -> dict[str, Tensor]:
    """Means weighted by pictures, sums of counts."""
    together: dict[str, Tensor] = {}
    for name, value in reports[0].items():
        values = [report[name].detach() for report in reports]
        if value.is_floating_point():
            values = [one * size / sum(sizes) for one, size in zip(values, sizes, strict=True)]
        together[name] = torch.stack(values).sum(0)
    return together
