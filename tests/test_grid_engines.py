"""Grids that really run: cells are killed on every engine, and grids are stopped by hand."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from grids import SMALL, plan
from toys import REPOSITORY, environment, stop_after

from sau.files import in_use
from sau.grid.engines import Cell
from sau.grid.store import Store

pytestmark = pytest.mark.slow
SCRIPT = [sys.executable, str(REPOSITORY / "scripts" / "grid.py"), "grid.yaml"]


@pytest.fixture
def every(tmp_path) -> list[Cell]:
    return plan(tmp_path / "grid.yaml", SMALL)


def begun(store: Store, every: list[Cell]) -> list[int]:
    """How often each cell of a finished grid was begun."""
    assert {store.state(cell) for cell in every} == {"finished"}
    logs = [(store.folder(cell) / "log.txt").read_text().splitlines() for cell in every]
    return [sum(line.startswith("recipe ") for line in lines) for lines in logs]


def processes(store: Store) -> list[int]:
    """The processes of cells below the store's root."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line for line in listed.splitlines() if "sau.grid.engines" in line and str(store.root) in line]
    return [int(line.split()[0]) for line in lines]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_grid_whose_cells_are_killed_finishes_with_the_same_bits(engine, every, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray", reason="needs ray: pip install -e '.[ray]'")
    draw, undisturbed, store = random.Random(0), Store(tmp_path / "undisturbed"), Store(tmp_path / "root")
    flags = ["--engine", engine, "--cores", "2", "--retries", "5", "--record_root"]
    done = subprocess.run([*SCRIPT, *flags, "undisturbed"], cwd=tmp_path, env=environment(), timeout=900)
    assert done.returncode == 0
    killed = 0
    with subprocess.Popen([*SCRIPT, *flags, "root"], cwd=tmp_path, env=environment()) as driver:
        while driver.poll() is None:
            time.sleep(draw.uniform(1, 10))  # a process takes seconds to import torch
            if killed < 4 and (pids := processes(store)):
                with suppress(ProcessLookupError):
                    os.kill(draw.choice(pids), signal.SIGKILL)
                    killed += 1
    assert driver.returncode == 0 and killed and begun(store, every)
    for cell in every:
        weights = [(one.folder(cell) / "model.safetensors").read_bytes() for one in (store, undisturbed)]
        assert weights[0] == weights[1], cell.label


def test_a_second_runner_on_one_folder_is_refused(every, tmp_path):
    argv = [*SCRIPT, "--record_root", "root", "--cores", "1"]
    first = subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and "6 to run" in first.stdout.readline()
    second = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=600)
    assert second.returncode == 1 and "in use" in second.stderr


def test_ctrl_c_stops_every_cell_and_the_next_call_goes_on(every, tmp_path):
    argv = [*SCRIPT, "--record_root", "root", "--cores", "2"]
    status, err = stop_after("[1/6]", signal.SIGINT, argv, tmp_path)
    assert status == 130 and "stopped; repeat the command to go on\n" in err
    store = Store(tmp_path / "root")
    assert {store.state(cell) for cell in every} <= {"finished", "waiting"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "6 cells: 6 finished" in done.stdout and max(begun(store, every)) <= 2


def test_the_cells_of_a_killed_runner_stop_by_themselves(every, tmp_path):
    argv, store = [*SCRIPT, "--record_root", "root", "--cores", "1"], Store(tmp_path / "root")

    def running() -> bool:
        return bool(processes(store)) or any(in_use(store.folder(cell)) for cell in every)

    with subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as driver:
        while not any(in_use(store.folder(cell)) for cell in every):
            time.sleep(0.1)
        driver.kill()
    deadline = time.monotonic() + 60
    while running() and time.monotonic() < deadline:
        time.sleep(0.1)  # a process that ends loses its name before its locks
    assert not running() and {store.state(cell) for cell in every} <= {"waiting", "finished"}
