"""Locks: one holder at a time, by name; the dead hold nothing."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from toys import REPOSITORY, environment

from sau.errors import LockedError, RecordError
from sau.record import lock
from sau.record.lock import Lock, holder

HOLD = """
import sys, time
from sau.record.lock import Lock, Path
Lock(Path(sys.argv[1])).acquire()
print("has it", flush=True)
time.sleep(60)
"""
TAKE = """
import sys, time
from pathlib import Path
from sau.errors import LockedError
from sau.record.lock import Lock
path, log = Path(sys.argv[1]), Path(sys.argv[2])
while not Path(sys.argv[3]).exists():
    time.sleep(0.001)
turns = 20
while turns:
    try:
        with Lock(path):
            with log.open("a") as file:
                file.write("in\\n")
            time.sleep(0.001)
            with log.open("a") as file:
                file.write("out\\n")
        turns -= 1
    except LockedError:
        pass
    time.sleep(0.001)
"""


def start(code: str, *argv: object) -> subprocess.Popen[bytes]:
    env = environment(PYTHONPATH=str(REPOSITORY))
    return subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], env=env, stdout=subprocess.PIPE)


def forge(path: Path, **changes: object) -> None:
    """A lock file as this process would write it, with changes."""
    path.write_text(json.dumps(asdict(replace(lock._self(), **changes))))


def test_a_second_taker_is_told_who_has_it(tmp_path, one_line):
    path = tmp_path / "deep" / "x.lock"
    with Lock(path, "the folder x"):
        assert holder(path) is not None
        with pytest.raises(LockedError) as caught:
            Lock(path, "the folder x").acquire()
        line = one_line(caught.value)
        assert "the folder x is in use" in line and f"process {os.getpid()} on " in line
    assert not path.exists() and holder(path) is None
    with Lock(path):
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    path = tmp_path / "x.lock"
    with start(HOLD, path) as process:
        assert process.stdout is not None and process.stdout.readline() == b"has it\n"
        with pytest.raises(LockedError, match=f"process {process.pid} "):
            Lock(path).acquire()
        process.kill()
    with Lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_later_process_of_the_same_pid_is_not_the_holder(tmp_path):
    path = tmp_path / "x.lock"
    forge(path)
    assert holder(path) is not None
    forge(path, start="1")
    assert holder(path) is None
    with Lock(path):
        pass


def test_a_holder_on_another_machine_lives_while_it_gives_signs(tmp_path, monkeypatch):
    path = tmp_path / "x.lock"
    forge(path, host="elsewhere", pid=1)
    with pytest.raises(LockedError, match="on elsewhere since"):
        Lock(path).acquire()
    past = time.time() - lock.LEASE - 1
    os.utime(path, (past, past))
    monkeypatch.setattr(lock, "BEAT", 0.01)
    with Lock(path):
        os.utime(path, (past, past))
        for _ in range(500):
            if path.stat().st_mtime > past + 1:
                break
            time.sleep(0.01)
        assert path.stat().st_mtime > past + 1


def test_rubbish_and_an_empty_file_hold_nothing(tmp_path):
    for content in (b"", b"{", b"[1]", b'{"pid": 1}', b"\xff"):
        (tmp_path / "x.lock").write_bytes(content)
        assert holder(tmp_path / "x.lock") is None
        with Lock(tmp_path / "x.lock"):
            pass


def test_a_lock_that_was_taken_over_is_not_released(tmp_path):
    path = tmp_path / "x.lock"
    mine = Lock(path)
    mine.acquire()
    forge(path, host="elsewhere")
    mine.release()
    assert json.loads(path.read_text())["host"] == "elsewhere"
    path.unlink()
    mine.release()  # the folder may be gone


def test_where_no_lock_can_be_one_line_says_so(tmp_path, one_line):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError) as caught:
        Lock(tmp_path / "file" / "x.lock").acquire()
    assert "cannot lock" in one_line(caught.value)


def test_processes_that_race_for_a_dead_holders_lock_take_turns(tmp_path):
    path, log, go = tmp_path / "x.lock", tmp_path / "log", tmp_path / "go"
    forge(path, start="1")
    runners = [start(TAKE, path, log, go) for _ in range(3)]
    time.sleep(0.5)
    go.touch()
    for process in runners:
        with process:
            assert process.wait(60) == 0
    lines = log.read_text().split()
    assert lines == ["in", "out"] * 60
