"""What the command line keeps of a run: who asked what, rows of figures, evaluations, copies of the weights."""

import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sau
from sau.attack.triggers import network_digest
from sau.command.request import Request
from sau.data.images import Images
from sau.evaluate import Score, score
from sau.loop import Limit, Session
from sau.record.folder import Record
from sau.record.schema import EARLY, digest
from sau.risk import Found
from sau.runtime.device import set_threads
from sau.settings.run import Run

SHORTER = "fewer --epochs, --recipe cpu, or a CUDA device"


class Watch:
    """Follows one run.

    Args:
        record: where rows and copies go.
        run: how often to evaluate and to copy.
        epochs: of the run.
        test: clean test pictures.
        triggered: makes the triggered test pictures, or None; called at each evaluation.
        started: when the command began, by `time.monotonic`.
        evaluation_seconds: what one evaluation is expected to take.
        risks: measures the risks of a network, or None; called at each evaluation.
        closing_seconds: what is expected to take place after the last update; None is an evaluation.
    """

    def __init__(
        self, record: Record, run: Run, epochs: int, test: Images, triggered: Callable[[], Images | None],
        started: float, evaluation_seconds: float, risks: Callable[[nn.Module], Found] | None = None,
        closing_seconds: float | None = None,
    ) -> None:  # fmt: skip
        self.record, self.run, self.epochs, self.test, self.triggered = record, run, epochs, test, triggered
        self.started, self.evaluation_seconds, self.risks = started, evaluation_seconds, risks
        # Of the last epoch: what was scored, its score and its risks.
        self.last: tuple[str, Score, Found | None] | None = None
        self.findings: dict[str, Any] = {}
        record.clock = lambda: self.seconds
        self.earlier: float | None = None
        closing = evaluation_seconds if closing_seconds is None else closing_seconds
        # An epoch may end, and be evaluated, with the last update.
        left = 60 * (run.max_minutes or 0) - evaluation_seconds - closing
        self.limit = Limit(started + left) if run.max_minutes else None

    def session(self) -> Session:
        """How the loop talks to this watch."""
        evaluations = -(-self.epochs // self.run.eval_every)
        return Session(
            checkpoint=self.record,
            on_epoch=self.on_epoch,
            say=self.record.log,
            note=self.record.update_config,
            other_seconds=evaluations * self.evaluation_seconds,
            hint=SHORTER,
            limit=self.limit,
            findings=self.findings,
            data_checked=True,
        )

    def final(self, model: nn.Module, triggered: Images | None) -> Score:
        """The score of the result: that of the last evaluation if it was of the same weights, else measured now."""
        known = self._measured(model)
        return known[0] if known else score(model, self.test, triggered)

    def _measured(self, model: nn.Module) -> tuple[Score, Found | None] | None:
        """Score and risks of the last evaluation, if it was of the same weights."""
        return self.last[1:] if self.last is not None and self.last[0] == network_digest(model) else None

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, those before an interruption included."""
        if self.earlier is None:  # rows that stand here before the first new one come from an interrupted run
            last = self.record.rows[-1]["seconds"] if self.record.rows else 0.0
            self.earlier = max(last, self.record.seconds)
        return round(self.earlier + time.monotonic() - self.started, 2)

    def on_epoch(self, epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        """Evaluate if it is time, write a row, keep a copy if it is time; without `model` in the state only the row."""
        model: nn.Module | None = state.get("model")
        figures: dict[str, float | None] = {}
        if model is not None and (epoch % self.run.eval_every == 0 or epoch == self.epochs):
            found = score(model, self.test, self.triggered())
            figures = {name: share.percent if share else None for name, share in found.shares().items()}
            risks = self.risks(model) if self.risks is not None else None
            figures.update(risks.row() if risks else {})
            if epoch == self.epochs:
                self.last = network_digest(model), found, risks
        self.record.log_metrics(epoch=epoch, **losses, **figures, seconds=self.seconds)
        if self.record.config.get("compile") and not getattr(model, "compiled", True):
            self.record.update_config(compile=False)  # the compiler gave up, which the network has said
        if model is not None and self.run.frequency_save and epoch % self.run.frequency_save == 0:
            net, stage = getattr(model, "net", model), f"stage_{losses['stage']:.0f}_" if "stage" in losses else ""
            self.record.save_tensors(f"model_{stage}epoch_{epoch}", net.state_dict())
        return figures

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the record, with what the method found; a run that was ended early says where, and has a digest of its
        own."""
        ended = self.limit.ended if self.limit else None
        if ended:
            known = self.record.config
            identity, note = {**known["identity"], EARLY: ended}, f"ended early, {ended}"
            self.record.update_config(identity=identity, digest=digest(identity), notes=[*known.get("notes", []), note])
            summary = {**summary, EARLY: ended}
        found = {"findings": self.findings} if self.findings else {}
        self.record.finish({**summary, **found, "seconds": self.seconds})

    def last_risks(self, model: nn.Module) -> dict[str, Any]:
        """The risks of the result; a method that told the loop of no network gets its row here."""
        assert self.risks is not None
        known = self._measured(model)
        found = (known[1] if known else None) or self.risks(model)
        last = self.record.rows[-1] if self.record.rows else {"epoch": 0}
        if "r_adv" not in last:
            place = {"epoch": last["epoch"] + 1, **({"stage": last["stage"]} if "stage" in last else {})}
            self.record.log_metrics(**place, **found.row(), seconds=self.seconds)
        return found.summary()


def trigger_session(run: Run, started: float) -> Session | None:
    """How a trigger is made: with the limit of the run, if it has one; a trigger needs no evaluation."""
    return Session(limit=Limit(started + 60 * run.max_minutes, whole=True)) if run.max_minutes else None


def begin(record: Record, run: Run, identity: dict[str, Any], threads: int) -> None:
    """Start or resume a record with what was asked, the versions and the commit; `identity` determines the result.

    `threads` is used unless a number was asked for or the run began with another one, which changes the rounding.
    """
    facts = {
        "run": asdict(run),
        "command": shlex.join(sys.argv),
        "git": _commit(),
        "versions": {"sau": sau.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    record.begin(facts, versioned(identity), run.overwrite)
    record.update_config(threads=set_threads(run.threads, record.config.get("threads", threads)))


def _commit() -> str | None:
    """The commit of this code; None where it is in no repository, or lies in another one's folder without being its."""
    file = Path(__file__).resolve()
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]  # fails where HEAD lacks it
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.split()[0] if done is not None and done.returncode == 0 else None


def versioned(identity: dict[str, Any]) -> dict[str, Any]:
    """What determines a result, this version of the library included."""
    return {**identity, "sau": sau.__version__}


def warn(record: Record, request: Request, notes: Sequence[str]) -> None:
    """Say the notes, and which of the flags have no effect."""
    for note in notes:
        record.log(f"note: {note}")
    if request.ignored:
        said = {name: setting.origin for name, setting in request.given.items() if setting.origin.startswith("--")}
        reasons = "; ".join(f"{said.get(name, f'--{name}')}: {reason}" for name, reason in request.ignored.items())
        record.log(f"warning: flags without effect here: {reasons}")
