"""The engine for Ray, with a stub in the place of Ray: what is refused, and how much runs at once."""

import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from grids import SMALL, Scripted

from sau.errors import ConfigError
from sau.grid import engines
from sau.grid.engines import GIB
from sau.grid.plan import Cell, cells
from sau.grid.runner import Runner
from sau.grid.spec import read
from sau.grid.store import Store


@pytest.fixture
def every(tmp_path) -> list[Cell]:
    (tmp_path / "grid.yaml").write_text(SMALL)
    return cells(read(tmp_path / "grid.yaml")[1])


def at_once(store: Store, every: list[Cell], done: Scripted | None = None) -> Callable[[Any], Any]:
    """What runs a job in the place of `run_cell`: it is finished when this returns."""
    done = done or Scripted(store)
    by_folder = {str(store.folder(cell)): cell for cell in every}

    def run(job: Any) -> Any:
        done.submit(by_folder[job.folder], job)
        return done.poll()[0][1]

    return run


@pytest.fixture
def ray(monkeypatch) -> dict[str, Any]:
    """A stub of Ray with two machines; what `init` was told."""
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"):
        monkeypatch.setenv(name, "0")  # the engine sets them; after the test they are as before
    told: dict[str, Any] = {}
    nodes = [
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 9 * GIB, "GPU": 2.0}},
        {"Alive": True, "Resources": {"CPU": 8.0, "memory": 64 * GIB}},
    ]
    stub = SimpleNamespace(init=lambda **more: told.update(more), nodes=lambda: nodes, remote=lambda run: run)
    monkeypatch.setitem(sys.modules, "ray", stub)
    return told


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory_gb": 65.0}, "needs 1 threads, 65 GiB and 0 GPUs, but none of the 2 machines has them"),
        ({"memory_gb": 30.0, "gpus": 1.0}, "needs 1 threads, 30 GiB and 1 GPUs"),  # each machine has but one of them
        ({"threads": 9}, "needs 9 threads"),
    ],
)
def test_a_cell_that_no_machine_of_ray_holds_is_refused_before_the_first_starts(every, ray, change, words, one_line):
    with pytest.raises(ConfigError) as caught:
        engines.RayEngine("auto").check([every[1], dataclasses.replace(every[0], **change)])
    assert words in one_line(caught.value) and "badnet_r0.1_s0" in str(caught.value)


def test_ray_is_started_on_no_more_cores_than_there_are(ray, monkeypatch, one_line):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 2)
    with pytest.raises(ConfigError) as caught:
        engines.RayEngine(None, 99)
    assert "cores is 99, but this process may use 2" in one_line(caught.value) and not ray


@pytest.mark.parametrize(("address", "wanted"), [(None, "local"), ("auto", "auto")])
def test_ray_without_an_address_is_started_whatever_runs_here(ray, address, wanted, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 2)
    engines.RayEngine(address, 2)
    assert ray["address"] == wanted and ("num_cpus" in ray) is (address is None)


