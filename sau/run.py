"""What a command is asked, and what it keeps of a run: configuration, metrics, evaluations, copies of the weights."""

import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import sau
from sau.attack.triggers import network_digest
from sau.config import Method, check, param
from sau.data.images import Images
from sau.data.sources import DATA_FOLDER
from sau.device import has_bf16, set_threads
from sau.errors import ConfigError
from sau.evaluate import Score, score
from sau.flags import RecipeName
from sau.loop import Limit, RunContext
from sau.models import Normalized
from sau.pgd import Bounded, Search
from sau.quality import RADIUS
from sau.record.folder import EARLY, Record, digest
from sau.risk import Found


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command is asked."""

    dataset: str = param(
        "cifar10",
        "cifar10, cifar100, gtsrb, tiny (Tiny ImageNet), digits (small, needs no files) or folder (your own "
        "images, in train/CLASS/ and test/CLASS/ of dataset_path); of a defense the record's",
    )
    dataset_path: str = param(
        DATA_FOLDER,
        "folder that holds the data sets, in the benchmark's or in torchvision's layout; a defense looks where the "
        "attack found them",
    )
    model: str = param(
        "preactresnet18",
        "preactresnet18, or a classifier of torchvision by its name, like vgg19_bn; of a defense the record's",
    )
    recipe: Literal["auto", RecipeName] = param(
        "auto",
        "shipped settings to start from: paper (as published), cpu (narrow network, few epochs), or auto, which is "
        "paper on CUDA and cpu elsewhere; a defense takes the recipe of the record. fast trains a victim in a "
        "quarter of paper's epochs; defenses, and attacks inside the batches, then have those of paper",
    )
    device: str = param("auto", "auto, cpu, cuda or one like cuda:1")
    amp: bool | None = param(
        None, "true is bf16, false is fp32; auto is bf16 where the device has bf16 arithmetic, else fp32"
    )
    threads: int = param(0, "CPU threads; 0 means OMP_NUM_THREADS where it is set, else all cores")
    compile: bool = param(
        False,
        "run the network through torch.compile (attacks, sau, at, ft, fp, fst and d3). CUDA graphs need no flag: "
        "on CUDA the updates of attacks, sau, at, ft, ft-sam, fst, d3 and nc are captured and repeated",
    )
    max_minutes: float | None = param(
        None, "ends the updates in time for the run to end after so many minutes; none means no limit", gt=0
    )
    random_seed: int = param(0, "of the weights, of the order of images and of every choice of images", ge=0, lt=2**32)
    record_root: str = param("./record", "folder of the result folders")
    overwrite: bool = param(False, "discard what is in the result folder")
    eval_every: int = param(10, "epochs between two evaluations; the last epoch is always evaluated", ge=1)
    frequency_save: int = param(0, "epochs between two copies of the weights that are kept; 0 means none", ge=0)
    save_folder_name: str | None = param(
        None,
        "result folder, of an attack below record_root (none makes one of the time and the attack), of a defense "
        "below `defense` in the attack's folder (none means the defense's name), of a network of your own below "
        "record_root (none means its file and the defense)",
    )
    yaml_path: str | None = param(None, "YAML file with any of these settings")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """What an attack is asked besides its own hyperparameters."""

    width: int = param(
        64, "channels of preactresnet18's first stage; the published network has 64, torchvision's have no width"
    )
    img_size: int | None = param(
        None, "height and width of the images in pixels (gtsrb, tiny, folder); none means the data set's own"
    )
    bd_yaml_path: str | None = param(None, "YAML file with settings of the attack; it beats yaml_path")
    attack: str | None = param(None, "the attack's name, which the script already says; another one is refused")
    trigger_radius: float = param(
        RADIUS, "of the L-infinity ball, in [0, 1] pixels, that the summary counts triggers in (0.2: SAU's)", gt=0, lt=1
    )


@dataclass(frozen=True, kw_only=True)
class DefenseRun(Run):
    """What a defense is asked besides its own hyperparameters."""

    result_file: str | None = param(
        None, "result folder of the attack, ours or BackdoorBench's: a name below record_root, or a path"
    )
    ratio: float = param(0.05, "share of the clean training set that the defender has", gt=0, le=1)
    index: str | None = param(None, "file with the indices of the defender's images, one a line; beats ratio")
    track_risk: bool = param(
        False, "at every evaluation, before and after, also measure the risks R_cl, R_bd, R_adv and R_share"
    )
    risk_samples: int = param(1000, "test images that the risks are measured on", ge=1)
    risk_norm: Bounded = param(Search.norm, "norm of the ball that is searched")
    risk_eps: float = param(Search.eps, "its radius, in [0, 1] pixels; in L_inf below 1", gt=0)
    risk_steps: int = param(Search.steps, "gradient steps of each search", ge=1)
    risk_restarts: int = param(Search.restarts, "searches from random places", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.search()

    def search(self) -> Search:
        """How the risks are searched; ConfigError if it cannot be."""
        return Search(norm=self.risk_norm, eps=self.risk_eps, steps=self.risk_steps, restarts=self.risk_restarts)


def versioned(identity: dict[str, Any]) -> dict[str, Any]:
    """What determines a result, this version of the library included."""
    return {**identity, "sau": sau.__version__}


def begin(
    record: Record, run: Run, identity: dict[str, Any], model: Normalized, method: Method, where: torch.device,
    facts: Mapping[str, Any], first_line: str, ignored: str = "",
) -> None:  # fmt: skip
    """Start or resume a record and write its configuration; set threads, precision and torch.compile of the run.

    Args:
        record: the folder.
        run: what was asked.
        identity: what determines the result.
        model: the network; becomes bf16 where the device has bf16 arithmetic, unless `run.amp` says otherwise.
        method: the attack or defense.
        where: the device.
        facts: what else belongs into the configuration; its `notes` are logged.
        first_line: logged first.
        ignored: which flags have no effect and why, if there are any.

    Raises ConfigError if an interrupted run began in another precision than is asked now.
    """
    record.can_start(versioned(identity), run.overwrite)
    earlier = record.config  # of the run that is resumed; empty in a new one
    threads = set_threads(run.threads, earlier.get("threads"))
    before = earlier.get("amp")
    if before is not None and run.amp not in (None, before):
        raise ConfigError(f"amp is {run.amp}, but this run began with {before}; leave it out, or say --overwrite true")
    chosen = has_bf16(where) if run.amp is None else run.amp
    model.amp = chosen if before is None else before
    model.compiled = bool(earlier.get("compile", run.compile and method.compiles))
    machine = {"threads": threads, "amp": model.amp, "device": where.type, "compile": model.compiled}
    versions = {"sau": sau.__version__, "torch": torch.__version__, "python": platform.python_version()}
    asked = {"run": asdict(run), "command": shlex.join(sys.argv), "git": _commit(), "versions": versions}
    record.begin({**asked, **machine, **facts}, versioned(identity), run.overwrite)
    record.log(first_line)
    for note in facts.get("notes", ()):
        record.log(f"note: {note}")
    if ignored:
        record.log(f"warning: flags without effect here: {ignored}")
    record.log(f"precision {'bf16' if model.amp else 'fp32'} on {where}, {threads} threads")
    if run.compile != model.compiled:
        why = "this run goes on as it began" if method.compiles else f"the networks of {method.name} cannot be compiled"
        record.log(f"note: {why}, so --compile has no effect")
    if model.compiled:
        record.log("compiling the network (torch.compile), which takes up to a minute")


def _commit() -> str | None:
    """The commit of this code; None where it is in no repository, or lies in another one's folder without being its."""
    file = Path(__file__).resolve()
    command = ["git", "-C", str(file.parent), "rev-parse", "HEAD", f"HEAD:./{file.name}"]  # fails where HEAD lacks it
    done = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return done.stdout.split()[0] if done is not None and done.returncode == 0 else None


