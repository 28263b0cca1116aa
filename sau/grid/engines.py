"""Where cells run: each is a process, on this machine or on the machines of a Ray cluster.

    python -m sau.grid.engines KIND NAME flags...

is such a process. It does what `python -m sau KIND NAME flags...` does, and stops when its standard input ends, which
is when the process that started it is gone. Ray's workers import this module, so it imports torch only where needed.
"""

import importlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

from joblib import cpu_count

from sau.errors import ConfigError, first_line, one_line, require

GRACE = 5.0  # seconds that a stopped cell has to write what it holds
GIB = 2**30
# Of a process that is to import this library from where it is.
PYTHONPATH = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))


@dataclass(frozen=True)
class Cell:
    """One run, an attack or a defense on an attack: plain values, the same on every machine that shares the storage."""

    kind: str  # attack or defense
    name: str  # the method
    digest: str  # of all that determines the result, hexadecimal
    label: str  # the folder without digests, for people
    folder: str  # below the record root, unique to the digest
    flags: tuple[str, ...]  # of attack/NAME.py or defense/NAME.py, all but the record root
    attack: str | None  # digest of the attack's cell; None for an attack
    threads: int
    gpus: float  # 0 on the CPU; else the share of one that it takes
    data: tuple[str, str]  # the data set, and the folder of the data sets

    def log(self, root: Path) -> str:
        """Where its output goes below the record root; `.out` and `.err` are added."""
        return str(root / ".grid" / "logs" / self.folder.replace("/", "__"))


class Outcome(NamedTuple):
    """Why a try ended without a result, and whether another try may help."""

    reason: str
    again: bool = True


def run_cell(
    cell: Cell, root: Path, cache: str, timeout: float | None, gpu: str | None = None, stop: Event | None = None
) -> Outcome:
    """Run a cell below the record root in a process of its own, until `timeout` (s), or until `stop` is set. `cache` is
    the folder of trained triggers and decoded images, `gpu` what CUDA_VISIBLE_DEVICES is set to."""
    threads = {f"{library}_NUM_THREADS": str(cell.threads) for library in ("OMP", "MKL", "OPENBLAS")}
    env = {**os.environ, **threads, "PYTHONPATH": PYTHONPATH, "SAU_CACHE": cache}
    env |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    argv = [sys.executable, "-P", "-m", "sau.grid.engines", cell.kind, cell.name, f"--record_root={root}", *cell.flags]
    log = cell.log(root)
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    with open(log + ".out", "ab") as out, open(log + ".err", "ab+") as err:
        before, end = err.seek(0, os.SEEK_END), time.monotonic() + (timeout or math.inf)
        # A session of its own: Ctrl-C in the terminal reaches the grid alone, which then stops its cells.
        process = subprocess.Popen(argv, env=env, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True)
        try:
            while process.poll() is None and not (stop and stop.is_set()):
                if time.monotonic() > end:
                    return Outcome(f"no end after {timeout:g} s (cell_timeout)")
                time.sleep(0.1)
        finally:
            process.terminate()  # does nothing where it has ended
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            process.kill()
            process.communicate()
        err.seek(before)
        lines = err.read().decode(errors="replace").strip().splitlines()
    status, last = process.returncode, one_line(lines[-1].removeprefix("error: ")) if lines else ""
    if status < 0:
        memory = ", perhaps for want of memory" if status == -signal.SIGKILL else ""
        return Outcome(f"killed by signal {-status} ({signal.strsignal(-status)}){memory}")
    return Outcome(last or f"exit status {status}", again=status != 2)


