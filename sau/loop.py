"""Time: epochs, progress, forecasts, checkpoints and resuming. Knows no model and no loss."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from sau.errors import TrainingError
from sau.types import Loader

FORECAST_STEPS = 5  # updates timed before the forecast is printed; the first one, which warms up, is left out


class Checkpoint(Protocol):
    """Where a run keeps its place. `load` returns what `save` was last given, or None."""

    def load(self) -> dict[str, Any] | None:
        """The last place saved."""

    def save(self, place: dict[str, Any]) -> None:
        """Keep a place, replacing the last one."""


def _silent(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
    return {}


@dataclass
class Session:
    """What the caller of a long run wants to see of it, and where its place is kept.

    Args:
        checkpoint: keeps the place; None means that nothing is kept.
        on_epoch: called with (epochs done, mean losses, the state that changes); returns further figures to print.
        say: prints a line.
        other_seconds: expected seconds outside the updates (evaluation), for the forecast.
        hint: what would make the run short; printed if the forecast exceeds an hour.
        save_every: seconds between two checkpoints inside an epoch.
    """

    checkpoint: Checkpoint | None = None
    on_epoch: Callable[[int, dict[str, float], dict[str, Any]], Mapping[str, float | None]] = _silent
    say: Callable[[str], None] = print
    other_seconds: float = 0.0
    hint: str = ""
    save_every: float = 60.0


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
            value = value.detach()
            value = value * size if value.is_floating_point() else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def means(self) -> dict[str, float]:
        # The only read of the device in an epoch, save for checkpoints.
        losses = {}
        for name, value in self.sums.items():
            losses[name] = float(value) / self.seen if value.is_floating_point() else float(value)
        if not all(map(_finite, losses.values())):
            raise TrainingError(f"the loss is not finite in epoch {self.epoch + 1}: {losses}; try a smaller --lr")
        return losses


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def run(
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    batches: Loader,
    epochs: int,
    *,
    state: dict[str, Any],
    end_epoch: Callable[[dict[str, float]], None],
    session: Session,
    label: str = "epoch",
) -> None:
    """Call `step` on every batch of every epoch.

    Args:
        step: (x, y) -> what to report, on the device: floats are averaged over pictures, integers summed.
        batches: iterable of (x, y, ...) with a length; `set_epoch` is called where it exists.
        epochs: how many times to walk through `batches`.
        state: objects that change; those with `state_dict` are kept in checkpoints.
        end_epoch: called with the mean losses before the checkpoint that closes an epoch.
        session: progress and checkpoints.
        label: what an epoch is called on the screen.

    Raises TrainingError, leaving the last finite checkpoint, when a reported loss is not finite.
    """
    place, resumed_rng = _resume(state, session)
    while place.epoch < epochs:
        started = time.monotonic()
        if hasattr(batches, "set_epoch"):
            batches.set_epoch(place.epoch)
        rng = _rng() if resumed_rng is None else resumed_rng[0]
        _set_rng(rng)
        walk = islice(iter(batches), place.batch, None)
        _one_epoch(step, walk, place, epochs, len(batches), rng, resumed_rng, state, session, label)  # type: ignore[arg-type]
        resumed_rng = None
        losses = place.means()
        end_epoch(losses)
        place = _Place(place.epoch + 1)
        figures = {**losses, **session.on_epoch(place.epoch, losses, state)}
        text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items() if value is not None)
        session.say(f"{label} {place.epoch}/{epochs}  {text}  {time.monotonic() - started:.1f} s")
        _save(place, None, state, session)


def _one_epoch(
    step: Callable[[Tensor, Tensor], dict[str, Tensor]],
    walk: Any,
    place: _Place,
    epochs: int,
    length: int,
    rng: dict[str, Any],
    resumed_rng: tuple[dict[str, Any], dict[str, Any]] | None,
    state: dict[str, Any],
    session: Session,
    label: str,
) -> None:
    saved, times = time.monotonic(), []
    bar = tqdm(
        walk, desc=f"{label} {place.epoch + 1}/{epochs}", total=length, initial=place.batch, leave=False, disable=None
    )
    for number, (x, y, *_) in enumerate(bar):
        if number == 0 and resumed_rng is not None:
            _set_rng(resumed_rng[1])  # the batches that were skipped drew from it
        place.add(step(x, y), len(y))
        if place.epoch == 0 and len(times) < FORECAST_STEPS:
            times.append(time.monotonic())
            if len(times) == FORECAST_STEPS:
                each = (times[-1] - times[0]) / (FORECAST_STEPS - 1)
                _forecast(each * (epochs * length - place.batch) + session.other_seconds, session)
        if session.checkpoint is not None and time.monotonic() - saved > session.save_every:
            place.means()
            _save(place, (rng, _rng()), state, session)
            saved = time.monotonic()


def _forecast(seconds: float, session: Session) -> None:
    session.say(f"forecast: about {_duration(seconds)} to go")
    if seconds > 3600 and session.hint:
        session.say(f"to make it shorter: {session.hint}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _short(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def _save(
    place: _Place, rng: tuple[dict[str, Any], dict[str, Any]] | None, state: dict[str, Any], session: Session
) -> None:
    if session.checkpoint is None:
        return
    objects = {name: thing.state_dict() for name, thing in state.items() if hasattr(thing, "state_dict")}
    now = _rng()
    session.checkpoint.save({"place": vars(place), "rng": rng or (now, now), "objects": objects})


def _resume(state: dict[str, Any], session: Session) -> tuple[_Place, tuple[dict[str, Any], dict[str, Any]] | None]:
    kept = session.checkpoint.load() if session.checkpoint is not None else None
    if kept is None:
        return _Place(), None
    for name, content in kept["objects"].items():
        state[name].load_state_dict(content)
    place = _Place(**kept["place"])
    session.say(f"resuming after epoch {place.epoch}" + (f", batch {place.batch}" if place.batch else ""))
    return place, (kept["rng"][0], kept["rng"][1])


def _rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_rng(rng: dict[str, Any]) -> None:
    torch.set_rng_state(rng["cpu"].cpu())
    if rng["cuda"]:
        torch.cuda.set_rng_state_all([part.cpu() for part in rng["cuda"]])