def trigger_session(run: Run, started: float) -> RunContext | None:
    """How a trigger is made: within the limit of the run, if it has one; a trigger needs no evaluation."""
    return RunContext(limit=Limit(started + 60 * run.max_minutes, whole=True)) if run.max_minutes else None


class RunLogger:
    """Evaluates a run, writes its metrics and closes its record.

    Args:
        record: where metrics and copies go.
        run: how often to evaluate and to copy.
        epochs: of the run.
        test: clean test images.
        triggered: makes the triggered test images, or None; called at each evaluation.
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
        self.last: tuple[str, Score, Found | None] | None = None  # of the last evaluated network
        self.findings: dict[str, Any] = {}
        self.earlier: float | None = None
        record.clock = lambda: self.seconds
        closing = evaluation_seconds if closing_seconds is None else closing_seconds
        # An epoch may end, and be evaluated, with the last update.
        left = 60 * (run.max_minutes or 0) - evaluation_seconds - closing
        self.limit = Limit(started + left) if run.max_minutes else None

    def session(self) -> RunContext:
        """What the loop needs of this."""
        evaluations = -(-self.epochs // self.run.eval_every)
        return RunContext(
            checkpoint=self.record, on_epoch=self.on_epoch, say=self.record.log, note=self.record.update_config,
            other_seconds=evaluations * self.evaluation_seconds, limit=self.limit, findings=self.findings,
            data_checked=True,
        )  # fmt: skip

    def final(self, model: nn.Module, triggered: Images | None) -> Score:
        """The score of the result: that of the last evaluation if it was of the same weights, else measured now."""
        known = self._measured(model)
        return known[0] if known else score(model, self.test, triggered)

    def _measured(self, model: nn.Module) -> tuple[Score, Found | None] | None:
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
        if model is not None and self.run.frequency_save and epoch % self.run.frequency_save == 0:
            net, stage = getattr(model, "net", model), f"stage_{losses['stage']:.0f}_" if "stage" in losses else ""
            self.record.save_tensors(f"model_{stage}epoch_{epoch}", net.state_dict())
        return figures

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

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the record; a run that was ended early says where, and has a digest of its own."""
        ended = self.limit.ended if self.limit else None
        if ended:
            known = self.record.config
            identity, note = {**known["identity"], EARLY: ended}, f"ended early, {ended}"
            self.record.update_config(identity=identity, digest=digest(identity), notes=[*known.get("notes", []), note])
            summary = {**summary, EARLY: ended}
        found = {"findings": self.findings} if self.findings else {}
        self.record.finish({**summary, **found, "seconds": self.seconds})
