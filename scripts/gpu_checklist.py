"""The commands of gpu_checklist.sh, one after the other, and the table of what they found."""

import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sau.command.arguments import Parser

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES, EPOCHS, ROUNDS, CLEAN = 50_000, 100, 100, 2_500  # of the runs that the targets speak of
MINIATURE = {
    "train": ("--steps", "1"), "data": ("--steps", "1"), "eval": ("--pictures", "20"),
    "sau": ("--steps", "1", "--train_updates", "2", "--purify_updates", "1"),
    "runs": ("--pictures", "320", "--epochs", "1", "--rounds", "1"),
}  # fmt: skip
# What is measured, in this order, and the seconds that are kept for it, for whole runs more than their targets; what is
# over earlier leaves them to the next.
KEPT = {
    "attack": 165, "SAU": 75, "fast": 75, "eval": 20, "data": 15, "tests": 40, "train": 45, "sau": 45, "runs": 110,
}  # fmt: skip
STARTS = 15.0  # seconds that a command takes before it counts its own
_PATHS = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]  # this copy, wherever one is installed
_OWN = {**os.environ, "PYTHONPATH": os.pathsep.join(_PATHS)}
SMALL = ("--recipe", "cpu", "--width", "4", "--epochs", "1", "--eval_every", "1")


