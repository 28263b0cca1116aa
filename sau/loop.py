"""Time: epochs, progress, forecasts, checkpoints with the state of the random numbers, and resuming."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from sau.data.batches import RngState, get_rng_state, set_rng_state
from sau.errors import TrainingError
from sau.models.normalized import is_finite
from sau.types import Batched

LARGE = 2**24  # bytes of a checkpoint that is not written after every epoch, for that takes 100 ms and more
FORECAST_STEPS = 5  # updates timed before the forecast is printed, after one that warms up
SILENCE = 600  # seconds without a line that are forecast
RECENT = 50  # updates of which a slow one is expected to come again


class Limit:
    """Ends the updates of a run at `end`, a time by `time.monotonic`; `ended` says where the run stood then. `whole` is
    for what is of no use unfinished, like a trigger: TrainingError then ends it."""

    def __init__(self, end: float, whole: bool = False) -> None:
        self.end, self.whole = end, whole
        self.ended: str | None = None
        self.times = deque[float](maxlen=RECENT + 1)

    def reached(self) -> bool:
        """Whether a slow recent update, if repeated, would go beyond the end: the third slowest, as two may compile."""
        self.times.append(time.monotonic())
        slowest = sorted(later - earlier for earlier, later in pairwise(self.times))[-3:]
        return self.ended is not None or self.times[-1] + min(slowest, default=0.0) > self.end


@dataclass
class RunContext:
    """What the caller of a long run wants to see of it, and where its checkpoints go.

    Args:
        checkpoint: has `load()`, the last checkpoint or None, and `save(place)`, which must copy or write it at once.
        on_epoch: called with (epochs done, mean losses and summed counts, state); may return further figures to print.
        say: prints a line.
        note: adds facts, by name, to the configuration of the run.
        other_seconds: expected seconds outside the updates (evaluation), for the forecast.
        save_every: seconds between two checkpoints; small ones are written after every epoch, too.
        judge: scores a network on the test sets, for methods that choose by them (`select="oracle"`).
        limit: ends a run in time, after its last update; None means never.
        stage: number of the run among those that share the checkpoint; see `for_stage`.
        findings: what a method found out beside the network, by name, for `summary.json`; all stages share it.
        no_bar: whether no progress bar is shown; None shows one in a terminal or a notebook.
    """

    checkpoint: Any = None
    on_epoch: Callable[[int, dict[str, float], dict[str, Any]], Mapping[str, float | None] | None] = lambda *_: None
    say: Callable[[str], None] = print
    note: Callable[..., None] = lambda **facts: None
    other_seconds: float = 0.0
    save_every: float = 60.0
    judge: Callable[[Any], Any] | None = None
    limit: Limit | None = None
    stage: int = 0
    findings: dict[str, Any] = field(default_factory=dict)
    no_bar: bool | None = None

    @property
    def last_checkpoint(self) -> dict[str, Any] | None:
        """What `checkpoint` loads; None where there is nothing."""
        return None if self.checkpoint is None else self.checkpoint.load()

    def restore_later_stage(self, **objects: Any) -> bool:
        """Whether the checkpoint is of a later stage; if so, the objects are loaded from it, by name."""
        kept = self.last_checkpoint
        if kept is None or kept["stage"] <= self.stage:
            return False
        for name, thing in objects.items():
            thing.load_state_dict(kept["objects"][name])
        return True

    def time_is_up(self, where: str) -> bool:
        """Whether the limit, if there is one, ends the run here; `where` is then logged and kept in it."""
        if self.limit is None or not self.limit.reached():
            return False
        self.limit.ended = self.limit.ended or where
        self.say(f"--max_minutes is reached: ended in {where}")
        return True

    def quiet(self) -> "RunContext":
        """The same without progress: no bar, and of the lines only warnings."""
        return replace(self, say=lambda line: self.say(line) if line.startswith("warning: ") else None, no_bar=True)

    def for_stage(self, stage: int) -> "RunContext":
        """The context of a later run of the same method (1, 2, ...). When resuming in a later stage, `run` skips this
        one without training, so a stage's `state` must hold all that it needs."""
        return replace(self, stage=stage)


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
        """Mean losses, for which it waits for the device; TrainingError if one is not finite."""
        sums = self.sums.items()
        losses = {name: float(value) / (self.seen if value.is_floating_point() else 1) for name, value in sums}
        if not all(map(math.isfinite, losses.values())):
            raise TrainingError(f"the loss is not finite in epoch {self.epoch + 1}: {losses}; try a smaller --{rate}")
        return losses