class Local:
    """This machine: as many cells at once, each of `needs_gb` GiB and the most threads, as its cores, its memory (GiB;
    None means nine tenths) and its GPUs hold. `how` has root, cache and timeout of `run_cell`. ConfigError if none has
    room."""

    def __init__(
        self, cells: Sequence[Cell], how: Mapping[str, Any], needs_gb: float, cores: int | None, memory_gb: float | None
    ) -> None:
        from sau.device import memory_limit

        most = min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), memory_limit())  # or of a container
        memory = 0.9 * most / GIB if memory_gb is None else memory_gb
        require("memory_gb", memory, needs_gb <= memory < math.inf, f"{needs_gb:g}, which a cell needs, and more")
        threads, share = max(cell.threads for cell in cells), max(cell.gpus for cell in cells)
        places = min(check_cores(cores) // threads, int(memory / needs_gb))
        require("threads", threads, places > 0, "what this machine has")
        self.devices: list[str | None] = (visible_gpus() * int(1 / share))[:places] if share else [None] * places
        require("device", "cuda", len(self.devices) > 0, "cpu, for this machine has no GPU")
        self.places: float = len(self.devices)
        self.pool, self.how, self.stopping = ThreadPoolExecutor(len(self.devices)), how, Event()

    def submit(self, cell: Cell) -> Future[Outcome]:
        return self.pool.submit(self._run, cell)

    def _run(self, cell: Cell) -> Outcome:
        device = self.devices.pop(0)  # there is one: the pool has no more threads than devices
        try:
            return run_cell(cell, **self.how, gpu=device, stop=self.stopping)
        finally:
            self.devices.append(device)

    def stop(self) -> None:
        self.stopping.set()
        self.pool.shutdown(cancel_futures=True)


def check_cores(cores: int | None) -> int:
    """The cores to use, all that there are for None; ConfigError for others."""
    most = cpu_count()
    require("cores", cores, cores is None or 1 <= cores <= most, f"1 to {most}, which this process may use")
    return cores or most


def visible_gpus() -> list[str | None]:
    """The GPUs that this process sees, by the names that CUDA_VISIBLE_DEVICES has for them."""
    import torch

    if (names := os.environ.get("CUDA_VISIBLE_DEVICES")) is None:
        return [*map(str, range(torch.cuda.device_count()))]
    return [name for name in names.split(",") if name not in ("", "-1")]


class RayEngine:
    """Ray: the cluster at an address (`auto` is the one on this machine), or one that is started here, of so many
    cores. The rest is as in `Local`. ConfigError if there is none, or no machine of it has what a cell needs."""

    places = math.inf  # Ray keeps the line

    def __init__(
        self, cells: Sequence[Cell], how: Mapping[str, Any], needs_gb: float, cores: int | None, address: str | None
    ) -> None:
        self.how, self.memory = how, int(needs_gb * GIB)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            self.ray = importlib.import_module("ray")
        except ImportError:
            raise ConfigError("the engine needs ray, which is not installed; pip install -e '.[ray]'") from None
        start: dict[str, Any] = {"runtime_env": {"env_vars": {"PYTHONPATH": PYTHONPATH}}}
        start |= {} if address else {"num_cpus": check_cores(cores), "include_dashboard": False}
        try:
            # "local": else a Ray that runs here already would be joined, and refuse the number of cores.
            self.ray.init(address=address or "local", log_to_driver=False, logging_level="error", **start)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"address is {address}, but no Ray answers: {first_line(error)}") from None
        self.task = self.ray.remote(run_cell)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        for cell in cells:
            needs = {"CPU": cell.threads, "memory": self.memory, "GPU": cell.gpus}
            if not any(all(node.get(what, 0) >= amount for what, amount in needs.items()) for node in nodes):
                raise ConfigError(f"a cell needs {needs}, but none of the {len(nodes)} machines has them")

    def submit(self, cell: Cell) -> Future[Outcome]:
        needs = {"num_cpus": cell.threads, "num_gpus": cell.gpus, "memory": self.memory}
        task = self.task.options(**needs, max_retries=0, name=cell.label).remote(cell, **self.how)
        return task.future()

    def stop(self) -> None:
        """Leave the cluster, which ends the workers of this process; their cells stop when their input ends."""
        self.ray.shutdown()


def _stop_with_input() -> None:
    """Stop this process, as Ctrl-C would, once its standard input ends."""
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)  # a long call into torch did not let Python raise; every file is written atomically


if __name__ == "__main__":
    from sau.cli import main

    Thread(target=_stop_with_input, daemon=True).start()
    sys.argv[0] = "sau"  # the record keeps this as its command
    sys.exit(main(sys.argv[1:]))
