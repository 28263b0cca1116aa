"""Time: epochs, progress, forecasts, checkpoints and resuming. Knows no method and no loss."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sau.errors import TrainingError
from sau.formatting import duration, short
from sau.models import sound
from sau.seeds import RngState, get_rng_state, set_rng_state
from sau.session import Session, bytes_of
from sau.types import Batched

LARGE = 2**24  # bytes of a checkpoint that is not written at the end of every epoch: that takes 100 ms and more
FORECAST_STEPS = 5  # updates timed before the forecast is printed, after one that warms up


@dataclass
class _Place:
    """How far a run has come, and the sums of what its current epoch reported."""

    epoch: int = 0
    batch: int = 0
    seen: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, report: dict[str, Tensor], size: int) -> None:
        self.batch += 1
        self.seen += size
        for name, value in report.items():
            value = value.detach() * (size if value.is_floating_point() else 1)
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self, rate: str) -> dict[str, float]:
        """Reads the device, so once an epoch and for checkpoints alone; refuses to go on from a broken loss."""
        losses = {
            name: float(value) / self.seen if value.is_floating_point() else float(value)
            for name, value in self.sums.items()
        }
        if not all(map(math.isfinite, losses.values())):
            raise TrainingError(f"the loss is not finite in epoch {self.epoch + 1}: {losses}; try a smaller --{rate}")
        return losses


def run(
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Batched,
    epochs: int,
    *,
    state: dict[str, Any],
    end_epoch: Callable[[dict[str, float]], bool | None],
    session: Session,
    label: str = "epoch",
    rate: str = "lr",
) -> None:
    """Call `step` on every batch of every epoch.

    Args:
        step: (x, y) -> what to report, on the device: floats are averaged over pictures, integers summed.
        batches: iterable of (x, y, ...) with a length; `set_epoch` is called where it exists.
        epochs: how many times to walk through `batches`.
        state: objects that change; those with `state_dict` are kept in checkpoints.
        end_epoch: called with the mean losses before the checkpoint that closes an epoch; True ends the run with it.
        session: progress and checkpoints.
        label: what an epoch is called on the screen.
        rate: the setting of the learning rate, which to lower where it was too high.

    Raises TrainingError, leaving the last finite checkpoint, when a loss or a parameter is not finite, or a buffer of
    `model` unsound.
    """
    _Run(step, batches, epochs, state, end_epoch, session, label, rate).go()


@dataclass
class _Run:
    step: Callable[[Tensor, Tensor], dict[str, Tensor]]
    batches: Any
    epochs: int
    state: dict[str, Any]
    end_epoch: Callable[[dict[str, float]], bool | None]
    session: Session
    label: str
    rate: str
    place: _Place = field(default_factory=_Place)
    ticks: list[float] = field(default_factory=list)  # ends of the first updates, for the forecast
    saved: float = 0.0  # when the last checkpoint was written, or the run began
    spare: dict[str, Any] | None = None  # the end of the last epoch, where it was too large to be written

    def go(self) -> None:
        try:
            self._go()
        except TrainingError:  # a broken loss: the last finite epoch is kept
            if self.session.checkpoint is not None and self.spare is not None:
                self.session.checkpoint.save(self.spare)
            raise

    def _go(self) -> None:
        begin, now = self._resume()
        self.saved = time.monotonic()
        while self.place.epoch < self.epochs:
            started = time.monotonic()
            if hasattr(self.batches, "set_epoch"):
                self.batches.set_epoch(self.place.epoch)
            if not self._one_epoch(begin, now):
                return
            losses = self.place.means(self.rate)
            ended = self.end_epoch(losses)
            done = self.place.epoch + 1
            row = {"stage": float(self.session.stage), **losses} if self.session.stage else losses
            begin = now = get_rng_state()  # whoever looks on may draw
            figures = {**losses, **self.session.on_epoch(done, row, self.state)}
            text = "  ".join(f"{name} {short(value)}" for name, value in figures.items() if value is not None)
            self.session.say(f"{self.label} {done}/{self.epochs}  {text}  {time.monotonic() - started:.1f} s")
            self.place = _Place(self.epochs if ended else done)
            self._save(begin, now, None if self._due() or self.place.epoch == self.epochs else LARGE)
        set_rng_state(now)  # a run that was resumed at its end drew nothing

    def _one_epoch(self, begin: RngState, now: RngState) -> bool:
        """From `place` to the end of its epoch, or (False) to the session's limit; the generators are `begin` at its
        first batch and `now` at `place`.
        """
        set_rng_state(begin)
        skipped, length = self.place.batch, len(self.batches)
        walk = iter(self.batches)
        for _ in range(skipped):
            next(walk)
        if skipped:
            set_rng_state(now)
        title = f"{self.label} {self.place.epoch + 1}/{self.epochs}"
        hidden = None if self.session.bar else True  # None: shown in terminals and notebooks alone
        for x, y, *_ in tqdm(walk, title, length, initial=skipped, leave=False, disable=hidden):
            if self._over(begin, now, length):
                return False
            self.place.add(self.step(x, y), len(y))
            if self.session.limit is not None:
                now = get_rng_state()  # before the next batch is drawn, for a checkpoint that is written after it was
            self._forecast()
            if self._due() and self.place.batch < length:  # the end of the epoch looks by itself
                self._save(begin, get_rng_state())
        return True

    def _due(self) -> bool:
        return self.session.checkpoint is not None and time.monotonic() - self.saved > self.session.save_every

    def _over(self, begin: RngState, now: RngState, length: int) -> bool:
        """Whether the session's limit ends the run before this batch; one that raises leaves a checkpoint of it."""
        where = f"{self.label} {self.place.epoch + 1} of {self.epochs}, before batch {self.place.batch + 1} of {length}"
        try:
            over = self.session.over(where)
        except TrainingError:
            self._save(begin, now)
            raise
        if over:
            self._refuse_broken()
            if not (self.session.stage or self.place.epoch or self.place.batch):
                self.session.say("warning: no update was made, so the network is as it was; give more --max_minutes")
        return over

    def _forecast(self) -> None:
        if len(self.ticks) > FORECAST_STEPS:
            return
        if len(self.ticks) in (0, FORECAST_STEPS) and torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what was asked of CUDA is not done yet; elsewhere nothing waits for it
        self.ticks.append(time.monotonic())
        if len(self.ticks) > FORECAST_STEPS:
            left = (self.epochs - self.place.epoch) * len(self.batches) - self.place.batch
            seconds = left * (self.ticks[-1] - self.ticks[0]) / FORECAST_STEPS + self.session.other_seconds
            self.session.say(f"forecast: about {duration(seconds)} to the end of {self.label} {self.epochs}")
            if seconds > 3600 and self.session.hint:
                self.session.say(f"to make it shorter: {self.session.hint}")

    def _save(self, begin: RngState, now: RngState, below: int | None = None) -> None:
        """Refuse a broken loss or weight; write a checkpoint of fewer bytes than `below`."""
        self._refuse_broken()
        if self.session.checkpoint is None:
            return
        objects = {name: thing.state_dict() for name, thing in self.state.items() if hasattr(thing, "state_dict")}
        place = {"stage": self.session.stage, "place": vars(self.place), "begin": begin, "now": now, "objects": objects}
        if below is None or bytes_of(objects) < below:
            self.session.checkpoint.save(place)
            self.saved, self.spare = time.monotonic(), None
        else:
            self.spare = copy.deepcopy(place)

    def _refuse_broken(self) -> None:
        """A finite loss says nothing of the update after it, for masks and other networks as for `model`."""
        self.place.means(self.rate)
        numbers = [w for thing in self.state.values() if isinstance(thing, nn.Module) for w in thing.parameters()]
        numbers += self.state["model"].buffers() if "model" in self.state else ()
        finite = [sound(value) for value in numbers if value.is_floating_point()]
        if finite and not bool(torch.stack(finite).all()):
            broken = f"a weight is not finite after {self.label} {self.place.epoch}, batch {self.place.batch}"
            raise TrainingError(f"{broken}; try a smaller --{self.rate}")

    def _resume(self) -> tuple[RngState, RngState]:
        kept = self.session.checkpoint.load() if self.session.checkpoint is not None else None
        if kept is not None and kept["stage"] > self.session.stage:
            self.place.epoch = self.epochs
        if kept is None or kept["stage"] != self.session.stage:
            return get_rng_state(), get_rng_state()
        for name, content in kept["objects"].items():
            if name in self.state:  # checkpoints of older versions hold more
                self.state[name].load_state_dict(content)
        self.place = _Place(**kept["place"])
        batch = f", batch {self.place.batch}" if self.place.batch else ""
        self.session.say(f"resuming after {self.label} {self.place.epoch}{batch}")
        return kept["begin"], kept["now"]