def run(
    step: Callable[[Tensor, Tensor], dict[str, Tensor]], batches: Batched, epochs: int, *, state: dict[str, Any],
    session: RunContext, end_epoch: Callable[[dict[str, float]], bool | None] = lambda losses: None,
    label: str = "epoch", rate: str = "lr",
) -> None:  # fmt: skip
    """Call `step` on every batch of every epoch.

    Args:
        step: (x, y) -> what to report, on the device: floats are averaged over images, integers summed.
        batches: iterable of (x, y, ...) with a length; `epoch`, where it has one, is set before each epoch.
        epochs: how many times to go through `batches`.
        state: objects that change; those with `state_dict` are kept in checkpoints.
        end_epoch: called with the mean losses before the checkpoint that closes an epoch; True ends the run with it.
        session: progress and checkpoints.
        label: what an epoch is called on the screen.
        rate: the flag of the learning rate, which to lower where it was too high.

    Raises TrainingError when a loss, a parameter or a buffer of `model` is not finite; the last checkpoint is.
    """
    progress = _Progress(state, epochs, session, label, rate)
    progress.resume()
    while (epoch := progress.place.epoch) < epochs:
        started = time.monotonic()
        if hasattr(batches, "epoch"):
            batches.epoch = epoch
        if not progress.one_epoch(step, batches):
            return
        losses = progress.place.means(rate)
        ended = end_epoch(losses)
        row = {"stage": float(session.stage), **losses} if session.stage else losses
        progress.epoch_rng = progress.rng = get_rng_state()  # on_epoch may consume random numbers
        figures = {**losses, **(session.on_epoch(epoch + 1, row, state) or {})}
        text = "  ".join(f"{name} {short(value)}" for name, value in figures.items() if value is not None)
        session.say(f"{label} {epoch + 1}/{epochs}  {text}  {time.monotonic() - started:.1f} s")
        progress.place = _Place(epochs if ended else epoch + 1)
        progress.save(only_small=not progress.due() and progress.place.epoch < epochs)
    set_rng_state(progress.rng)  # a run that was resumed at its end drew nothing


