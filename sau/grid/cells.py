"""One cell is one operating-system process: started, watched, stopped; the same for every engine."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sau.errors import RecordError
from sau.runtime.process import python_path

GRACE = 5.0  # seconds that a stopped cell has to write what it holds
LOCKED = 75  # exit status of `sau.grid.work` where another process runs the cell


@dataclass(frozen=True)
class Job:
    """A cell as it is sent to where it runs: plain values, the same on every machine that shares the storage.

    Args:
        kind: attack or defense.
        name: the method.
        flags: its command line.
        folder: its result folder.
        log: where its output goes; `.out` and `.err` are added.
        threads: CPU threads.
        timeout: seconds that it may take; None means no limit.
        cache: folder of triggers that are trained and of decoded pictures; None leaves what is set.
    """

    kind: str
    name: str
    flags: tuple[str, ...]
    folder: str
    log: str
    threads: int
    timeout: float | None
    cache: str | None = None


def _named(number: int) -> str:
    """The name of a signal; those for real-time work have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@dataclass(frozen=True)
class Outcome:
    """How a try ended.

    Args:
        status: done; failed; later (another process has the cell).
        reason: of a failure, or of the wait, one line.
        again: whether another try may help; a mistake of the user stays one.
    """

    status: Literal["done", "failed", "later"]
    reason: str = ""
    again: bool = True


class Child:
    """The process of a job on this machine.

    Args:
        job: what to run.
        gpus: the devices it may see, as CUDA_VISIBLE_DEVICES has them; None leaves what is set.
    """

    def __init__(self, job: Job, gpus: str | None = None) -> None:
        self.job, self.started = job, time.monotonic()
        log = Path(job.log)
        self.errors = log.with_name(log.name + ".err")
        self.seen = self.errors.stat().st_size if self.errors.is_file() else 0
        threads = {f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "MKL", "OPENBLAS")}
        env = {**os.environ, **threads, "PYTHONPATH": python_path()}
        if job.cache is not None:
            env["SAU_CACHE"] = job.cache
        if gpus is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpus
        work = [sys.executable, "-P", "-m", "sau.grid.work", str(os.getpid()), job.folder]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.with_name(log.name + ".out").open("ab") as out, self.errors.open("ab") as err:
                # A session of its own: Ctrl-C in the terminal reaches the grid alone, which then stops its cells.
                self.process = subprocess.Popen(
                    [*work, job.kind, job.name, *job.flags],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=err,
                    start_new_session=True,
                )
        except OSError as error:
            raise RecordError(f"cannot start a cell with its output in {log}: {error.strerror or error}") from None

    def poll(self) -> Outcome | None:
        """How it ended, or None while it runs; one that takes too long is stopped."""
        status = self.process.poll()
        if status is None:
            limit = self.job.timeout
            if limit is None or time.monotonic() - self.started < limit:
                return None
            self.stop()
            return Outcome("failed", f"no end after {limit:g} s (cell_timeout)")
        if status == 0:
            return Outcome("done")
        if status == LOCKED:
            return Outcome("later", self._last_line())
        if status < 0:
            name = _named(-status)
            return Outcome("failed", f"killed by {name}" + (", perhaps for want of memory" if status == -9 else ""))
        return Outcome("failed", self._last_line() or f"exit status {status}", again=status != 2)

    def interrupt(self) -> None:
        """Ask it to stop."""
        if self.process.poll() is None:
            self.process.terminate()  # SIGINT may be ignored, as it is in the background of a shell

    def stop(self) -> None:
        """Have it stopped: it is asked, and killed if it does not leave."""
        self.interrupt()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _last_line(self) -> str:
        with self.errors.open("rb") as file:
            file.seek(max(self.seen, self.errors.stat().st_size - 10_000))
            lines = file.read().decode(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else ""


def run_cell(job: Job) -> Outcome:
    """Run a job to its end; what engines with workers of their own call there."""
    child = Child(job)
    try:
        while (outcome := child.poll()) is None:
            time.sleep(0.1)
        return outcome
    finally:
        child.stop()
