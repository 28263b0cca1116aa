"""Runs of the command line in processes of their own, forked from this one so that nothing is imported twice."""

import io
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sau import cli
from sau.attack import ATTACKS, ssba
from sau.command.watch import Watch
from sau.data import sources
from sau.defense import DEFENSES
from sau.settings.config import options

QUICK = ("--threads", "1", "--amp", "false", "--device", "cpu")
METHODS = [*(("attack", name) for name in ATTACKS), *(("defense", name) for name in DEFENSES)]
SMALL = {  # what makes methods short, where they have it
    "epochs": 2, "batch_size": 32, "pratio": 0.05, "adv_steps": 2, "nb_iter": 4, "ssba_epochs": 8,
    "ssba_lr": 1e-3, "ssba_residual": True, "ssba_batch_size": 16, "clean_train_epochs": 1,
    "warm_epochs": 1, "te_epochs": 1, "nc_epoch": 2, "unlearning_epochs": 2, "recovering_epochs": 2,
}  # fmt: skip


def few_digits() -> sources.Source:
    """The digits as a data set of 240 pictures to train with and 60 to test with."""
    train, test = (images[torch.arange(n)] for images, n in zip(sources.load("digits"), (240, 60), strict=True))
    return replace(sources.SOURCES["digits"], read=lambda root, size: (train, test))


def shrink() -> None:
    """For this process: the digits are few, and SSBA's schedule is as short."""
    sources.SOURCES["digits"] = few_digits()
    ssba.WAIT, ssba.RAMP = 10, 20  # updates; the encoder has few here


@dataclass(frozen=True)
class Row:
    """A promise and what became of it: `survived` of `injected` faults."""

    row: str
    fault: str
    injected: int
    survived: int
    figures: str


def arguments(kind: str, name: str, root: Path, seed: int = 0) -> list[str]:
    """The command line of a short run: attacks make `root/NAME`, defenses purify `root/victim`."""
    method = (ATTACKS if kind == "attack" else DEFENSES)[name]
    known = {**options(method), "epochs": None, "batch_size": None} if kind == "attack" else options(method)
    small = [word for key, value in SMALL.items() if key in known for word in (f"--{key}", str(value))]
    where = ("--dataset", "digits", "--width", "4", "--save_folder_name", name, "--eval_every", "2")
    target = where if kind == "attack" else ("--result_file", "victim", "--ratio", "0.25")
    return [kind, name, *target, *small, *QUICK, "--record_root", str(root), "--random_seed", str(seed)]


def result(kind: str, name: str, root: Path) -> Path:
    """The folder that `arguments` leads to."""
    return root / name if kind == "attack" else root / "victim" / "defense" / name


def tensors(folder: Path) -> dict[str, bytes]:
    """The tensors of a finished record, byte by byte."""
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def forked(work: Callable[[], int], kill_after: float | None = None) -> tuple[int, str]:
    """`work` in a forked process: its status, or minus the signal that ended it, and what it wrote to stderr.

    After `kill_after` seconds it gets SIGKILL.
    """
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, text = 99, io.StringIO()
        try:
            os.close(here)
            with redirect_stdout(io.StringIO()), redirect_stderr(text):
                status = work()
        except BaseException as error:  # for the report of the parent
            text.write(f"{type(error).__name__}: {error}")
        os.write(there, text.getvalue().encode()[-4000:])
        os._exit(status)
    os.close(there)
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        done, found = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if deadline is not None and time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.002)
    with os.fdopen(here, "rb") as pipe:
        return os.waitstatus_to_exitcode(found), pipe.read().decode()


def run(argv: list[str], cache: Path, prepare: Callable[[], None] = lambda: None) -> Callable[[], int]:
    """A command as work for `forked`: checkpoints after every batch, triggers kept in `cache`."""

    def work() -> int:
        os.environ["SAU_CACHE"] = str(cache)
        session = Watch.session
        Watch.session = lambda self: replace(session(self), save_every=0.0)  # type: ignore[method-assign]
        prepare()
        sys.argv = ["sau", *argv]
        return cli.main(argv)

    return work


def whole(argv: list[str], cache: Path) -> int:
    """A run that must succeed; how many files it wrote, in `sau.files.write`."""
    cache.mkdir(parents=True, exist_ok=True)
    tally = cache / "writes"
    tally.write_bytes(b"")

    def count() -> None:
        sync = os.fsync

        def fsync(file: int) -> None:
            with tally.open("ab") as marks:
                marks.write(b".")
            sync(file)

        os.fsync = fsync

    status, text = forked(run(argv, cache, count))
    if status != 0:
        raise RuntimeError(f"{' '.join(argv)} ended with status {status}: {text}")
    return tally.stat().st_size