@dataclass
class _Progress:
    """Where a run is, its checkpoints and its forecast."""

    state: dict[str, Any]
    epochs: int
    session: RunContext
    label: str
    rate: str
    place: _Place = field(default_factory=_Place)
    step_times: list[float] = field(default_factory=list)  # ends of the first updates, for the forecast
    saved: float = field(default_factory=lambda: time.monotonic())  # the last checkpoint, or the begin
    epoch_rng: RngState = field(default_factory=get_rng_state)  # the generators before the first batch of this epoch
    rng: RngState = field(default_factory=get_rng_state)  # and before the next batch

    def one_epoch(self, step: Callable[[Tensor, Tensor], dict[str, Tensor]], batches: Batched) -> bool:
        """From `place` to the end of its epoch, or (False) to the limit."""
        set_rng_state(self.epoch_rng)
        skipped, length = self.place.batch, len(batches)
        walk = iter(batches)
        for _ in range(skipped):
            next(walk)
        if skipped:
            set_rng_state(self.rng)
        title = f"{self.label} {self.place.epoch + 1} of {self.epochs}"
        for x, y, *_ in tqdm(walk, title, length, initial=skipped, leave=False, disable=self.session.no_bar):
            if self._time_is_up(title, length):
                return False
            self.place.add(step(x, y), len(y))
            self._forecast(length)
            due = self.due() and self.place.batch < length  # the end of the epoch has its own
            if due or self.session.limit is not None:  # whose checkpoint is written after the next batch is drawn
                self.rng = get_rng_state()
            if due:
                self.save()
        return True

    def due(self) -> bool:
        return self.session.checkpoint is not None and time.monotonic() - self.saved > self.session.save_every

    def _time_is_up(self, epoch: str, length: int) -> bool:
        """Whether the limit ends the run before this batch."""
        if not self.session.time_is_up(f"{epoch}, before batch {self.place.batch + 1} of {length}"):
            return False
        if self.session.limit is not None and self.session.limit.whole:
            self.save()
            raise TrainingError("max_minutes are over before the trigger is made; repeat the command with more of them")
        self._refuse_broken()
        if not (self.place.epoch or self.place.batch):
            self.session.say(f"warning: no {self.label} made an update; give more --max_minutes")
        return True

    def _forecast(self, length: int) -> None:
        """Once, after the first updates: the time to the end, by those after the first, which warms up."""
        if len(self.step_times) > FORECAST_STEPS:
            return
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.step_times.append(time.monotonic())
        if len(self.step_times) > FORECAST_STEPS:
            left = (self.epochs - self.place.epoch) * length - self.place.batch
            seconds = left * (self.step_times[-1] - self.step_times[0]) / FORECAST_STEPS + self.session.other_seconds
            self.session.say(f"forecast: about {duration(seconds)} to the end of {self.label} {self.epochs}")

    def save(self, only_small: bool = False) -> None:
        """Refuse a broken loss or weight; write a checkpoint, unless it is large and `only_small` ones are due."""
        self._refuse_broken()
        if self.session.checkpoint is None:
            return
        objects = {name: thing.state_dict() for name, thing in self.state.items() if hasattr(thing, "state_dict")}
        networks = [objects[name] for name, thing in self.state.items() if isinstance(thing, nn.Module)]
        if not only_small or sum(tensor.nbytes for each in networks for tensor in each.values()) < LARGE:
            place = {"stage": self.session.stage, "place": vars(self.place), "objects": objects}
            self.session.checkpoint.save({**place, "begin": self.epoch_rng, "now": self.rng})
            self.saved = time.monotonic()

    def _refuse_broken(self) -> None:
        """A finite loss says nothing of the update after it, for masks and other networks as for `model`."""
        self.place.means(self.rate)
        modules = [thing for thing in self.state.values() if isinstance(thing, nn.Module)]
        numbers = [parameter for module in modules for parameter in module.parameters()]
        numbers += self.state["model"].buffers() if "model" in self.state else ()
        finite = [is_finite(value) for value in numbers if value.is_floating_point()]
        if finite and not bool(torch.stack(finite).all()):
            where = f"{self.label} {self.place.epoch}, batch {self.place.batch}"
            raise TrainingError(f"a weight is not finite after {where}; try a smaller --{self.rate}")

    def resume(self) -> None:
        """Go on from the last checkpoint; one of a later stage ends the run."""
        kept = self.session.last_checkpoint
        if kept is None or kept["stage"] < self.session.stage:
            return
        if kept["stage"] > self.session.stage:
            self.place.epoch = self.epochs
            return
        for name, content in kept["objects"].items():
            self.state[name].load_state_dict(content)
        self.place, self.epoch_rng, self.rng = _Place(**kept["place"]), kept["begin"], kept["now"]
        batch = f", batch {self.place.batch}" if self.place.batch else ""
        self.session.say(f"resuming after {self.label} {self.place.epoch}{batch}")


def duration(seconds: float) -> str:
    """Like 45 s, 12 min or 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def forecast(what: str, seconds: float, say: Callable[[str], None]) -> None:
    """Say about how long `what`, which prints nothing meanwhile, takes, if it is long."""
    if seconds > SILENCE:
        say(f"note: {what} may take {duration(seconds)}, and prints nothing meanwhile")


def short(value: float) -> str:
    """A whole number as one, anything else with four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"