def test_a_worker_that_ray_loses_is_tried_again(every, ray, tmp_path, monkeypatch):
    """The first two tasks end with Ray's own error, as when their machine is gone; the rest finish."""
    stub, lines = sys.modules["ray"], list[str]()
    store, numbers = Store(tmp_path / "root"), iter(range(100))
    run = at_once(store, every)

    class RayError(Exception):
        pass

    def get(task: tuple[int, Any] | None, timeout: float | None = None) -> Any:
        if task is None:
            return None  # the worker that is tried before the first cell
        if task[0] < 2:
            raise RayError("The worker died unexpectedly\n  more")
        return run(task[1])

    def remote(*job: Any) -> tuple[int, Any] | None:
        return (next(numbers), *job) if job else None

    options = SimpleNamespace(options=lambda **more: SimpleNamespace(remote=remote))
    errors = SimpleNamespace(RayError=RayError, GetTimeoutError=TimeoutError)
    vars(stub).update(remote=lambda work: options, wait=lambda tasks, **more: (tasks, []), get=get, exceptions=errors)
    vars(stub).update(shutdown=lambda: None)
    engine = engines.RayEngine("auto")
    runner = Runner(every, store, engine, retries=1, timeout=None, say=lines.append)
    assert runner.run() == []
    again = [line for line in lines if line.startswith("again ")]
    assert len(again) == 2 and all("worker lost: The worker died unexpectedly; try 2 of 2" in line for line in again)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("late", "no worker of Ray has started within 120 s"),
        ("lost", "a worker of Ray cannot run cells: ModuleNotFoundError: no module sau"),
    ],
)
def test_workers_of_ray_that_never_start_are_one_line_before_the_first_cell(every, ray, error, words, one_line):
    class RayError(Exception):
        pass

    class GetTimeoutError(RayError, TimeoutError):
        pass

    def get(task: None, timeout: float) -> None:
        if error == "late":
            raise GetTimeoutError(f"after {timeout}")
        raise RayError("ray::usable() (pid=1)\n  more\nModuleNotFoundError: no module sau\n")

    trial = SimpleNamespace(options=lambda **more: SimpleNamespace(remote=lambda: None))
    errors = SimpleNamespace(RayError=RayError, GetTimeoutError=GetTimeoutError)
    vars(sys.modules["ray"]).update(remote=lambda work: trial, get=get, exceptions=errors)
    with pytest.raises(ConfigError) as caught:
        engines.RayEngine("auto").check(every)
    assert words in one_line(caught.value)


def test_a_machine_that_left_ray_counts_for_nothing(every, ray):
    engine = engines.RayEngine("auto")
    sys.modules["ray"].nodes()[1]["Alive"] = False
    with pytest.raises(ConfigError, match="none of the 1 machines"):
        engine.check([dataclasses.replace(every[0], memory_gb=30.0)])


def test_a_task_of_ray_says_what_its_cell_needs_and_is_cancelled_in_the_end(every, ray, tmp_path):
    """Ray itself repeats nothing: retries are the grid's, so that they are counted alike everywhere."""
    wanted: dict[str, Any] = {}
    calls: list[Any] = []

    def options(**more: Any) -> SimpleNamespace:
        wanted.update(more)
        return SimpleNamespace(remote=lambda job: "task")

    vars(sys.modules["ray"]).update(
        remote=lambda run: SimpleNamespace(options=options), cancel=calls.append,
        wait=lambda tasks, **more: (tasks, []), shutdown=lambda: calls.append("shutdown"),
    )  # fmt: skip
    engine = engines.RayEngine("auto")
    cell = dataclasses.replace(every[0], threads=3, memory_gb=1.5, gpus=0.5)
    engine.submit(cell, Store(tmp_path).job(cell, None))
    assert wanted == {
        "num_cpus": 3, "num_gpus": 0.5, "memory": 3 * GIB // 2, "max_retries": 0, "name": cell.label
    }  # fmt: skip
    engine.stop()
    assert calls == ["task", "shutdown"]


@pytest.mark.parametrize(("address", "words"), [("far:1", "no Ray cluster at far:1"), (None, "Ray does not start")])
def test_a_ray_that_is_not_there_is_one_line(ray, monkeypatch, one_line, address, words):
    def init(**more: Any) -> None:
        raise RuntimeError("it did not answer\n  more")

    monkeypatch.setattr(sys.modules["ray"], "init", init)
    with pytest.raises(ConfigError) as caught:
        engines.RayEngine(address)
    assert words in one_line(caught.value) and "it did not answer" in str(caught.value)


def test_ray_is_started_on_the_cores_that_are_asked_for(ray, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 4)
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 4)
    for cores, count in ((3, 3), (None, 4)):
        engines.RayEngine(None, cores)
        assert ray["num_cpus"] == count