@dataclass
class Checklist:
    """Commands within a time, and a row for each thing that was measured.

    Args:
        out: folder of the table, the records and the JSON files.
        end: when all must be over, by `time.monotonic`.
        data: flags that name the pictures.
        device: flag that names the device.
        smoke: everything in miniature.
        share: of the seconds that are kept for each, where there are more or fewer than ten minutes.
        rows: what, measured, target.
    """

    out: Path
    end: float
    data: tuple[str, ...]
    device: str
    smoke: bool
    share: float
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def left(self, name: str) -> float:
        """Seconds that are left for `name`: all but what is kept for what comes after it."""
        names = [] if self.smoke else list(KEPT)[list(KEPT).index(name) + 1 :]  # a miniature on a CPU is no measurement
        return max(1.0, self.end - time.monotonic() - self.share * sum(KEPT[after] for after in names))

    def run(self, name: str, *command: str) -> bool:
        """Run a command of the repository; a row says so if it fails or its time is over."""
        return self.call(name, str(REPOSITORY / command[0]), *command[1:], "--device", self.device) is not None

    def call(self, name: str, *words: str, stdout: int | None = None) -> str | None:
        """Run python on `words`; its output, if `stdout` is a pipe, or None after a row that says why it failed."""
        left = self.left(name)
        print(f"\n== {name} ({left:.0f} s at most): {' '.join(words)}", flush=True)
        argv = [sys.executable, *words]
        try:
            done = subprocess.run(
                argv, cwd=self.out, env=_OWN, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=left
            )
        except subprocess.TimeoutExpired:
            self.add(name, f"no end in {left:.0f} s", "")
            return None
        said = done.stdout or ""
        if done.returncode:
            self.add(name, f"failed: {((done.stderr.strip() or said.strip()).splitlines() or ['no word'])[-1]}", "")
            return None
        return said.strip()

    def add(self, what: str, measured: str, target: str) -> None:
        """Add a row and write the table, so that what was measured is kept whatever comes."""
        self.rows.append((what, measured, target))
        lines = [
            "| what | measured | target |",
            "| --- | --- | --- |",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        (self.out / "table.md").write_text("\n".join(lines) + "\n")

    def bench(self, part: str, *flags: str, target: str) -> list[dict[str, Any]]:
        """Run a part of the benchmark; a row for each of its comparisons, in a file called by the part."""
        file = self.out / f"bench_{part}.json"
        small = ("--width", "4", "--batch_size", "16", "--repeats", "1", *MINIATURE.get(part, ()))
        flags = small if self.smoke else ("--width", "64", *flags)
        if not self.run(part, "scripts/bench.py", part, *self.data, *flags, "--json", str(file)):
            return []
        rows = json.loads(file.read_text())["rows"]
        for row in rows:
            ours = row.get("details", {}).get("ours", {})
            share = f", {100 * ours['share_of_peak']:.0f} % of the measured peak" if ours else ""
            spread = f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            self.add(
                row["name"], f"{spread}; {row['ours']:.4g} against {row['reference']:.4g} {row['unit']}{share}", target
            )
        return rows

    def record(self, name: str, *folder: str) -> dict[str, Any] | None:
        """The summary of a record, if it was finished."""
        file = self.out / "record" / name / Path(*folder) / "summary.json"
        return json.loads(file.read_text()) if file.is_file() else None


def main(argv: Sequence[str]) -> None:
    """Measure, as far as the time goes."""
    parser = Parser((__doc__ or "").split("\n")[0])
    parser.add_argument("datasets", nargs="?", type=Path, help="folder with CIFAR-10; none means digits")
    parser.add_argument("--out", type=Path, default=Path("gpu_checklist"), help="folder to write to [gpu_checklist]")
    parser.add_argument("--minutes", type=float, default=10.0, help="in which everything is over [10]")
    parser.add_argument("--device", default="auto", help="auto, cuda or one like cuda:1 [auto]")
    parser.add_argument("--smoke", action="store_true", help="in miniature")
    args = parser.parse_args(argv)
    machine = _machine(args.device)
    if not (machine or args.smoke):
        parser.error("no CUDA device here, and the targets are a card's; --smoke runs all in miniature, on the CPU too")
    if not 0 < args.minutes < math.inf:
        parser.error(f"--minutes is {args.minutes}, allowed is above 0")
    data = ("--dataset", "digits")
    if args.datasets:
        _look(args.datasets)
        data = ("--dataset", "cifar10", "--dataset_path", str(args.datasets.resolve()))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * args.minutes
    work = Checklist(out, time.monotonic() + seconds, data, args.device, args.smoke, seconds / 600)
    work.add("machine", machine or "no CUDA device: these are figures of the CPU", "")
    work.add("pictures", "CIFAR-10" if args.datasets else "digits, in place of CIFAR-10", "")
    _measure(work)
    print((out / "table.md").read_text())


def _look(datasets: Path) -> None:
    """Exit with a line if CIFAR-10 is not there, of which every row would fail."""
    sys.path.insert(0, str(REPOSITORY))
    from sau.data.sources import source
    from sau.errors import SauError

    try:
        source("cifar10").find(datasets)
    except SauError as error:
        sys.exit(f"error: {error}")


def _measure(work: Checklist) -> None:
    """Everything, in the order of `KEPT`."""
    steps = ("--batch_size", "128", "--steps", "20", "--repeats", "3")
    updates = ("--batch_size", "256", "--steps", "5", "--repeats", "3")  # Adam's state is made in the first of five
    speeds = _runs(work)
    work.bench("eval", "--pictures", "4000", "--repeats", "3", target=">= 8")
    work.bench("data", *steps, target="share <= 3 %")
    files = [str(file) for file in (REPOSITORY / "tests").glob("test_*.py") if "mark.gpu" in file.read_text()]
    asked = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files)  # to read them all takes its time
    said = work.call("tests", *asked, stdout=subprocess.PIPE)
    if said is not None:
        work.add("tests that need a card", said.splitlines()[-1], "none fails")
    for name, flags in (("train", steps), ("sau", updates)):
        facts = work.bench(name, *flags, target=">= 10")
        _share(work, *speeds.get(name, ("", 0.0)), facts)
    whole = ("--pictures", str(PICTURES), "--epochs", "3", "--rounds", "5", "--precisions", "bf16", "--repeats", "1")
    work.bench("runs", *whole, target=">= 10")


