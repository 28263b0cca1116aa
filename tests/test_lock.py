"""A result folder is used by one process at a time."""

import os
import signal
import subprocess
import sys

import pytest
from toys import REPOSITORY, environment

from sau.errors import LockedError, RecordError
from sau.record.lock import acquire, first, in_use, release

HOLD = """
import sys, time
from pathlib import Path
from sau.record.lock import acquire
acquire(Path(sys.argv[1]))
print("has it", flush=True)
time.sleep(600)
"""
RACE = """
import sys, time
from pathlib import Path
from sau.errors import LockedError
from sau.record import lock
folder, log, go = map(Path, sys.argv[1:])
lock.WAIT = 0.001
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
turns = 20
while turns:
    try:
        lock.acquire(folder)
    except LockedError:
        continue
    with log.open("a") as file:
        file.write("in\\n")
    time.sleep(0.001)
    with log.open("a") as file:
        file.write("out\\n")
    lock.release(folder)
    turns -= 1
    time.sleep(0.002)
"""


def start(code: str, *argv: object) -> subprocess.Popen[bytes]:
    """A process that runs `code` and has printed its first line."""
    env = environment(PYTHONPATH=str(REPOSITORY))
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline()
    return process


def test_the_lock_of_a_killed_process_is_free(tmp_path, one_line):
    folder = tmp_path / "deep" / "x"
    with start(HOLD, folder) as process:
        assert in_use(folder)
        with pytest.raises(LockedError) as caught:
            acquire(folder)
        assert one_line(caught.value) == f"{folder} is in use by another process; wait for it or stop it"
        assert caught.value.status == 1
        process.send_signal(signal.SIGKILL)
    assert not in_use(folder) and acquire(folder) and in_use(folder)
    release(folder)
    assert not in_use(folder)


def test_processes_that_race_for_a_folder_take_turns(tmp_path):
    folder, log, go = tmp_path / "x", tmp_path / "log", tmp_path / "go"
    runners = [start(RACE, folder, log, go) for _ in range(3)]
    go.touch()
    for process in runners:
        with process:
            assert process.wait(240) == 0
    assert log.read_text().split() == ["in", "out"] * 60


def test_a_folder_is_one_by_whatever_path(tmp_path, monkeypatch):
    monkeypatch.setattr("sau.record.lock._locks", {})
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    assert acquire(tmp_path / "disk" / "deep" / "a") and not acquire(tmp_path / "link" / "a")
    assert acquire(tmp_path / "b") and first() == tmp_path / "disk" / "deep" / "a"
    release(tmp_path / "link" / "a")
    assert first() == tmp_path / "b"
    release(tmp_path / "b")
    assert first() is None


def test_a_link_or_a_pipe_in_place_of_a_lock_is_no_way_to_other_files(tmp_path, one_line):
    """A downloaded record may have one."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".x.lock").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / ".y.lock")
    for name, action in (("x", acquire), ("x", in_use), ("y", in_use)):
        with pytest.raises(RecordError) as caught:
            action(tmp_path / name)
        assert f"lock of {tmp_path / name}" in (said := one_line(caught.value)) or "cannot lock" in said
    assert (tmp_path / "precious").read_text() == "mine"


def test_where_no_lock_can_be_one_line_says_so(tmp_path, one_line):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError) as caught:
        acquire(tmp_path / "file" / "x")
    assert "cannot lock" in one_line(caught.value)
