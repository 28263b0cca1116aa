"""Grids that really run: under fire on every engine, two at once, and stopped by hand."""

import signal
import subprocess
import sys
import time
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


@pytest.mark.parametrize(("engine", "module"), [("local", "sau"), ("ray", "ray")])
def test_a_grid_under_fire_loses_and_repeats_nothing(engine, module, tmp_path_factory):
    pytest.importorskip(module, reason=f"needs {module}: pip install -e '.[{engine}]'")
    work = tmp_path_factory.getbasetemp() / "drill"  # shared, for the reference
    argv = [sys.executable, str(REPOSITORY / "scripts" / "grid_drill.py"), str(work), "--engine", engine]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "driver killed" in done.stdout and "nothing lost, nothing repeated" in done.stdout
    assert ("killed what runs " in done.stdout) == (engine != "local")


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


def working(store: Store) -> bool:
    """Whether a process of a cell is there."""
    listed = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    return any("sau.grid.work" in line and str(store.root) in line for line in listed.splitlines())


def test_the_cells_of_a_killed_driver_stop_by_themselves(file, tmp_path):
    argv = [*SCRIPT, str(file), "--record_root", "root", "--cores", "1"]
    store, every = Store(tmp_path / "root"), cells(read(file)[1])
    with subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL) as driver:
        while not any(store.running(cell) for cell in every):
            time.sleep(0.1)
        driver.kill()
    deadline = time.monotonic() + 60
    while working(store) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not working(store)
    assert {state.name for state in store.states(every).values()} <= {"waiting", "finished"}
