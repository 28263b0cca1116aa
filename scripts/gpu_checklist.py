"""The commands of gpu_checklist.sh, one after the other, and the table of what they found."""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PICTURES, EPOCHS, ROUNDS, CLEAN = 50_000, 100, 100, 2_500  # of the runs that the targets speak of
MINIATURE = {
    "train": ("--steps", "1"), "data": ("--steps", "1"), "eval": ("--pictures", "20"),
    "sau": ("--steps", "1", "--train_updates", "2", "--purify_updates", "1"),
    "runs": ("--pictures", "320", "--epochs", "1", "--rounds", "1"),
}  # fmt: skip
SMALL = ("--width", "4", "--epochs", "1", "--eval_every", "1")


@dataclass
class Checklist:
    """Commands within a time, and a row for each thing that was measured.

    Args:
        out: folder of the table, the records and the JSON files.
        end: when all must be over, by `time.monotonic`.
        data: flags that name the pictures.
        device: flag that names the device.
        smoke: everything in miniature.
        rows: what, measured, target.
    """

    out: Path
    end: float
    data: tuple[str, ...]
    device: str
    smoke: bool
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def run(self, name: str, *command: str) -> bool:
        """Run a command of the repository; a row says so if it fails or there is no time left."""
        left = self.end - time.monotonic()
        argv = [sys.executable, str(REPOSITORY / command[0]), *command[1:], "--device", self.device]
        print(f"\n== {name} ({left:.0f} s left): {' '.join(command)}", flush=True)
        try:
            done = subprocess.run(argv, cwd=self.out, stderr=subprocess.PIPE, text=True, timeout=max(1.0, left))
        except subprocess.TimeoutExpired:
            self.add(name, "no time left", "")
            return False
        if done.returncode:
            self.add(name, f"failed: {(done.stderr.strip().splitlines() or ['no word'])[-1]}", "")
        return done.returncode == 0

    def add(self, what: str, measured: str, target: str) -> None:
        """Add a row and write the table, so that what was measured is kept whatever comes."""
        self.rows.append((what, measured, target))
        lines = [
            "| what | measured | target |",
            "| --- | --- | --- |",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        (self.out / "table.md").write_text("\n".join(lines) + "\n")

    def bench(self, part: str, *flags: str, target: str, name: str = "") -> list[dict[str, Any]]:
        """Run a part of the benchmark; a row for each of its comparisons, in a file called by `name` or the part."""
        file = self.out / f"bench_{name or part}.json"
        small = ("--width", "4", "--batch_size", "16", "--repeats", "1", *MINIATURE.get(part, ()))
        flags = small if self.smoke else ("--width", "64", *flags)
        if not self.run(f"bench {part}", "scripts/bench.py", part, *self.data, *flags, "--json", str(file)):
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
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("datasets", nargs="?", type=Path, help="folder with CIFAR-10; none means digits")
    parser.add_argument("--out", type=Path, default=Path("gpu_checklist"), help="folder to write to [gpu_checklist]")
    parser.add_argument("--minutes", type=float, default=10.0, help="in which everything is over [10]")
    parser.add_argument("--device", default="auto", help="auto, cuda or one like cuda:1 [auto]")
    parser.add_argument("--smoke", action="store_true", help="in miniature")
    args = parser.parse_args(argv)
    data = ("--dataset", "digits")
    if args.datasets:
        data = ("--dataset", "cifar10", "--dataset_path", str(args.datasets.resolve()))
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work = Checklist(out, time.monotonic() + 60 * args.minutes, data, args.device, args.smoke)
    work.add("machine", _machine(args.device), "")
    work.add("pictures", "CIFAR-10" if args.datasets else "digits, in place of CIFAR-10", "")
    trained = work.bench("train", "--batch_size", "128", "--steps", "20", "--repeats", "3", target=">= 10")
    updates = ("--batch_size", "256", "--steps", "10", "--repeats", "3")  # Adam's state is made in the first of ten
    searched = work.bench("sau", *updates, target=">= 10")
    _runs(work, trained, searched)
    work.bench("data", "--batch_size", "128", "--steps", "20", "--repeats", "3", target="share <= 3 %")
    work.bench("eval", "--pictures", "10000", "--repeats", "3", target=">= 8")
    modes = ("--compiled", "default,reduce-overhead", "--repeats", "3")
    whole = ("--pictures", "5120", "--epochs", "4", "--rounds", "10", "--precisions", "bf16", "--repeats", "1")
    work.bench("runs", *whole, target=">= 10")
    work.bench("train", "--batch_size", "128", "--steps", "20", *modes, target="compiled", name="train_compiled")
    work.bench("sau", *updates, "--compiled", "default,reduce-overhead", target="compiled", name="sau_compiled")
    print((out / "table.md").read_text())


def _runs(work: Checklist, trained: list[dict[str, Any]], searched: list[dict[str, Any]]) -> None:
    """The whole runs that the targets speak of: an attack, SAU on it, and the fast recipe."""
    root = ("--record_root", str(work.out / "record"), "--overwrite", "true")
    long = SMALL if work.smoke else ("--epochs", str(EPOCHS))
    attack, defense = ("attack/badnet.py", *work.data, *root), ("defense/sau.py", *root)
    paper = ("--recipe", "paper", "--eval_every", "10", "--amp", "true") if not work.smoke else ("--recipe", "cpu")
    if work.run("attack", *attack, *paper, *long, "--save_folder_name", "paper", "--max_minutes", "5"):
        seen = EPOCHS * PICTURES
        _row(work, "attack, 100 epochs, width 64", work.record("paper"), seen, trained, "<= 150 s, aim 90")
    rounds = ("--epochs", "1") if work.smoke else ("--recipe", "paper", "--epochs", str(ROUNDS), "--amp", "true")
    if work.run("SAU", *defense, *rounds, "--result_file", "paper", "--max_minutes", "3"):
        found = work.record("paper", "defense", "sau")
        _row(work, "SAU, 100 rounds, width 64", found, ROUNDS * CLEAN, searched, "<= 60 s, aim 30")
    fast = ("--recipe", "cpu", *SMALL) if work.smoke else ("--recipe", "fast")
    if work.run("fast", *attack, *fast, "--save_folder_name", "fast", "--max_minutes", "3"):
        _row(work, "attack, fast recipe", work.record("fast"), 0, [], "about 60 s, ACC 90.5 to 92.5, ASR >= 92")


def _row(
    work: Checklist,
    what: str,
    summary: dict[str, Any] | None,
    pictures: int,
    measured: list[dict[str, Any]],
    target: str,
) -> None:
    """Seconds, scores and the share of the peak of a whole run."""
    assert summary is not None
    scores = summary.get("after", summary)
    text = f"{summary['seconds']:.0f} s, ACC {scores['acc']}, ASR {scores['asr']}, {summary['peak_memory_mb']:.0f} MB"
    text += f"; ended early: {summary['ended_early']}" if "ended_early" in summary else ""
    facts = next((row["details"]["ours"] for row in measured if row["name"].endswith("bf16")), None)
    if "digits" in work.data:  # 1,437 training pictures, a tenth of which the defender has
        scale = PICTURES / 1437 if "after" not in summary else CLEAN / 143
        text += f"; {scale * summary['seconds']:.0f} s if all of it grew with the pictures to CIFAR-10's"
    elif facts and pictures and not work.smoke and "ended_early" not in summary:
        done = facts["passes_per_image"] * facts["forward_flops"] * pictures / summary["seconds"]
        text += f", {100 * done / facts['peak_flops']:.0f} % of the measured bf16 peak, evaluations and start included"
    work.add(what, text, target)


def _machine(device: str) -> str:
    import torch

    cuda = torch.cuda.is_available() and device != "cpu"
    name = torch.cuda.get_device_name() if cuda else "no CUDA device: these are figures of the CPU"
    return f"{name}, torch {torch.__version__}"


if __name__ == "__main__":
    main(sys.argv[1:])
