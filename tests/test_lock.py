"""Locks: one holder at a time, by name; the dead hold nothing."""

import json
import os
import shutil
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


def test_a_holder_without_proc_is_alive_in_every_time_zone(tmp_path, monkeypatch):
    """As on macOS, where `ps` says when a process began, in words and in the time of who asks."""
    if shutil.which("ps") is None:
        pytest.skip("there is no ps")
    monkeypatch.setattr(lock, "_BOOT", tmp_path / "none")
    with Lock(tmp_path / "x.lock"):
        for zone in ("UTC", "Asia/Tokyo"):
            monkeypatch.setenv("TZ", zone)
            assert holder(tmp_path / "x.lock") is not None


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
    ahead = time.time() + lock.AHEAD / 2  # of another clock: nobody may be thrown out for that
    os.utime(path, (ahead, ahead))
    assert holder(path) is not None
    to_come = time.time() + 2 * lock.AHEAD  # of an archive that kept it
    os.utime(path, (to_come, to_come))
    assert holder(path) is None
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
    whole = asdict(lock._self())
    wrong = ({"since": "x"}, {"since": 1e300}, {"since": float("nan")}, {"pid": -1}, {"pid": True}, {"host": 5})
    forged = [json.dumps({**whole, **change}).encode() for change in wrong]
    for content in (b"", b"{", b"[1]", b'{"pid": 1}', b"\xff", b"[" * 9_000, *forged):
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


def test_a_link_in_place_of_a_lock_is_refused(tmp_path, one_line):
    """A downloaded record may have one, to any file of the user."""
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "x.lock").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "y.lock")
    for name in ("x.lock", "y.lock"):
        with pytest.raises(RecordError) as caught:
            Lock(tmp_path / name).acquire()
        assert "cannot lock" in one_line(caught.value)
    assert (tmp_path / "precious").read_text() == "mine" and holder(tmp_path / "y.lock") is None


def test_a_holder_whose_lock_was_taken_over_leaves(tmp_path):
    """It was silent for too long; what it would go on to write is somebody else's."""
    path = tmp_path / "x.lock"
    env = environment(PYTHONPATH=str(REPOSITORY))
    code = "from sau.record import lock\nlock.BEAT = 0.05" + HOLD
    argv = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "has it\n"
        forge(path, host="else\x1bwhere")
        _, err = process.communicate(timeout=240)
    assert process.returncode == 1 and err.count("\n") == 1
    assert "was taken over by process" in err and "else\\x1bwhere" in err
    assert json.loads(path.read_text())["host"] == "else\x1bwhere"


def test_a_process_of_another_container_is_judged_by_its_signs(tmp_path, monkeypatch):
    """Host and boot may be equal there, but not the table in which its number stands."""
    path = tmp_path / "x.lock"
    monkeypatch.setattr(lock, "_PIDS", tmp_path / "there")
    (tmp_path / "there").symlink_to("pid:[1]")
    forge(path, start="1")
    (tmp_path / "there").unlink()
    (tmp_path / "there").symlink_to("pid:[2]")
    assert holder(path) is not None
    past = time.time() - lock.LEASE - 1
    os.utime(path, (past, past))
    assert holder(path) is None


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


def test_a_lock_whose_file_is_gone_once_it_is_had_is_taken_anew(tmp_path, monkeypatch):
    """Its holder left, and took the file along, between the opening and the locking."""
    path, really = tmp_path / "x.lock", lock.fcntl.flock

    def flock(file: int, how: int) -> None:
        really(file, how)
        monkeypatch.setattr(lock.fcntl, "flock", really)
        path.unlink()

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with Lock(path):
        assert holder(path) is not None


def test_nothing_is_left_of_what_stood_in_a_lock_before(tmp_path):
    path = tmp_path / "x.lock"
    path.write_text("x" * 5_000)
    with Lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(LockedError):
            Lock(path).acquire()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system does not say who is a zombie")
def test_a_process_that_has_ended_holds_nothing_before_it_is_waited_for(tmp_path):
    path = tmp_path / "x.lock"
    with start(HOLD, path) as process:
        assert process.stdout is not None and process.stdout.readline() == b"has it\n"
        assert holder(path) is not None
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert holder(path) is None
        with Lock(path):
            pass


@pytest.mark.skipif(not Path("/proc/self/comm").exists(), reason="a process has no name to change")
def test_a_process_may_be_called_anything(tmp_path):
    """What follows its name is counted from the last bracket."""
    name = Path("/proc/self/comm").read_text()
    with Lock(tmp_path / "x.lock"):
        try:
            Path("/proc/self/comm").write_text("a) Z (b) X")
            assert holder(tmp_path / "x.lock") is not None
        finally:
            Path("/proc/self/comm").write_text(name.strip())


def test_a_lock_file_that_names_nobody_ends_no_run(tmp_path, monkeypatch):
    """As one is that somebody else is writing."""
    monkeypatch.setattr(lock, "BEAT", 0.01)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Lock(tmp_path / "x.lock"):
        (tmp_path / "x.lock").write_text("")
        time.sleep(0.1)
    assert left == []


def test_who_has_given_a_lock_back_looks_at_it_no_more(tmp_path, monkeypatch):
    """Or the next holder would be taken for one that took over."""
    monkeypatch.setattr(lock, "BEAT", 0.01)
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    mine, path = Lock(tmp_path / "x.lock"), tmp_path / "x.lock"
    mine.acquire()
    mine.release()
    forge(path, host="elsewhere")
    os.utime(path, (9, 9))
    time.sleep(0.1)
    assert path.stat().st_mtime == 9 and left == []
