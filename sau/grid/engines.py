"""Where cells run: each is a process, on this machine or on the machines of a Ray cluster.

    python -m sau.grid.engines PARENT KIND NAME flags...

is such a process. It does what `python -m sau KIND NAME flags...` does, and stops when the process that started it is
gone. Ray's workers import this module, so it imports torch only where that is needed.
"""

import importlib
import math
import os
import queue
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
from typing import Any

from joblib import cpu_count

from sau.errors import ConfigError, first_line, one_line, require

GRACE = 5.0  # seconds that a stopped cell has to write what it holds
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
    log: str  # where its output goes; `.out` and `.err` are added
    cache: str  # folder of trained triggers and decoded images
    threads: int
    memory_gb: float
    gpus: float  # or a share of one
    timeout: float | None  # seconds


@dataclass(frozen=True)
class Outcome:
    """Why a try ended without a result, and whether another try may help."""

    reason: str
    again: bool = True


def run_job(job: Job, gpus: str | None = None, stopping: threading.Event | None = None) -> Outcome:
    """Run a job to its end in a process of its own; it is stopped after its timeout, or once `stopping` is set.

    `gpus` are the devices that it may see, as CUDA_VISIBLE_DEVICES has them; None leaves what is set.
    """
    threads = {f"{library}_NUM_THREADS": str(job.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    env = {**os.environ, **threads, "PYTHONPATH": python_path(), "SAU_CACHE": job.cache}
    env |= {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    argv = [sys.executable, "-P", "-m", "sau.grid.engines", str(os.getpid()), *job.command]
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
                    return Outcome(f"no end after {job.timeout:g} s (cell_timeout)")
                time.sleep(0.1)
        finally:
            _stop(process)
        err.seek(before)
        lines = err.read().decode(errors="replace").strip().splitlines()
    status, last = process.returncode, one_line(lines[-1].removeprefix("error: ")) if lines else ""
    if status < 0:
        memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        return Outcome(f"killed by signal {-status} ({signal.strsignal(-status)}){memory}")
    return Outcome(last or f"exit status {status}", again=status != 2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the process to leave, and kill it if it does not."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Local:
    """This machine: as many cells at once as its cores, its memory and its GPUs hold of the largest one.

    Args:
        cells: `Cell` or `Job`, of which the needs count.
        cores: to use; None means all that this process may use.
        memory_gb: GiB to use; None means nine tenths of what there is.

    Raises ConfigError if a cell needs more than there is.
    """

    lost = (OSError,)  # what a future raises where a process cannot be had

    def __init__(self, cells: Sequence[Any], cores: int | None = None, memory_gb: float | None = None) -> None:
        most = {name: max(getattr(cell, name) for cell in cells) for name in ("threads", "memory_gb", "gpus")}
        memory = 0.9 * available_memory() / GIB if memory_gb is None else memory_gb
        self.slots: queue.SimpleQueue[str] = queue.SimpleQueue()  # of cells on GPUs: the devices that one may see
        for devices in _gpu_slots(most["gpus"]):
            self.slots.put(devices)
        fit = {"threads": check_cores(cores) // most["threads"], "memory_gb": int(memory / most["memory_gb"])}
        fit |= {"gpus": self.slots.qsize()} if most["gpus"] else {}
        for name, count in fit.items():
            require(name, most[name], count > 0, "what this machine has")
        self.places: float = min(fit.values())
        self.pool, self.stopping = ThreadPoolExecutor(int(self.places)), threading.Event()

    def submit(self, job: Job) -> Future[Outcome]:
        """Start a job, or put it behind those that run."""
        return self.pool.submit(self._run, job)

    def _run(self, job: Job) -> Outcome:
        devices = self.slots.get() if job.gpus else None
        try:
            return run_job(job, devices, self.stopping)
        finally:
            if devices is not None:
                self.slots.put(devices)

    def stop(self) -> None:
        """Stop what runs."""
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)


def _gpu_slots(needs: float) -> list[str]:
    """The GPUs of every cell that has room at once, each of which needs so many, or a share of one."""
    if not needs:
        return []
    import torch

    # The numbers are those of the devices that this process sees, which may itself see a part of the machine's.
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = names or [str(number) for number in range(torch.cuda.device_count())]
    if needs <= 1:
        return [name for name in names for _ in range(int(1 / needs))]
    whole = int(needs)
    return [",".join(names[at : at + whole]) for at in range(0, len(names) - whole + 1, whole)]


class RayEngine:
    """Ray: one machine or a cluster. Retries are the grid's, so that they are counted alike everywhere.

    Args:
        cells: `Cell` or `Job`, of which the needs count.
        address: of a running cluster (`auto` finds the one on this machine); None starts one here.
        cores: to use where one is started; None means all.

    Raises ConfigError if no machine of the cluster has what a cell needs, or there is none.
    """

    places = math.inf  # Ray keeps the line

    def __init__(self, cells: Sequence[Any], address: str | None = None, cores: int | None = None) -> None:
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
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for threads, memory, gpus in {(cell.threads, cell.memory_gb, cell.gpus) for cell in cells}:
            needs = {"CPU": threads, "memory": memory * GIB, "GPU": gpus}
            if not any(all(node.get(what, 0) >= amount for what, amount in needs.items()) for node in nodes):
                text = f"a cell needs {threads} threads, {memory:g} GiB and {gpus:g} GPUs"
                raise ConfigError(f"{text}, but none of the {len(nodes)} machines has them")

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
    require("cores", cores, cores is None or cores <= cpu_count(), f"up to {cpu_count()}, which this process may use")
    return cores or cpu_count()


def _stop_with(parent: int) -> None:
    """Stop this process, as Ctrl-C would, once its parent is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)  # a long call into torch did not let Python raise; every file is written atomically


def _main(parent: str, *command: str) -> int:
    """Run a cell in this process; the exit status is that of `sau.cli.main`."""
    from sau.cli import main

    threading.Thread(target=_stop_with, args=(int(parent),), daemon=True).start()
    sys.argv = ["sau", *command]  # the record keeps this as its command
    return main(command)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
