"""What the command line does while a run goes on: rows of figures, evaluations, copies of the weights."""

import time
from typing import Any

from torch import nn

from sau import loop
from sau.data.images import Images
from sau.evaluate import Score, score
from sau.record import Record
from sau.request import Run

SHORTER = "fewer --epochs, --recipe cpu, or a CUDA device"


class Watch:
    """Follows one run.

    Args:
        record: where rows and copies go.
        run: how often to evaluate and to copy.
        epochs: of the run.
        test: clean test pictures.
        triggered: triggered test pictures, or None.
        started: when the command began, by `time.monotonic`.
        evaluation_seconds: what one evaluation is expected to take.
    """

    def __init__(
        self, record: Record, run: Run, epochs: int, test: Images, triggered: Images | None, started: float,
        evaluation_seconds: float,
    ) -> None:  # fmt: skip
        self.record, self.run, self.epochs, self.test, self.triggered = record, run, epochs, test, triggered
        self.started, self.evaluation_seconds = started, evaluation_seconds
        self.last: Score | None = None
        self.earlier: float | None = None

    def session(self) -> loop.Session:
        """How the loop talks to this watch."""
        evaluations = -(-self.epochs // self.run.eval_every)
        return loop.Session(
            checkpoint=self.record,
            on_epoch=self.on_epoch,
            say=self.record.say,
            other_seconds=evaluations * self.evaluation_seconds,
            hint=SHORTER,
        )

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, those before an interruption included."""
        if self.earlier is None:  # rows that stand here before the first new one come from an interrupted run
            self.earlier = self.record.rows[-1]["seconds"] if self.record.rows else 0.0
        return round(self.earlier + time.monotonic() - self.started, 2)

    def on_epoch(self, epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        """Evaluate if it is time, write a row, keep a copy if it is time."""
        model: nn.Module = state["model"]
        figures: dict[str, float | None] = {}
        if epoch % self.run.eval_every == 0 or epoch == self.epochs:
            self.last = score(model, self.test, self.triggered)
            shares = {"acc": self.last.acc, "asr": self.last.asr, "racc": self.last.racc}
            figures = {name: share.percent if share else None for name, share in shares.items()}
        self.record.row(epoch=epoch, **losses, **figures, seconds=self.seconds)
        if self.run.frequency_save and epoch % self.run.frequency_save == 0:
            net = getattr(model, "net", model)
            self.record.save_tensors(f"model_epoch_{epoch}", net.state_dict())
        return figures
