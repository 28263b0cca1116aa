"""How a command ends with an error: one line on stderr and an exit status."""

import errno
import os

import pytest

from sau.errors import (
    ConfigError,
    FaultError,
    Finished,
    LockedError,
    OutOfMemory,
    RecordError,
    os_error,
    require,
    run_command,
)  # fmt: skip


def raising(error: BaseException):
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ConfigError("a\nb\x1b[2J"), 2, "error: a b\\x1b[2J"),
        (RecordError("x"), 2, "error: x"),
        (LockedError("x"), 1, "error: x"),
        (OutOfMemory("x"), 1, "error: x"),
        (FaultError("x"), 1, "error: x"),
        (OSError(errno.ESTALE, "Stale", "a\x1bb"), 1, f"error: [Errno {errno.ESTALE}] Stale: 'a\\x1bb'"),
        (OSError("a\x1bb\nc"), 2, "error: a\\x1bb\\nc"),
        (OSError(errno.ENOENT, "None"), 2, f"error: [Errno {errno.ENOENT}] None"),
        (RuntimeError("CUDA out of memory"), 1, "error: out of memory (CUDA out of memory)"),
        (MemoryError("Unable to allocate 9 GiB"), 1, "error: out of memory (Unable to allocate 9 GiB)"),
    ],
)
def test_an_expected_error_has_its_status_and_one_line(error, status, line, capsys):
    assert run_command(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 and err.strip().isprintable()


def test_other_endings(capsys):
    assert run_command(raising(Finished("it is there"))) == 0 and capsys.readouterr() == ("it is there\n", "")
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0 and run_command(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(raising(RuntimeError("a bug")))


def test_a_reader_that_left_is_no_error(monkeypatch, capfd):
    """As `head` does."""
    monkeypatch.setattr("os.dup2", lambda *given: None)
    assert run_command(raising(BrokenPipeError())) == 1 and capfd.readouterr() == ("", "")


def test_a_wrong_parameter_is_named_with_its_value_and_what_is_allowed():
    require("lr", 0.1, True, "above 0")
    with pytest.raises(ConfigError, match=r"lr is -1, allowed is above 0") as refusal:
        require("lr", -1, False, "above 0")
    assert (refusal.value.param, refusal.value.got, refusal.value.allowed) == ("lr", -1, "above 0")


@pytest.mark.parametrize(("name", "kind"), [("EIO", FaultError), ("ENOSPC", FaultError), ("EACCES", RecordError)])
def test_a_fault_of_the_system_is_worth_another_try(name, kind):
    number = getattr(errno, name)
    assert type(os_error(OSError(number, os.strerror(number)), "x")) is kind
