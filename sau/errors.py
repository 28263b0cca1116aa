"""Errors that a command prints as one line, and its exit status."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import yaml

# What is no mistake of the user. Not every system has every name.
_NAMES = "EIO ESTALE ETIMEDOUT ENXIO ENODEV EAGAIN EMFILE ENFILE ENOMEM EREMOTEIO ENOSPC EDQUOT EFBIG"
_FAULTS = {getattr(errno, name) for name in _NAMES.split() if hasattr(errno, name)}
# What libyaml and its constructors raise on a file that is no YAML, or not the YAML that was meant.
NO_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


def short_repr(value: object) -> str:
    """The beginning of a text from a file, for an error; of anything else, which may be long to write, its type."""
    return ascii(value[:20]) if isinstance(value, str) else f"a {type(value).__name__}"


def printable(text: str) -> str:
    """A text that may quote a stranger's file, with an escape for whatever is no letter, sign or space to print."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A text that may quote a stranger's file, on one line, with nothing in it but what can be printed."""
    return printable(" ".join(text.splitlines()))


def first_line(error: BaseException) -> str:
    """What an error of somebody else's code says first, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class SauError(ValueError):
    """A mistake that the user can mend; the text, one line, says what was got, what is allowed and what to do."""

    status = 2  # exit status of a command that ends with this error

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class ConfigError(SauError):
    """A flag, a YAML key or a hyperparameter is unknown, ill-typed or out of range."""


def require(name: str, value: object, ok: bool, allowed: str) -> None:
    """Refuse a setting: ConfigError with its name, its value and what is allowed."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}")


class DataError(SauError):
    """Pixels, labels or files of a data set are missing or not what they should be."""


class RecordError(SauError):
    """A result folder is missing, finished, foreign, damaged or does not fit the request."""


class Finished(RecordError):
    """A result folder holds the very run that is asked for, whole: there is nothing left to do, which is no mistake."""


class LockedError(RecordError):
    """Another process uses a result folder."""

    status = 1


class FaultError(RecordError):
    """A disk, a network or the system failed, so that another try may help."""

    status = 1


def os_error(error: OSError, text: str) -> RecordError:
    """What to raise, with `text`, for what the system refused."""
    return (FaultError if error.errno in _FAULTS else RecordError)(text)


class TrainingError(SauError):
    """A run cannot go on, or what it has made is of no use."""


class OutOfMemory(TrainingError):
    """The memory of a device does not hold the smallest part of a batch."""

    status = 1


def run_command(main: Callable[[], int | None]) -> int:
    """What `main` returns, an exit status (None is 0); an expected error is one line on stderr.

    2 is a mistake of the user, 1 any other expected error (disk, memory, a folder in use), 130 a stop by Ctrl-C or
    SIGTERM.
    """
    if sys.stdout is None:  # whoever called has closed it
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file need not be text
    with suppress(ValueError):  # only the main thread may handle signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        try:
            status = main()
        except Finished as done:
            print(done)
            status = 0
        sys.stdout.flush()
        return status or 0
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to go on", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, MemoryError) as error:
        return os_exit_status(error)


def lacks_memory(error: BaseException) -> bool:
    """Whether it is want of memory; torch says that of the CPU by a text alone."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error) or "out of memory" in str(error)


def os_exit_status(error: OSError | RuntimeError | MemoryError) -> int:
    """Say what the machine refused, and return the exit status; an error of another kind is raised again."""
    if isinstance(error, BrokenPipeError):  # the reader left, as `head` does; what is still to be written goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, OSError):
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if error.errno in _FAULTS else 2
    if lacks_memory(error):
        print(f"error: out of memory ({first_line(error)}); give a smaller batch, network or pictures", file=sys.stderr)
        return 1
    raise error
