"""What a command is asked, and what it keeps of a run: configuration, metrics, evaluations, copies of the weights."""

import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import sau
from sau.attack.triggers import network_digest
from sau.config import check, param
from sau.data.images import Images
from sau.data.sources import DATA_FOLDER
from sau.device import has_bf16, peak_memory_mb, set_threads
from sau.errors import require
from sau.evaluate import Score, score
from sau.loop import Limit, RunContext
from sau.models import Normalized
from sau.optim import Method
from sau.pgd import Bounded
from sau.quality import RADIUS
from sau.record.folder import EARLY, Record, digest
from sau.risk import Found, Search

RecipeName = Literal["paper", "cpu", "fast"]
RECIPES: dict[str, str] = {
    "paper": "the published settings; the default on CUDA",
    "cpu": "a narrow network and few epochs; the default without CUDA",
    "fast": "a quarter of the epochs of paper for the attacked network, on CUDA",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every command is asked."""

    dataset: str = param(
        "cifar10", "cifar10, cifar100, gtsrb, tiny, digits or folder (see sau list); for a defense, that of the record"
    )
    dataset_path: str = param(DATA_FOLDER, "folder of the data sets; a defense looks where the attack found them")
    model: str = param(
        "preactresnet18", "also torchvision's, like vgg19_bn, or timm's, like timm:resnet18; a defense's: the record's"
    )
    recipe: Literal["auto", RecipeName] = param(
        "auto", "settings to start from (see sau list); auto: paper on CUDA, else cpu; for a defense, the record's"
    )
    device: str = param("auto", "auto, cpu, cuda or one like cuda:1")
    amp: bool | None = param(None, "true is bf16, false fp32; auto is bf16 where the device has bf16 arithmetic")
    threads: int = param(0, "CPU threads; 0 means OMP_NUM_THREADS where it is set, else all cores")
    compile: bool = param(False, "run the network through torch.compile (attacks, sau, at, ft, fp, fst and d3)")
    max_minutes: float | None = param(None, "stop training early, so that the run ends within so many minutes", gt=0)
    random_seed: int = param(0, "seed of the weights, the order of images and every choice of images", ge=0, lt=2**32)
    record_root: str = param("./record", "folder of the result folders")
    overwrite: bool = param(False, "discard what is in the result folder")
    eval_every: int = param(10, "epochs between two evaluations; the last epoch is always evaluated", ge=1)
    frequency_save: int = param(0, "epochs between two saved copies of the weights; 0 saves none", ge=0)
    save_folder_name: str | None = param(
        None, "name of the result folder; none: after the time, the defense or the file of your network"
    )
    yaml_path: str | None = param(None, "YAML file with any of these settings")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class AttackRun(Run):
    """What an attack is asked besides its own hyperparameters."""

    width: int = param(64, "channels of preactresnet18's first stage (published: 64); torchvision's have no width")
    img_size: int | None = param(None, "height and width of the images in pixels (gtsrb, tiny, folder)")
    bd_yaml_path: str | None = param(None, "YAML file with settings of the attack; overrides yaml_path")
    attack: str | None = param(None, "name of the attack; must agree with the script")
    trigger_radius: float = param(RADIUS, "radius of the L_inf ball in which the summary counts triggers", gt=0, lt=1)


@dataclass(frozen=True, kw_only=True)
class DefenseRun(Run):
    """What a defense is asked besides its own hyperparameters."""

    result_file: str | None = param(None, "an attack's folder, ours or BackdoorBench's: below record_root, or a path")
    ratio: float = param(0.05, "share of the clean training set that the defender has", gt=0, le=1)
    index: str | None = param(None, "file with the indices of the defender's images, one a line; overrides ratio")
    track_risk: bool = param(False, "also measure the risks R_cl, R_bd, R_adv and R_share at every evaluation")
    risk_samples: int = param(1000, "test images for the risks", ge=1)
    risk_norm: Bounded = param(Search.norm, "norm of the ball that is searched")
    risk_eps: float = param(Search.eps, "radius of the ball, in [0, 1] pixels; in L_inf below 1", gt=0)
    risk_steps: int = param(Search.steps, "gradient steps of each search", ge=1)
    risk_restarts: int = param(Search.restarts, "searches from random places", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.search()

    def search(self) -> Search:
        """How the risks are searched; ConfigError if it cannot be."""
        return Search(norm=self.risk_norm, eps=self.risk_eps, steps=self.risk_steps, restarts=self.risk_restarts)


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What a defense is asked about a network of your own; all but `model_file` and `clean_dir` may be left out."""

    model_file: str | None = param(
        None, "file of your network's weights, or folder of timm, transformers or open_clip; nothing in it runs"
    )
    clean_dir: str | None = param(None, "folder of clean images by class, with the names or the order of the file's")
    arch: str = param("auto", "auto (found by the weights), a name, timm:NAME, or module:function, which is called")
    model_prefix: str | None = param(None, "prefix of the weights in a file of several networks, like state_dict_ema")
    trust_code: bool = param(False, "allow module:function, which runs that code")
    mean: tuple[float, ...] = param((), "per-channel mean that the network expects subtracted, like 0.49,0.48,0.45")
    std: tuple[float, ...] = param((), "per-channel standard deviation that the network expects to be divided by", gt=0)
    input_size: int = param(32, "height and width that the images are resized to", ge=1)
    check_share: float = param(0.2, "share of each class's images that is held back for measuring", gt=0, lt=1)

    def __post_init__(self) -> None:
        check(self)
        both = (self.model_file is None) == (self.clean_dir is None)
        require("clean_dir", self.clean_dir, both, "a folder of clean images by class, with model_file")
        fits = len(self.mean) == len(self.std) in (0, 1, 3)
        require("std", self.std, fits, "as many values as mean: none, 1 or 3")


def identity(method: Method, run: Run, more: Mapping[str, Any]) -> dict[str, Any]:
    """All that determines the result of a run: the method, `more`, the seed and the version of the library."""
    kind = "attack" if isinstance(run, AttackRun) else "defense"
    return {kind: method.name, **method.identity(), **more, "random_seed": run.random_seed, "sau": sau.__version__}


def begin(
    record: Record, run: Run, determined: dict[str, Any], model: Normalized, method: Method, device: torch.device,
    facts: Mapping[str, Any], lines: Sequence[str], ignored: Mapping[str, str],
) -> None:  # fmt: skip
    """Start or resume a record and log `lines`; set threads, precision and torch.compile of the run. `determined` is
    the `identity`, `facts` are written to `config.yaml` as well, `ignored` are flags without effect, each with the
    reason. Errors are those of `can_start`."""
    record.can_start(determined, run.overwrite, run.amp)
    earlier = record.config  # of the run that is resumed; empty in a new one
    threads = set_threads(run.threads, earlier.get("threads"))
    amp = has_bf16(device) if run.amp is None else run.amp
    model.amp = bool(earlier.get("amp", amp))
    model.compiled = bool(earlier.get("compile", run.compile and method.compiles))
    machine = {"threads": threads, "amp": model.amp, "device": device.type, "compile": model.compiled}
    versions = {"sau": sau.__version__, "torch": torch.__version__, "python": platform.python_version()}
    asked = {"run": asdict(run), "command": shlex.join(sys.argv), "git": _commit(), "versions": versions}
    record.begin({**asked, **machine, **facts}, determined, run.overwrite)
    for line in (*lines, *(f"note: {note}" for note in facts["notes"])):
        record.log(line)
    if ignored:
        reasons = "; ".join(f"--{name}: {why}" for name, why in ignored.items())
        record.log(f"warning: flags without effect here: {reasons}")
    record.log(f"precision {'bf16' if model.amp else 'fp32'} on {device}, {threads} thread{'s' * (threads > 1)}")
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


@dataclass
class RunLogger:
    """Evaluates a run, writes its metrics and closes its record."""

    record: Record
    run: Run
    epochs: int
    test: Images  # clean
    triggered: Callable[[], Images | None]  # makes the triggered test images, or None; called at each evaluation
    evaluation_seconds: float  # what one evaluation is expected to take
    risks: Callable[[nn.Module], Found] | None = None  # measures the risks of a network at each evaluation
    closing_seconds: float = 0.0  # what is expected to follow the last evaluation
    last: dict[str, tuple[Score, Found | None]] = field(default_factory=dict, init=False)  # by the network's digest
    session: RunContext = field(init=False)  # what the loop needs of this

    def __post_init__(self) -> None:
        evaluations = -(-self.epochs // self.run.eval_every)
        self.session = RunContext(
            checkpoint=self.record, on_epoch=self.on_epoch, say=self.record.log, note=self.record.update_config,
            other_seconds=evaluations * self.evaluation_seconds,
        )  # fmt: skip
        if self.run.max_minutes:  # an epoch may end, and be evaluated, with the last update
            after = 2 * self.evaluation_seconds + self.closing_seconds
            self.session.limit = Limit(self.record.started + 60 * self.run.max_minutes - after)

    def on_epoch(self, epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        """Evaluate if it is time, write a row, keep a copy if it is time; without `model` in the state only the row."""
        model: nn.Module | None = state.get("model")
        figures: dict[str, float | None] = {}
        last = epoch == state.get("epochs", self.epochs)
        if model is not None and (epoch % self.run.eval_every == 0 or last):
            found, risks = self._measure(model)
            figures = {name: share.percent if share else None for name, share in found.shares().items()}
            figures |= risks.row() if risks else {}
            self.last = {network_digest(model): (found, risks)} if last else {}
        self.record.log_metrics(epoch=epoch, **losses, **figures, seconds=self.record.seconds)
        if model is not None and self.run.frequency_save and epoch % self.run.frequency_save == 0:
            net, stage = getattr(model, "net", model), f"stage_{losses['stage']:.0f}_" if "stage" in losses else ""
            self.record.save_tensors(f"model_{stage}epoch_{epoch}", net.state_dict())
        return figures

    def _measure(self, model: nn.Module) -> tuple[Score, Found | None]:
        return score(model, self.test, self.triggered()), self.risks(model) if self.risks is not None else None

    def final(self, model: nn.Module) -> tuple[Score, Found | None]:
        """The score and the risks of the result, measured now unless the last evaluation was of the same weights; a
        method that told the loop of no network gets the row of its risks here."""
        found, risks = self.last.get(network_digest(model)) or self._measure(model)
        last = self.record.rows[-1] if self.record.rows else {"epoch": 0}
        if risks and "r_adv" not in last:
            place = {"epoch": last["epoch"] + 1, **({"stage": last["stage"]} if "stage" in last else {})}
            self.record.log_metrics(**place, **risks.row(), seconds=self.record.seconds)
        return found, risks

    def finish(self, summary: dict[str, Any]) -> None:
        """Close the record; a run that was ended early says where, and has a digest of its own."""
        summary = {**summary, "peak_memory_mb": peak_memory_mb(self.test.pixels.device)}
        if self.session.limit and (ended := self.session.limit.ended):
            known = self.record.config
            identity, note = {**known["identity"], EARLY: ended}, f"ended early, {ended}"
            self.record.update_config(identity=identity, digest=digest(identity), notes=[*known.get("notes", []), note])
            summary[EARLY] = ended
        if self.session.findings:
            summary["findings"] = self.session.findings
        self.record.finish({**summary, "seconds": self.record.seconds})
