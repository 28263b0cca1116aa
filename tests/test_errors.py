"""What every command says and returns when the machine or the user does not give it what it needs."""

import errno
import os
import subprocess
import sys

import pytest
from toys import REPOSITORY

from sau.errors import (
    ConfigError,
    FaultError,
    Finished,
    LockedError,
    OutOfMemory,
    RecordError,
    os_error,
    run_command,
)


def test_the_errors_of_linux_alone_are_not_needed():
    """macOS has no EREMOTEIO."""
    code = "import errno; vars(errno).pop('EREMOTEIO', None); import sau.errors"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_want_of_memory_in_any_words_is_one_line(capsys):
    def greedy() -> None:
        raise MemoryError("Unable to allocate 9 GiB")

    assert run_command(greedy) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: out of memory (Unable to allocate 9 GiB)") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a\nb\x1b[2J"), 2, "error: a b\\x1b[2J"),
        (RecordError("x"), 2, "error: x"),
        (LockedError("x"), 1, "error: x"),
        (OutOfMemory("x"), 1, "error: x"),
        (FaultError("x"), 1, "error: x"),
        (OSError(errno.ESTALE, "Stale", "a\x1bb"), 1, f"error: [Errno {errno.ESTALE}] Stale: 'a\\x1bb'"),
        (OSError("a\x1bb\nc"), 2, "error: a\\x1bb\\nc"),
        (OSError(errno.ENOENT, "None"), 2, f"error: [Errno {errno.ENOENT}] None"),
        (RuntimeError("CUDA out of memory"), 1, "error: out of memory (CUDA out of memory); give a smaller batch,"),
    ],
)
def test_every_kind_of_mistake_has_its_status_and_one_line(error, status, said, capsys):
    def fails() -> None:
        raise error

    assert run_command(fails) == status
    err = capsys.readouterr().err
    assert err.startswith(said) and err.count("\n") == 1 and err.strip().isprintable()


def test_what_is_done_already_is_no_mistake(capsys):
    def done() -> None:
        raise Finished("it is there")

    assert run_command(done) == 0 and capsys.readouterr() == ("it is there\n", "")
    assert run_command(lambda: None) == 0 and run_command(lambda: 3) == 3


def test_a_fault_of_the_system_is_worth_another_try():
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.ENOSPC):
        assert type(os_error(OSError(number, os.strerror(number)), "x")) is FaultError
    for number in (errno.ENOENT, errno.EACCES):
        assert type(os_error(OSError(number, os.strerror(number)), "x")) is RecordError
