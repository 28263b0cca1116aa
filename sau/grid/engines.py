"""Where cells run: each is a process, on this machine or on the machines of a Ray cluster.

    python -m sau.grid.engines PARENT FOLDER KIND NAME flags...

is such a process. It locks the result folder, does what `python -m sau KIND NAME flags...` does, and stops when the
process that started it is gone. Ray's workers import this module, so it imports torch only where that is needed.
"""

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from joblib import cpu_count

from sau.errors import ConfigError, LockedError, first_line
from sau.files import acquire

GRACE = 5.0  # seconds that a stopped cell has to write what it holds
LOCKED = 75  # exit status of a cell whose folder another process uses
GIB = 2**30


def available_memory() -> int:
    """Bytes of memory that this process may use: of the machine, or the limit of its control group (version 2)."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with suppress(OSError, ValueError):  # no control groups, or "max"
        group = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2]
        limits.append(int(Path(f"/sys/fs/cgroup{group}/memory.max").read_text()))
    return min(limits)


def python_path() -> str:
    """The PYTHONPATH of a process that is to import this library from where it is."""
    home = str(Path(__file__).parents[2])
    return os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])


@dataclass(frozen=True)
class Job:
    """A cell as an engine gets it: plain values, the same on every machine that shares the storage."""

    label: str  # for messages
    command: tuple[str, ...]  # kind, name and flags
    folder: str  # its result folder
    log: str  # where its output goes; `.out` and `.err` are added
    cache: str  # folder of trained triggers and decoded images
    threads: int
    memory_gb: float
    gpus: float  # or a share of one
    timeout: float | None  # seconds


@dataclass(frozen=True)
class Outcome:
    """How a try ended (`locked`: another process has the cell), why, and whether another try may help."""

    status: Literal["done", "failed", "locked"]
    reason: str = ""
    again: bool = True


def run_job(job: Job, gpus: str | None = None, stopping: threading.Event | None = None) -> Outcome:
    """Run a job to its end in a process of its own; it is stopped after its timeout, or once `stopping` is set.

    `gpus` are the devices that it may see, as CUDA_VISIBLE_DEVICES has them; None leaves what is set.
    """
    threads = {f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    env = {**os.environ, **threads, "PYTHONPATH": python_path(), "SAU_CACHE": job.cache}
    env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    argv = [sys.executable, "-P", "-m", "sau.grid.engines", str(os.getpid()), job.folder, *job.command]
    Path(job.log).parent.mkdir(parents=True, exist_ok=True)
    with open(job.log + ".out", "ab") as out, open(job.log + ".err", "ab+") as err:
        before, started = err.seek(0, os.SEEK_END), time.monotonic()
        # A session of its own: Ctrl-C in the terminal reaches the grid alone, which then stops its cells.
        process = subprocess.Popen(
            argv, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            while process.poll() is None and not (stopping and stopping.is_set()):
                if job.timeout is not None and time.monotonic() - started > job.timeout:
                    return Outcome("failed", f"no end after {job.timeout:g} s (cell_timeout)")
                time.sleep(0.1)
        finally:
            _stop(process)
        err.seek(before)
        lines = err.read().decode(errors="replace").strip().splitlines()
        return _outcome(process.returncode, lines[-1].removeprefix("error: ") if lines else "")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to leave, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(status: int, last: str) -> Outcome:
    """What an exit status, and the last line of stderr, say."""
    if status < 0:
        reason = f"killed by signal {-status} ({signal.strsignal(-status)})"
        return Outcome("failed", reason + (", perhaps for want of memory" if status == -signal.SIGKILL else ""))
    if status in (0, LOCKED):
        return Outcome("done" if status == 0 else "locked", last)
    return Outcome("failed", last or f"exit status {status}", again=status != 2)


class Local:
    """This machine: as many cells as its cores, its memory and its GPUs hold.

    Args:
        cores: to use; None means all that this process may use.
        memory_gb: GiB to use; None means nine tenths of what there is.
    """

    lost = (OSError,)  # what a future raises where a process cannot be had

    def __init__(self, cores: int | None = None, memory_gb: float | None = None) -> None:
        import torch

        self.cores = check_cores(cores)
        self.memory = 0.9 * available_memory() / GIB if memory_gb is None else memory_gb
        self.gpus = torch.cuda.device_count()
        self.running: dict[Future[Outcome], tuple[Job, dict[int, float]]] = {}  # with its shares of GPUs
        self.threads, self.stopping = ThreadPoolExecutor(self.cores), threading.Event()

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse jobs that could never run here, by a ConfigError that names the first."""
        for job in jobs:
            for what, most in (("threads", self.cores), ("memory_gb", self.memory), ("gpus", self.gpus)):
                if getattr(job, what) > most:
                    raise ConfigError(f"{job.label}: {what} is {getattr(job, what):g}, but this machine has {most:g}")

    def room(self, job: Job) -> bool:
        """Whether the job can be submitted now."""
        self.running = {future: entry for future, entry in self.running.items() if not future.done()}
        jobs = [job, *(other for other, _ in self.running.values())]
        threads, needs = sum(each.threads for each in jobs), sum(each.memory_gb for each in jobs)
        return threads <= self.cores and needs <= self.memory and self._shares(job) is not None

    def _shares(self, job: Job) -> dict[int, float] | None:
        """Free shares of GPUs: of the fullest one that has room, or of as many whole ones; None if there are none."""
        share, count = (job.gpus, 1) if job.gpus < 1 else (1.0, int(job.gpus))
        free = [1.0 - sum(used.get(gpu, 0.0) for _, used in self.running.values()) for gpu in range(self.gpus)]
        fitting = sorted((left, gpu) for gpu, left in enumerate(free) if left > share - 1e-9)
        if job.gpus == 0:
            return {}
        return {gpu: share for _, gpu in fitting[:count]} if len(fitting) >= count else None

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a job that there is room for."""
        shares = self._shares(job) or {}
        # The numbers are those of the devices that this process sees, which may itself see a part of the machine's.
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = ",".join(visible[gpu] if visible else str(gpu) for gpu in shares)
        future = self.threads.submit(run_job, job, names if shares else None, self.stopping)
        self.running[future] = job, shares
        return future

    def stop(self) -> None:
        """Stop what runs."""
        self.stopping.set()
        self.threads.shutdown()


class RayEngine:
    """Ray: one machine or a cluster. Retries are the grid's, so that they are counted alike everywhere.

    Args:
        address: of a running cluster (`auto` finds the one on this machine); None starts one here.
        cores: to use where one is started; None means all.
    """

    def __init__(self, address: str | None = None, cores: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            self.ray = importlib.import_module("ray")
        except ImportError:
            raise ConfigError("the engine needs ray, which is not installed; pip install -e '.[ray]'") from None
        here: dict[str, Any] = {} if address else {"num_cpus": check_cores(cores), "include_dashboard": False}
        env = {"env_vars": {"PYTHONPATH": python_path()}}
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            # "local": else a Ray that runs here already would be joined, and refuse the number of cores.
            self.ray.init(address=address or "local", runtime_env=env, **quiet, **here)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"address is {address}, but no Ray answers: {first_line(error)}") from None
        self.lost = (self.ray.exceptions.RayError,)  # what a future raises where a worker or its machine dies
        self.task, self.tasks = self.ray.remote(run_job), list[Any]()

    def check(self, jobs: Sequence[Job]) -> None:
        """Refuse jobs that no machine of the cluster holds, by a ConfigError that names the first."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for job in {(job.threads, job.memory_gb, job.gpus): job for job in jobs}.values():
            needs = {"CPU": job.threads, "memory": job.memory_gb * GIB, "GPU": job.gpus}
            if not any(all(node.get(what, 0) >= amount for what, amount in needs.items()) for node in nodes):
                text = f"{job.threads} threads, {job.memory_gb:g} GiB and {job.gpus:g} GPUs"
                raise ConfigError(f"{job.label} needs {text}, but none of the {len(nodes)} machines has them")

    def room(self, job: Job) -> bool:
        """Always: Ray keeps the line."""
        return True

    def submit(self, job: Job) -> Future[Outcome]:
        """Put a job in Ray's line."""
        needs = {"num_cpus": job.threads, "num_gpus": job.gpus, "memory": int(job.memory_gb * GIB), "max_retries": 0}
        self.tasks.append(self.task.options(**needs, name=job.label).remote(job))
        future: Future[Outcome] = self.tasks[-1].future()
        return future

    def stop(self) -> None:
        """Stop what runs, and leave the cluster."""
        _, left = self.ray.wait(self.tasks, num_returns=len(self.tasks), timeout=0) if self.tasks else ([], [])
        for task in left:
            self.ray.cancel(task)
        if left:
            self.ray.wait(left, num_returns=len(left), timeout=2 * GRACE)
        self.ray.shutdown()


def check_cores(cores: int | None) -> int:
    """The cores to use, all that there are for None; ConfigError for more."""
    if cores is not None and cores > cpu_count():
        raise ConfigError(f"cores is {cores}, but this process may use {cpu_count()}")
    return cores or cpu_count()


def _stop_with(parent: int) -> None:
    """Stop this process, as Ctrl-C would, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)  # a long call into torch did not let Python raise; every file is written atomically


def _main(parent: str, folder: str, *command: str) -> int:
    """Run a cell in this process; the exit status is that of `sau.cli.main`, or LOCKED."""
    from sau.cli import main

    threading.Thread(target=_stop_with, args=(int(parent),), daemon=True).start()
    try:
        acquire(Path(folder))
    except LockedError as error:
        print(f"error: {error}", file=sys.stderr)
        return LOCKED
    sys.argv = ["sau", *command]  # the record keeps this as its command
    return main(command)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
