"""The engines of others, with stubs in their places: what cannot be submitted, and how much runs at once."""

import dataclasses
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from test_grid import SMALL, Scripted

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
def slurm(monkeypatch, tmp_path) -> Callable[[set[int]], clusters.Slurm]:
    """`slurm(fails)` is the engine on an sbatch that fails in the calls of these numbers; its jobs end at once."""
    monkeypatch.setattr(clusters, "PAUSE", 0.01)
    monkeypatch.setenv("PYTHONPATH", "")  # the engine sets it for its jobs; after the test it is as before
    monkeypatch.setattr("sau.grid.runner.ELSEWHERE", 0.01)

    def engine(fails: set[int]) -> clusters.Slurm:
        calls = iter(range(100))

        def submit(run: Any, job: Any) -> Any:
            if next(calls) in fails:
                raise Refused("sbatch: error: QOSMaxSubmitJobPerUserLimit\n  more")
            return SimpleNamespace(job_id="7", done=lambda: True, result=lambda: run(job))

        executor = SimpleNamespace(update_parameters=lambda **more: None, submit=submit)
        errors = SimpleNamespace(UncompletedJobError=Refused, FailedJobError=Refused, FailedSubmissionError=Refused)
        stub = SimpleNamespace(AutoExecutor=lambda **more: executor, core=SimpleNamespace(utils=errors))
        monkeypatch.setitem(sys.modules, "submitit", stub)
        return clusters.Slurm(tmp_path, {}, 2, "slurm", 5)

    return engine


def test_what_slurm_does_not_take_stays_in_line(every, slurm, tmp_path, monkeypatch):
    store, lines = Store(tmp_path / "root"), list[str]()
    done = Scripted(store)
    by_folder = {str(store.folder(cell)): cell for cell in every}

    def at_once(job: Any) -> Any:
        done.submit(by_folder[job.folder], job)
        return done.poll()[0][1]

    monkeypatch.setattr(clusters, "run_cell", at_once)
    engine = slurm({1, 3, 4})
    runner = Runner(every, store, engine, retries=0, timeout=None, forecast=Forecast({}), say=lines.append)
    assert runner.run() == [] and len(done.order) == 6
    waits = [line for line in lines if line.startswith("waits ")]
    assert waits and all("not submitted: sbatch: error: QOSMaxSubmitJobPerUserLimit" in line for line in waits)


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
    for change, count in (({}, 4 + 8), ({"memory_gb": 30.0}, 2), ({"gpus": 0.5}, 4), ({"threads": 8}, 2)):
        assert engine.parallel(dataclasses.replace(every[0], **change)) == count


@pytest.mark.parametrize(("address", "wanted"), [(None, "local"), ("auto", "auto")])
def test_ray_without_an_address_is_started_whatever_runs_here(ray, address, wanted):
    clusters.RayEngine(address, 2)
    assert ray["address"] == wanted and ("num_cpus" in ray) is (address is None)
