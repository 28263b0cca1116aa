"""Grids that really run: under fire on every engine, two at once, and stopped by hand."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from grids import SMALL
from toys import REPOSITORY, environment, stop_after

from sau.grid.plan import cells
from sau.grid.spec import read
from sau.grid.store import Store

pytestmark = pytest.mark.slow
SCRIPT = [sys.executable, str(REPOSITORY / "scripts" / "grid.py")]


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "grid.yaml").write_text(SMALL + "seeds: [0, 1]\n")
    return tmp_path / "grid.yaml"


def begun(store: Store, file: Path) -> set[int]:
    """How often the cells of a finished grid were begun."""
    every = cells(read(file)[1])
    assert {state.name for state in store.states(every).values()} == {"finished"}
    logs = [(store.folder(cell) / "log.txt").read_text().splitlines() for cell in every]
    return {sum(line.startswith("recipe ") for line in lines) for lines in logs}


def processes(store: Store) -> list[int]:
    """The processes of cells below the store's root."""
    listed = subprocess.run(["ps", "-ewwo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "sau.grid.work" in line and str(store.root) in line]


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_grid_whose_cells_are_killed_finishes_with_the_same_bits(engine, file, tmp_path):
    if engine == "ray":
        pytest.importorskip("ray", reason="needs ray: pip install -e '.[ray]'")
    every, draw = cells(read(file)[1]), random.Random(0)
    undisturbed, store = Store(tmp_path / "undisturbed"), Store(tmp_path / "root")
    flags = [str(file), "--engine", engine, "--cores", "2", "--retries", "5", "--record_root"]
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
    assert driver.returncode == 0 and killed
    assert begun(store, file) >= {1}  # every cell has finished
    for cell in every:
        weights = [(one.folder(cell) / "model.safetensors").read_bytes() for one in (store, undisturbed)]
        assert weights[0] == weights[1], cell.label


def test_two_runners_on_one_folder_share_its_cells(file, tmp_path):
    argv = [*SCRIPT, str(file), "--record_root", "root", "--cores", "1"]
    pipe = subprocess.PIPE
    two = [subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=pipe, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=600)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], texts
    assert begun(Store(tmp_path / "root"), file) == {1}
    assert all("12 cells: 12 finished" in text for text in texts)
    assert any("elsewhere" in text for text in texts)


def test_ctrl_c_stops_every_cell_and_the_next_call_goes_on(file, tmp_path):
    argv = [*SCRIPT, str(file), "--record_root", "root", "--cores", "2"]
    status, err = stop_after("[1/12]", signal.SIGINT, argv, tmp_path)
    assert status == 130 and "stopped; repeat the command to go on" in err
    store, every = Store(tmp_path / "root"), cells(read(file)[1])
    assert {state.name for state in store.states(every).values()} <= {"finished", "waiting"}
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "12 cells: 12 finished" in done.stdout
    assert max(begun(store, file)) <= 2


def test_the_cells_of_a_killed_driver_stop_by_themselves(file, tmp_path):
    argv = [*SCRIPT, str(file), "--record_root", "root", "--cores", "1"]
    store, every = Store(tmp_path / "root"), cells(read(file)[1])
    with subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as driver:
        while not any(store.running(cell) for cell in every):
            time.sleep(0.1)
        driver.kill()
    deadline = time.monotonic() + 60
    while (processes(store) or any(store.running(cell) for cell in every)) and time.monotonic() < deadline:
        time.sleep(0.1)  # a process that ends loses its name before its locks
    assert not processes(store)
    assert {state.name for state in store.states(every).values()} <= {"waiting", "finished"}