def _runs(work: Checklist) -> dict[str, tuple[str, float]]:
    """The whole runs that the targets speak of: an attack, SAU on it, and the fast recipe. Returns, by the part of the
    benchmark that counts the operations of a picture, what ran, and how many pictures a second it went through."""
    speeds = {}
    attack = ("attack/badnet.py", *work.data, *_root(work))
    long = ("--recipe", "paper", "--epochs", str(EPOCHS), "--eval_every", "10", "--amp", "true")
    paper = SMALL if work.smoke else long
    if work.run("attack", *attack, *paper, "--save_folder_name", "paper", *_minutes(work, "attack")):
        what = f"attack, {EPOCHS} epochs, width 64"
        speeds["train"] = what, EPOCHS * PICTURES * _row(work, what, work.record("paper"), "<= 150 s, aim 90")
    rounds = ("--epochs", "1") if work.smoke else ("--recipe", "paper", "--epochs", str(ROUNDS), "--amp", "true")
    own = ("--result_file", "paper", "--save_folder_name", "sau")
    if work.run("SAU", "defense/sau.py", *_root(work), *rounds, *own, *_minutes(work, "SAU")):
        what, found = f"SAU, {ROUNDS} rounds, width 64", work.record("paper", "defense", "sau")
        speeds["sau"] = what, ROUNDS * CLEAN * _row(work, what, found, "<= 60 s, aim 30")
    fast = SMALL if work.smoke else ("--recipe", "fast")
    if not work.smoke and "digits" in work.data:
        work.add("attack, fast recipe", "left out: digits have none", "")
    elif work.run("fast", *attack, *fast, "--save_folder_name", "fast", *_minutes(work, "fast")):
        _row(work, "attack, fast recipe", work.record("fast"), "about 60 s, ACC 90.5 to 92.5, ASR >= 92")
    return speeds


def _root(work: Checklist) -> tuple[str, ...]:
    """Flags that name the folder of the records."""
    return "--record_root", str(work.out / "record"), "--overwrite", "true"


def _minutes(work: Checklist, name: str) -> tuple[str, str]:
    """How long a whole run may take, so that it ends by itself and leaves a record."""
    return "--max_minutes", f"{max(5.0, work.left(name) - STARTS) / 60:.2f}"


def _row(work: Checklist, what: str, summary: dict[str, Any] | None, target: str) -> float:
    """Seconds and scores of a whole run; returns the share of it that a second did."""
    assert summary is not None
    scores = summary.get("after", summary)
    text = f"{summary['seconds']:.0f} s, ACC {scores['acc']}, ASR {scores['asr']}, {summary['peak_memory_mb']:.0f} MB"
    share = 1.0  # of the run that was done
    if "ended_early" in summary:
        done, whole, batch, batches = map(int, re.findall(r"\d+", summary["ended_early"]))
        share = (done - 1 + (batch - 1) / batches) / whole
        pace = f", {summary['seconds'] / share:.0f} s at that pace" if share else ""
        text += f"; ended early: {summary['ended_early']}{pace}"
    if "digits" in work.data:  # 1,437 training pictures, a tenth of which the defender has
        scale = PICTURES / 1437 if "after" not in summary else CLEAN / 143
        text += f"; {scale * summary['seconds']:.0f} s if all of it grew with the pictures to CIFAR-10's"
    work.add(what, text, target)
    return float(share / summary["seconds"])


def _share(work: Checklist, what: str, speed: float, measured: list[dict[str, Any]]) -> None:
    """The share of the peak at which a run went through so many pictures a second."""
    facts = next((row["details"]["ours"] for row in measured if row["name"].endswith("bf16")), None)
    if facts and speed and "digits" not in work.data:
        share = speed * facts["passes_per_image"] * facts["forward_flops"] / facts["peak_flops"]
        work.add(what, f"{100 * share:.0f} % of the measured bf16 peak, evaluations and start included", "")


def _machine(device: str) -> str:
    """The name of the card and torch's version; empty where there is no card."""
    try:
        import torch
    except ImportError:
        sys.exit(f"no torch in {sys.executable}; run bash scripts/demo.sh first, or name another python in PYTHON")
    if device == "cpu" or not torch.cuda.is_available():
        return ""
    return f"{torch.cuda.get_device_name(None if device == 'auto' else device)}, torch {torch.__version__}"


if __name__ == "__main__":
    main(sys.argv[1:])
