"""The engines of others, with stubs in their places: what cannot be submitted, and how much runs at once."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from grids import SMALL, Scripted
from toys import REPOSITORY

from sau.errors import ConfigError
from sau.grid import clusters
from sau.grid.engines import GIB
from sau.grid.forecast import Forecast
from sau.grid.plan import Cell, cells
from sau.grid.runner import Runner
from sau.grid.spec import read
from sau.grid.store import Store


@pytest.fixture
def every(tmp_path) -> list[Cell]:
    (tmp_path / "grid.yaml").write_text(SMALL)
    return cells(read(tmp_path / "grid.yaml")[1])


class Refused(RuntimeError):
    """What submitit raises of an sbatch that fails."""


@pytest.fixture
def slurm(monkeypatch, tmp_path) -> Callable[..., clusters.Slurm]:
    """`slurm(fails)` is the engine on an sbatch that fails in the calls of these numbers; its jobs end at once, and in
    the calls `lost` without a word."""
    monkeypatch.setattr(clusters, "PAUSE", 0.01)
    monkeypatch.setenv("PYTHONPATH", "")  # the engine sets it for its jobs; after the test it is as before
    monkeypatch.setattr("sau.grid.runner.ELSEWHERE", 0.01)

    def engine(fails: set[int], lost: Sequence[int] = (), cluster: str = "slurm") -> clusters.Slurm:
        calls = iter(range(100))

        def submit(run: Any, job: Any) -> Any:
            number = next(calls)
            if number in fails:
                raise Refused("sbatch: error: QOSMaxSubmitJobPerUserLimit\n  more")

            def result() -> Any:
                if number in lost:
                    raise Refused("Job (task=0) was cancelled\n  more")
                return run(job)

            return SimpleNamespace(job_id="7", done=lambda: True, result=result)

        executor = SimpleNamespace(update_parameters=lambda **more: None, submit=submit)
        errors = SimpleNamespace(UncompletedJobError=Refused, FailedJobError=Refused, FailedSubmissionError=Refused)
        stub = SimpleNamespace(AutoExecutor=lambda **more: executor, core=SimpleNamespace(utils=errors))
        monkeypatch.setitem(sys.modules, "submitit", stub)
        return clusters.Slurm(tmp_path, {}, 2, cluster, 5)

    return engine


def at_once(store: Store, every: list[Cell], done: Scripted | None = None) -> Callable[[Any], Any]:
    """What runs a job in the place of `run_cell`: it is finished when this returns."""
    done = done or Scripted(store)
    by_folder = {str(store.folder(cell)): cell for cell in every}

    def run(job: Any) -> Any:
        done.submit(by_folder[job.folder], job)
        return done.poll()[0][1]

    return run


def test_what_slurm_does_not_take_stays_in_line(every, slurm, tmp_path, monkeypatch):
    store, lines = Store(tmp_path / "root"), list[str]()
    done = Scripted(store)
    monkeypatch.setattr(clusters, "run_cell", at_once(store, every, done))
    engine = slurm({1, 3, 4})
    runner = Runner(every, store, engine, retries=0, timeout=None, forecast=Forecast({}), say=lines.append)
    assert runner.run() == [] and len(done.order) == 6
    waits = [line for line in lines if line.startswith("waits ")]
    assert waits and all("not submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit" in line for line in waits)


def test_a_job_that_slurm_loses_is_tried_again(every, slurm, tmp_path, monkeypatch):
    """Cancelled, timed out, or its machine died: submitit has no result of it."""
    store, lines = Store(tmp_path / "root"), list[str]()
    monkeypatch.setattr(clusters, "run_cell", at_once(store, every))
    runner = Runner(
        every, store, slurm(set(), [0, 1]), retries=1, timeout=None, forecast=Forecast({}), say=lines.append
    )
    assert runner.run() == []
    again = [line for line in lines if line.startswith("again ")]
    assert len(again) == 2 and all("job 7 lost: Job (task=0) was cancelled; try 2 of 2" in line for line in again)


def test_processes_of_slurms_local_cluster_are_those_of_this_machine(every, slurm, monkeypatch, one_line):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 3)
    monkeypatch.setattr("sau.grid.engines.memory", lambda: 10 * GIB)
    engine, wide = slurm(set(), cluster="local"), dataclasses.replace(every[0], threads=2)
    for change, words in (({"threads": 4}, "threads is 4, but this machine"), ({"memory_gb": 9.5}, "memory_gb is 9.5")):
        with pytest.raises(ConfigError) as caught:
            engine.check([every[1], dataclasses.replace(every[0], **change)])
        assert words in one_line(caught.value)
    assert engine.parallel(wide) == 1 and engine.parallel(every[0]) == 2 and engine.room(wide)
    engine.running.append((wide, None))
    assert engine.room(every[0]) and not engine.room(wide)
    slurm(set()).check([dataclasses.replace(every[0], threads=400)])  # whose machines only Slurm knows


def test_a_slurm_that_takes_nothing_is_one_line(every, slurm, tmp_path, one_line):
    runner = Runner(
        every, Store(tmp_path), slurm({0}), retries=0, timeout=None, forecast=Forecast({}), say=lambda line: None
    )
    with pytest.raises(ConfigError) as caught:
        runner.run()
    assert "badnet_r0.1_s0 cannot be submitted: sbatch: error: QOSMax" in one_line(caught.value)


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


def test_ray_runs_as_many_cells_as_every_resource_holds(every, ray):
    engine = clusters.RayEngine("auto")
    for change, count in (
        ({}, 4 + 8),
        ({"memory_gb": 30.0}, 2),
        ({"gpus": 0.5}, 4),
        ({"gpus": 0.6}, 2),
        ({"threads": 8}, 2),
    ):
        assert engine.parallel(dataclasses.replace(every[0], **change)) == count


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
        clusters.RayEngine("auto").check([every[1], dataclasses.replace(every[0], **change)])
    assert words in one_line(caught.value) and "badnet_r0.1_s0" in str(caught.value)


def test_a_local_cluster_of_slurm_gives_no_gpus(every, slurm, one_line):
    with pytest.raises(ConfigError) as caught:
        slurm(set(), cluster="local").check([every[1], dataclasses.replace(every[0], gpus=1.0)])
    assert "badnet_r0.1_s0: gpus is 1, but --cluster local gives none out; --engine local" in one_line(caught.value)
    slurm(set()).check([dataclasses.replace(every[0], gpus=1.0)])


def test_ray_is_started_on_no_more_cores_than_there_are(ray, monkeypatch, one_line):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 2)
    with pytest.raises(ConfigError) as caught:
        clusters.RayEngine(None, 99)
    assert "cores is 99, but this process may use 2" in one_line(caught.value) and not ray


@pytest.mark.parametrize(("address", "wanted"), [(None, "local"), ("auto", "auto")])
def test_ray_without_an_address_is_started_whatever_runs_here(ray, address, wanted, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 2)
    clusters.RayEngine(address, 2)
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
    engine = clusters.RayEngine("auto")
    runner = Runner(every, store, engine, retries=1, timeout=None, forecast=Forecast({}), say=lines.append)
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
        clusters.RayEngine("auto").check(every)
    assert words in one_line(caught.value)


def test_a_machine_that_left_ray_counts_for_nothing(every, ray):
    engine = clusters.RayEngine("auto")
    sys.modules["ray"].nodes()[1]["Alive"] = False
    assert engine.parallel(every[0]) == 4
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
    engine = clusters.RayEngine("auto")
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
        clusters.RayEngine(address)
    assert words in one_line(caught.value) and "it did not answer" in str(caught.value)


def test_ray_is_started_on_the_cores_that_are_asked_for(ray, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 4)
    monkeypatch.setattr("sau.grid.clusters.usable", lambda: 4)
    for cores, count in ((3, 3), (None, 4)):
        clusters.RayEngine(None, cores)
        assert ray["num_cpus"] == count


def test_a_job_of_slurm_says_what_its_cell_needs_and_is_cancelled_in_the_end(every, tmp_path, monkeypatch):
    wanted: dict[str, Any] = {}
    calls: list[str] = []
    job = SimpleNamespace(cancel=lambda: calls.append("cancelled"), wait=lambda: calls.append("waited"))
    executor = SimpleNamespace(update_parameters=lambda **more: wanted.update(more), submit=lambda run, work: job)
    errors = SimpleNamespace(UncompletedJobError=Refused, FailedJobError=Refused, FailedSubmissionError=Refused)
    stub = SimpleNamespace(AutoExecutor=lambda **more: executor, core=SimpleNamespace(utils=errors))
    monkeypatch.setitem(sys.modules, "submitit", stub)
    monkeypatch.setenv("PYTHONPATH", "")
    engine = clusters.Slurm(tmp_path, {"partition": "gpu"}, 2, "slurm", 5)
    assert os.environ["PYTHONPATH"] == str(REPOSITORY)  # as its jobs get it
    cell = dataclasses.replace(every[0], threads=3, memory_gb=1.5, gpus=2.0)
    engine.submit(cell, Store(tmp_path).job(cell, None))
    assert wanted == {
        "name": "badnet", "cpus_per_task": 3, "mem_gb": 1.5, "gpus_per_node": 2, "timeout_min": 5,
        "slurm_additional_parameters": {"partition": "gpu"},
    }  # fmt: skip
    engine.stop()
    assert calls == ["cancelled", "waited"] and not engine.running


def test_a_slurm_that_refused_a_job_is_left_alone_for_a_while(every, slurm, tmp_path, monkeypatch):
    engine = slurm({1})
    monkeypatch.setattr(clusters, "PAUSE", 60.0)
    for cell in every[:2]:
        assert engine.room(cell)
        engine.submit(cell, Store(tmp_path).job(cell, None))
    assert len(engine.running) == 1 and not engine.room(every[2])


def test_where_there_is_no_slurm_it_is_one_line(tmp_path, monkeypatch, one_line):
    def none(**more: Any) -> None:
        raise RuntimeError("Could not detect slurm\n  more")

    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=none))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(ConfigError) as caught:
        clusters.Slurm(tmp_path, {}, 2, "slurm", 5)
    assert "no Slurm here: Could not detect slurm" in one_line(caught.value)


def test_slurm_holds_no_more_jobs_than_it_is_given(every, slurm, tmp_path):
    engine = slurm(set())
    assert engine.parallel(every[0]) == 2
    for cell in every[:2]:
        assert engine.room(cell)
        engine.submit(cell, Store(tmp_path).job(cell, None))
    assert not engine.room(every[2])
