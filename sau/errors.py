"""Errors of the library, and how a command ends with one: one line on stderr and an exit status."""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

import yaml

# Failures of a disk, a network or the system, so that another try may help.
_DISK = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENXIO, errno.ENODEV, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FAULTS = _DISK | {errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# What wrong content of a file raises where it is used, and what PyYAML raises on what is not YAML.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
NO_YAML = (yaml.YAMLError, *MALFORMED)


def printable(text: str) -> str:
    """A text that may quote an untrusted file, with unprintable characters escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """A text that may quote an untrusted file as one printable line."""
    return printable(" ".join(text.splitlines()))


def first_line(error: BaseException) -> str:
    """The first line of another library's error; its type where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


class SauError(ValueError):
    """A mistake that the user can mend; one line says what was got, what is allowed and what to do."""

    status = 2  # exit status of a command that ends with this error

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class ConfigError(SauError):
    """A flag, a YAML key or a hyperparameter is unknown, ill-typed or out of range. Where it is about one parameter,
    `param` is its name, `got` its value, and `allowed` says in words what may be."""

    def __init__(self, text: str, *, param: str | None = None, got: object = None, allowed: str | None = None) -> None:
        super().__init__(text)
        self.param, self.got, self.allowed = param, got, allowed


def require(name: str, value: object, ok: bool, allowed: str) -> None:
    """ConfigError with the parameter, its value and the allowed values, unless `ok`."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}, allowed is {allowed}", param=name, got=value, allowed=allowed)


class DataError(SauError):
    """Pixels, labels or files of a data set are missing or invalid."""


class RecordError(SauError):
    """A result folder is missing, finished, damaged, not ours, or does not fit the request."""


class Finished(RecordError):
    """A result folder holds the same run, finished: nothing is left to do, and the exit status is 0."""


class LockedError(RecordError):
    """Another process uses a result folder."""

    status = 1


class TrainingError(SauError):
    """A run cannot go on, or its result is useless."""


class OutOfMemory(TrainingError):
    """The smallest part of a batch does not fit into the memory of the device."""

    status = 1


def os_error(error: OSError, text: str) -> RecordError:
    """The error to raise, with `text`, for one of the operating system; its status is 1 for a fault of the system."""
    made = RecordError(text)
    made.status = 1 if error.errno in _FAULTS else 2
    return made


def lacks_memory(error: BaseException) -> bool:
    """Whether memory ran out; of the CPU torch says so in the text alone."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error) or "out of memory" in str(error)


def run_command(main: Callable[[], int | None], resume: str = "") -> int:
    """Run `main` and return its exit status (None, and a run that was finished before, is 0); an expected error is one
    line on stderr: 2 for a mistake of the user, 1 for any other (disk, memory, a locked folder), 130 for Ctrl-C or
    SIGTERM; `resume` is what the line then adds on how to go on."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name need not be text
    with suppress(ValueError):  # only the main thread may handle signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        status = main() or 0
        print(end="", flush=True)  # where stdout is a closed pipe, the error comes here
        return status
    except Finished as finished:
        print(finished)
        return 0
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"\nstopped; repeat the command to go on{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader left, like `head`: discard the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1 if error.errno in _FAULTS else 2
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        print(f"error: out of memory ({first_line(error)}); give a smaller batch, network or images", file=sys.stderr)
        return 1
