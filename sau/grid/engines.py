"""Where cells run: what an engine is, and the one that is always there, the cores and GPUs of this machine."""

import os
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from sau.errors import ConfigError, RecordError
from sau.grid.cells import Child, Job, Outcome
from sau.grid.plan import Cell
from sau.machine.cores import memory, taken, usable

Done = list[tuple[Cell, Outcome]]
GIB = 2**30


@runtime_checkable
class Engine(Protocol):
    """Runs jobs side by side."""

    def check(self, cells: Sequence[Cell]) -> None:
        """Refuse cells that could never run here, by a ConfigError that names the first."""

    def parallel(self, cell: Cell) -> int:
        """How many cells like this one run at the same time."""

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
    if cores > usable():
        raise ConfigError(f"cores is {cores}, but this process may use {usable()}")


def on_gpus(count: int, each: float) -> int:
    """How many cells that need `each` GPUs so many hold; a share lies on one of them."""
    return count * int(1 / each + 1e-9) if each < 1 else int(count // each)


class Local:
    """This machine: as many cells as its cores, its memory and its GPUs hold, never more threads than cores.

    Args:
        cores: to use; None means all that this process may use.
        memory_gb: GiB to use; None means nine tenths of what there is.
    """

    def __init__(self, cores: int | None = None, memory_gb: float | None = None) -> None:
        self.cores = usable() if cores is None else cores
        self.memory = 0.9 * memory() / GIB if memory_gb is None else memory_gb
        self.gpus = [1.0] * torch.cuda.device_count()
        self.running: dict[str, tuple[Cell, Child, dict[int, float]]] = {}
        self.unborn: Done = []

    def crowded(self) -> str | None:
        """What to say where others keep busy what the cells are to run on; None where they do not."""
        said = taken(self.cores)
        return said and f"{said}, and the cells are to use {self.cores}; --cores gives them fewer"

    def check(self, cells: Sequence[Cell]) -> None:
        check_cores(self.cores)
        for cell in cells:
            has = {"threads": self.cores, "memory_gb": self.memory, "gpus": len(self.gpus)}
            for what, most in has.items():
                if getattr(cell, what) > most:
                    raise ConfigError(f"{cell.label}: {what} is {getattr(cell, what):g}, but this machine has {most:g}")

    def parallel(self, cell: Cell) -> int:
        bounds = [self.cores // cell.threads]
        bounds += [int(self.memory // cell.memory_gb)] if cell.memory_gb else []
        bounds += [on_gpus(len(self.gpus), cell.gpus)] if cell.gpus else []
        return max(1, min(bounds))

    def room(self, cell: Cell) -> bool:
        return self.holds(cell, [other for other, _, _ in self.running.values()]) and self._devices(cell) is not None

    def holds(self, cell: Cell, running: Sequence[Cell]) -> bool:
        """Whether cores and memory are left for the cell beside those that run."""
        threads, needs = (sum(getattr(other, what) for other in (*running, cell)) for what in ("threads", "memory_gb"))
        return threads <= self.cores and needs <= self.memory

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
