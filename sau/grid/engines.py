"""Where cells run: on the cores and GPUs of this machine, or on the machines of a Ray cluster."""

import importlib
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from joblib import cpu_count

from sau.errors import ConfigError, RecordError, first_line
from sau.grid.cells import Child, Job, Outcome, run_cell
from sau.grid.plan import Cell
from sau.runtime.process import available_memory, python_path

Done = list[tuple[Cell, Outcome]]
GIB = 2**30
START = 120.0  # seconds that the first worker of Ray may take to start; a few are usual


@runtime_checkable
class Engine(Protocol):
    """Runs jobs side by side."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse cells that could never run here, by a ConfigError that names the first."""

    def room(self, cell: Cell) -> bool:
        """Whether the cell can be submitted now."""

    def submit(self, cell: Cell, job: Job) -> None:
        """Start a job, or put it in line."""

    def poll(self) -> Done:
        """The jobs that ended since the last call."""

    def stop(self) -> None:
        """Stop what runs and give back what is held."""


def check_cores(cores: int) -> None:
    """Refuse, by a ConfigError, more cores of this machine than there are."""
    if cores > cpu_count():
        raise ConfigError(f"cores is {cores}, but this process may use {cpu_count()}")


class Local:
    """This machine: as many cells as its cores, its memory and its GPUs hold, never more threads than cores.

    Args:
        cores: to use; None means all that this process may use.
        memory_gb: GiB to use; None means nine tenths of what there is.
    """

    def __init__(self, cores: int | None = None, memory_gb: float | None = None) -> None:
        self.cores = cpu_count() if cores is None else cores
        self.memory = 0.9 * available_memory() / GIB if memory_gb is None else memory_gb
        self.gpus = [1.0] * torch.cuda.device_count()
        self.running: dict[str, tuple[Cell, Child, dict[int, float]]] = {}
        self.unborn: Done = []

    def check(self, cells: Sequence[Cell]) -> None:
        check_cores(self.cores)
        for cell in cells:
            has = {"threads": self.cores, "memory_gb": self.memory, "gpus": len(self.gpus)}
            for what, most in has.items():
                if getattr(cell, what) > most:
                    raise ConfigError(f"{cell.label}: {what} is {getattr(cell, what):g}, but this machine has {most:g}")

    def room(self, cell: Cell) -> bool:
        cells = [cell, *(other for other, _, _ in self.running.values())]
        threads, needs = sum(other.threads for other in cells), sum(other.memory_gb for other in cells)
        return threads <= self.cores and needs <= self.memory and self._devices(cell) is not None

    def _devices(self, cell: Cell) -> dict[int, float] | None:
        """Free shares of GPUs: of the fullest one that has room, or of as many whole ones; None if there are none."""
        free = [1.0 - sum(used.get(n, 0.0) for _, _, used in self.running.values()) for n in range(len(self.gpus))]
        if cell.gpus == 0:
            return {}
        share, count = (cell.gpus, 1) if cell.gpus < 1 else (1.0, int(cell.gpus))
        fitting = sorted((left, number) for number, left in enumerate(free) if left > share - 1e-9)
        return {number: share for _, number in fitting[:count]} if len(fitting) >= count else None

    def submit(self, cell: Cell, job: Job) -> None:
        shares = self._devices(cell) or {}
        # The numbers are those of the devices that this process sees, which may itself see a part of the machine's.
        seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        names = ",".join(seen[number] if seen else str(number) for number in shares)
        try:
            self.running[cell.digest] = cell, Child(job, names if shares else None), shares
        except RecordError as error:  # no process or no file is to be had now; that is no fault of other cells
            self.unborn.append((cell, Outcome("failed", str(error))))

    def poll(self) -> Done:
        polled = [(cell, child.poll()) for cell, child, _ in list(self.running.values())]
        done = [(cell, outcome) for cell, outcome in polled if outcome is not None]
        for cell, _ in done:
            del self.running[cell.digest]
        unborn, self.unborn = self.unborn, []
        return done + unborn

    def stop(self) -> None:
        for _, child, _ in self.running.values():
            child.interrupt()
        for _, child, _ in self.running.values():
            child.stop()
        self.running.clear()


