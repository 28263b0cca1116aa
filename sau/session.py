"""What the caller of a long run wants to see of it, and where the run keeps its place."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sau.errors import TrainingError

LATELY = 50  # updates whose longest is expected of the next one


@runtime_checkable
class Checkpoint(Protocol):
    """Where a run keeps its place. `load` returns what `save` was last given, or None; `save` must copy it or write it
    at once, for its tensors are those of the run and move on."""

    def load(self) -> dict[str, Any] | None:
        """The last place saved."""

    def save(self, place: dict[str, Any]) -> None:
        """Keep a place, replacing the last one."""


def bytes_of(content: Any) -> int:
    """Bytes of the tensors in a checkpoint."""
    if isinstance(content, Tensor):
        return content.numel() * content.element_size()
    if isinstance(content, Mapping):
        content = content.values()
    return sum(map(bytes_of, content)) if not isinstance(content, str) and isinstance(content, Iterable) else 0


def _nothing(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
    return {}


def _unheard(**facts: Any) -> None:
    pass


def _graphs() -> int:
    """How many graphs torch.compile has taken in this process."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not there before anything is compiled
    return dynamo.counters["stats"]["unique_graphs"] if dynamo else 0


def _warn_only(say: Callable[[str], None], text: str) -> None:
    if text.startswith("warning: "):
        say(text)


class Limit:
    """When the updates of a run must have come to their end.

    Args:
        end: that time, by `time.monotonic`.

    `ended` is where the run stood when it was ended by this, None if it was not.
    """

    def __init__(self, end: float) -> None:
        self.end = end
        self.ended: str | None = None
        self.last, self.spans, self.graphs = time.monotonic(), deque[float](maxlen=LATELY), _graphs()

    def reached(self) -> bool:
        """Whether what lies between two calls, at its longest lately, would go beyond the end; an update that compiled
        the network does not count, for the next one does not."""
        now, graphs = time.monotonic(), _graphs()
        if graphs == self.graphs:
            self.spans.append(now - self.last)
        self.last, self.graphs = now, graphs
        return now + max(self.spans, default=0.0) > self.end


class Deadline(Limit):
    """A limit for what is of no use unfinished, as a trigger is: TrainingError, which leaves the last checkpoint."""

    def reached(self) -> bool:
        if super().reached():
            raise TrainingError(
                "max_minutes are over before the trigger is made; repeat the command with more of them to go on with it"
            )
        return False


@dataclass
class Session:
    """What the caller of a long run wants to see of it, and where its place is kept.

    Args:
        checkpoint: keeps the place; None means that nothing is kept.
        on_epoch: called with (epochs done, mean losses, the state that changes); returns further figures to print.
        say: prints a line.
        note: adds facts, by name, to what is recorded of the run.
        other_seconds: expected seconds outside the updates (evaluation), for the forecast.
        hint: what would make the run short; printed if the forecast exceeds an hour.
        save_every: seconds between two checkpoints; where one is small, the end of every epoch writes one, too.
        judge: scores a network on the test sets, for methods that are asked to choose by them (`select="oracle"`).
        limit: ends a run in time, after its last update; None means that none is set.
        stage: number of the run among those that share the checkpoint; see `at`.
        findings: what a method found out beside the network, by name: numbers, texts, lists and dictionaries of them,
            which a command keeps in `summary.json`. A method fills it in; all stages share it.
        bar: whether a terminal or a notebook shows a progress bar.
        scrutinised: whether the caller has said what there is to say of the pictures (`sau.data.sources`), as commands
            have; otherwise `purify` does.
    """

    checkpoint: Checkpoint | None = None
    on_epoch: Callable[[int, dict[str, float], dict[str, Any]], Mapping[str, float | None]] = _nothing
    say: Callable[[str], None] = print
    note: Callable[..., None] = _unheard
    other_seconds: float = 0.0
    hint: str = ""
    save_every: float = 60.0
    judge: Callable[[Any], Any] | None = None
    limit: Limit | None = None
    stage: int = 0
    findings: dict[str, Any] = field(default_factory=dict)
    bar: bool = True
    scrutinised: bool = False

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from, so that what comes before the first run is not repeated."""
        return self.checkpoint is not None and self.checkpoint.load() is not None

    def recall(self, **objects: Any) -> bool:
        """Whether the checkpoint is of a later stage; if so, the objects, kept in it by name, are brought to where it
        has them."""
        place = self.checkpoint.load() if self.checkpoint is not None else None
        if place is None or place["stage"] <= self.stage:
            return False
        for name, thing in objects.items():
            thing.load_state_dict(place["objects"][name])
        return True

    def over(self, where: str) -> bool:
        """Whether the limit, if there is one, ends the run at this point, which is said and noted as `where`."""
        if self.limit is None or not self.limit.reached():
            return False
        self.limit.ended = self.limit.ended or where
        self.say(f"the time is over: ended in {where}")
        return True

    def quiet(self) -> "Session":
        """The same session without progress: no bar, and of the lines only warnings."""
        return replace(self, say=partial(_warn_only, self.say), bar=False)

    def at(self, stage: int) -> "Session":
        """The session of a later run of the same method (1, 2, ...).

        When a method is resumed in a later stage, the runs before it return at once with their state untrained, so a
        stage's `state` must hold all that it needs.
        """
        return replace(self, stage=stage)
