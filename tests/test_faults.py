"""Faults at random moments: processes killed, disks full, files spoiled, two processes in one folder.
Each command runs in a process forked from this one, so that nothing is imported twice.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from toys import QUICK

from sau.cli import main
from sau.record.folder import CONFIG
from sau.run import RunLogger

TINY = ("--dataset", "digits", "--width", "2", "--epochs", "2", "--eval_every", "1", *QUICK)
RUNS = {
    "badnet": ["attack", "badnet", *TINY],
    "inputaware": ["attack", "inputaware", *TINY, "--clean_train_epochs", "1"],
    "sau": ["defense", "sau", "--result_file", "victim", "--epochs", "2", "--ratio", "0.25", *QUICK],
    "fp": ["defense", "fp", "--result_file", "victim", "--epochs", "2", "--ratio", "0.25", *QUICK],
}
each = pytest.mark.parametrize("name", RUNS)


def nothing() -> None:
    pass


def forked(work: Callable[[], int], kill_after: float | None = None) -> tuple[int, str]:
    """The status of `work` in a forked process, or minus the signal that ended it, and its stderr."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status, text = 99, StringIO()
        try:
            with redirect_stdout(StringIO()), redirect_stderr(text):
                status = work()
        except BaseException as error:  # the parent reports it
            text.write(repr(error))
        os.write(write, text.getvalue().encode()[-4000:])
        os._exit(status)
    os.close(write)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read, "rb") as pipe:
        return status, pipe.read().decode()


def run(name: str, root: Path, prepare: Callable[[], None] = nothing) -> Callable[[], int]:
    """A command as work for `forked`, with a checkpoint after every batch."""
    argv = [*RUNS[name], "--record_root", str(root)]
    argv += ["--save_folder_name", name] if argv[0] == "attack" else []

    def work() -> int:
        made = RunLogger.__post_init__
        RunLogger.__post_init__ = lambda self: made(self) or vars(self.session).update(save_every=0.0)
        prepare()
        sys.argv = ["sau", *argv]
        return main(argv)

    return work


def result(name: str, root: Path) -> Path:
    return root / name if RUNS[name][0] == "attack" else root / "victim" / "defense" / name


def tensors(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def at_write(number: int, act: Callable[[], None]) -> Callable[[], None]:
    """Call `act` before each flush to the disk from the `number`th one on."""

    def prepare() -> None:
        seen, sync = [0], os.fsync

        def fsync(file: int) -> None:
            seen[0] += 1
            if seen[0] >= number:
                act()
            sync(file)

        os.fsync = fsync

    return prepare


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def whole(victim: Path, tmp_path: Path) -> Callable[[str], tuple[Path, dict[str, bytes], float]]:
    """`whole(name)` runs a command undisturbed: a fresh record root, its tensors, its seconds."""

    def undisturbed(name: str) -> tuple[Path, dict[str, bytes], float]:
        roots = [Path(shutil.copytree(victim.parent, tmp_path / f"root{i}")) for i in range(2)]
        started = time.monotonic()
        status, errors = forked(run(name, roots[0]))
        assert status == 0, errors
        return roots[1], tensors(result(name, roots[0])), time.monotonic() - started

    return undisturbed


@pytest.mark.slow
@each
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(name, whole):
    draw = random.Random(name)
    root, wanted, seconds = whole(name)
    killed = 0
    for number in range(1, 9):
        inside = at_write(draw.randint(1, 3), kill) if number % 2 else nothing
        status, _ = forked(run(name, root, inside), None if number % 2 else draw.uniform(0, seconds))
        killed += status == -signal.SIGKILL
        assert status in (0, -signal.SIGKILL)
    status, errors = forked(run(name, root))
    assert status == 0 and tensors(result(name, root)) == wanted and killed >= 2, errors


@pytest.mark.slow
@each
def test_a_full_disk_is_one_line_and_the_repeated_run_ends_with_the_same_bits(name, whole):
    root, wanted, _ = whole(name)
    for number in (1, 2, 3, 5):
        status, errors = forked(run(name, root, at_write(number, full)))
        assert status == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors
        folder = result(name, root)
        assert not folder.is_dir() or not [file for file in folder.iterdir() if file.name.startswith(".")]
    status, errors = forked(run(name, root))
    assert status == 0 and tensors(result(name, root)) == wanted, errors


@pytest.mark.parametrize("name", ["badnet", "sau"])
def test_a_run_that_is_killed_at_its_first_write_can_be_repeated(name, whole):
    root, wanted, _ = whole(name)
    assert forked(run(name, root, at_write(1, kill)))[0] == -signal.SIGKILL
    left = [file.name for file in result(name, root).iterdir()]
    assert len(left) == 1 and left[0].startswith(f".{CONFIG}.")
    status, errors = forked(run(name, root))
    assert status == 0 and tensors(result(name, root)) == wanted, errors