class RayEngine:
    """Ray: one machine or a cluster. Retries are the grid's, so that they are counted alike everywhere.

    Args:
        address: of a running cluster (`auto` finds the one on this machine); None starts one here.
        cores: to use where one is started; None means all.
    """

    def __init__(self, address: str | None = None, cores: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.ray = _import_ray()
        if address is None:
            check_cores(cores or 0)  # Ray would start with any number, and so many cells at once
        home = {"env_vars": {"PYTHONPATH": python_path()}}
        started: dict[str, Any] = (
            {"num_cpus": cores or cpu_count(), "include_dashboard": False} if address is None else {}
        )
        quiet = {"log_to_driver": False, "logging_level": "error"}
        try:
            # "local": else a Ray that runs here already would be joined, and refuse the number of cores.
            self.ray.init(address=address or "local", runtime_env=home, **quiet, **started)
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = f"no Ray cluster at {address}" if address else "Ray does not start here"
            raise ConfigError(f"{where}: {first_line(error)}") from None
        self.task = self.ray.remote(run_cell)
        self.running: dict[Any, Cell] = {}

    def _nodes(self) -> list[dict[str, float]]:
        return [node["Resources"] for node in self.ray.nodes() if node["Alive"]]

    def check(self, cells: Sequence[Cell]) -> None:
        nodes = self._nodes()
        for need in {(cell.threads, cell.memory_gb, cell.gpus): cell for cell in cells}.values():
            if not any(all(node.get(what, 0) >= amount for what, amount in _wants(need).items()) for node in nodes):
                asked = f"{need.threads} threads, {need.memory_gb:g} GiB and {need.gpus:g} GPUs"
                raise ConfigError(f"{need.label} needs {asked}, but none of the {len(nodes)} machines has them")
        self._try_worker()

    def _try_worker(self) -> None:
        """ConfigError if no worker starts and finds this package: Ray would keep the cells in line for ever."""
        try:
            self.ray.get(self.ray.remote(cpu_count).options(num_cpus=0).remote(), timeout=START)
        except self.ray.exceptions.GetTimeoutError:
            where = "the logs in /tmp/ray/session_latest/logs of its first machine say why"
            raise ConfigError(f"no worker of Ray has started within {START:g} s; {where}") from None
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]  # below the worker's own traceback
            raise ConfigError(f"a worker of Ray cannot run cells: {reason}") from None

    def room(self, cell: Cell) -> bool:
        return len(self.running) < 1000  # Ray keeps the line; a longer one would only cost it memory

    def submit(self, cell: Cell, job: Job) -> None:
        needs = {"num_cpus": cell.threads, "num_gpus": cell.gpus, "memory": int(cell.memory_gb * GIB), "max_retries": 0}
        self.running[self.task.options(**needs, name=cell.label).remote(job)] = cell

    def poll(self) -> Done:
        if not self.running:
            return []
        ready, _ = self.ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
        done = []
        for reference in ready:
            try:
                outcome = self.ray.get(reference)
            except self.ray.exceptions.RayError as error:
                outcome = Outcome("failed", f"worker lost: {first_line(error)}")
            done.append((self.running.pop(reference), outcome))
        return done

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference)
        if self.running:
            self.ray.wait(list(self.running), num_returns=len(self.running), timeout=10)
        self.ray.shutdown()


def _wants(cell: Cell) -> dict[str, float]:
    return {"CPU": float(cell.threads), "memory": cell.memory_gb * GIB, "GPU": cell.gpus}


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise ConfigError("the engine needs ray, which is not installed; pip install -e '.[ray]'") from None
