"""Engines that others wrote: Ray, for one machine or a cluster, and Slurm."""

import importlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sau.errors import ConfigError, first_line
from sau.grid.cells import Job, Outcome, run_cell
from sau.grid.engines import GIB, Done, Local, check_cores, on_gpus
from sau.grid.plan import Cell
from sau.machine.cores import usable
from sau.machine.parent import python_path

PAUSE = 30.0  # seconds until Slurm is asked again after it took no job
START = 120.0  # seconds that the first worker of Ray may take to start; a few are usual


class RayEngine:
    """Ray: one machine or a cluster. Retries are the grid's, so that they are counted alike everywhere.

    Args:
        address: of a running cluster (`auto` finds the one on this machine); None starts one here.
        cores: to use where one is started; None means all.
    """

    def __init__(self, address: str | None = None, cores: int | None = None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.ray = _import("ray", "ray")
        if address is None:
            check_cores(cores or 0)  # Ray would start with any number, and so many cells at once
        home = {"env_vars": {"PYTHONPATH": python_path()}}
        started: dict[str, Any] = {"num_cpus": cores or usable(), "include_dashboard": False} if address is None else {}
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
            self.ray.get(self.ray.remote(usable).options(num_cpus=0).remote(), timeout=START)
        except self.ray.exceptions.GetTimeoutError:
            where = "the logs in /tmp/ray/session_latest/logs of its first machine say why"
            raise ConfigError(f"no worker of Ray has started within {START:g} s; {where}") from None
        except self.ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1]  # below the worker's own traceback
            raise ConfigError(f"a worker of Ray cannot run cells: {reason}") from None

    def parallel(self, cell: Cell) -> int:
        wants = {what: amount for what, amount in _wants(cell).items() if amount}
        nodes = self._nodes()
        return max(1, sum(min(_times(what, node.get(what, 0), n) for what, n in wants.items()) for node in nodes))

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


class Slurm:
    """Slurm, through submitit: a cell is a job.

    Args:
        folder: shared folder for submitit's files.
        options: partition, account and the like.
        jobs: most jobs at a time.
        cluster: `slurm`, or `local` for processes on this machine, of which no more run than it holds.
        minutes: time limit of a job.
    """

    def __init__(self, folder: Path, options: dict[str, Any], jobs: int, cluster: str, minutes: int) -> None:
        submitit = _import("submitit", "slurm")
        self.jobs, self.limit = jobs, {"timeout_min": minutes}
        self.here = Local() if cluster == "local" else None  # of a real one only it knows what its machines have
        os.environ["PYTHONPATH"] = python_path()
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        except RuntimeError as error:
            raise ConfigError(f"no Slurm here: {first_line(error)}") from None
        self.options = {"slurm_additional_parameters": options} if options and cluster == "slurm" else {}
        self.lost = (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError)
        self.refusals = (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError)
        self.running: list[tuple[Cell, Any]] = []
        self.refused: Done = []
        self.submitted, self.closed = 0, 0.0  # jobs so far, and until when none is submitted

    def check(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            if cell.gpus != int(cell.gpus):
                raise ConfigError(f"{cell.label}: gpus is {cell.gpus:g}; slurm gives whole GPUs")
            if cell.gpus and self.here is not None:
                what = f"{cell.label}: gpus is {cell.gpus:g}, but --cluster local gives none out"
                raise ConfigError(f"{what}; --engine local does")
        if self.here is not None:
            self.here.check(cells)

    def parallel(self, cell: Cell) -> int:
        return self.jobs if self.here is None else min(self.jobs, self.here.parallel(cell))

    def room(self, cell: Cell) -> bool:
        held = self.here is None or self.here.holds(cell, [other for other, _ in self.running])
        return held and len(self.running) < self.jobs and time.monotonic() >= self.closed

    def submit(self, cell: Cell, job: Job) -> None:
        wants = {"cpus_per_task": cell.threads, "mem_gb": cell.memory_gb, "gpus_per_node": int(cell.gpus)}
        self.executor.update_parameters(name=cell.name, **wants, **self.limit, **self.options)
        try:
            self.running.append((cell, self.executor.submit(run_cell, job)))
            self.submitted += 1
        except self.refusals as error:
            if not self.submitted:
                raise ConfigError(f"{cell.label} cannot be submitted: {first_line(error)}") from None
            self.closed = time.monotonic() + PAUSE
            self.refused.append((cell, Outcome("later", f"not submitted: {first_line(error)}")))

    def poll(self) -> Done:
        done, self.refused = self.refused, []
        for cell, job in list(self.running):
            if not job.done():
                continue
            try:
                outcome = job.result()
            except self.lost as error:
                outcome = Outcome("failed", f"job {job.job_id} lost: {first_line(error)}")
            done.append((cell, outcome))
            self.running.remove((cell, job))
        return done

    def stop(self) -> None:
        for _, job in self.running:
            job.cancel()
        for _, job in self.running:
            job.wait()
        self.running.clear()


def _wants(cell: Cell) -> dict[str, float]:
    return {"CPU": float(cell.threads), "memory": cell.memory_gb * GIB, "GPU": cell.gpus}


def _times(what: str, there: float | int, amount: float) -> int:
    return on_gpus(int(there), amount) if what == "GPU" else int(there // amount)


def _import(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"the engine needs {module}, which is not installed; pip install -e '.[{extra}]'") from None
