"""`attack/NAME.py`, `defense/NAME.py` and `python -m sau`: which command is meant, and how it ends."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sau.attack import ATTACKS
from sau.commands import attack, defend
from sau.defense import DEFENSES
from sau.errors import FULL, LOCKED, LockedError, OutOfMemory, SauError, first_line
from sau.record import holding

GRACE = 1.0  # seconds that a stopped run has to leave by itself


class _Stopped(BaseException):
    """SIGINT or SIGTERM on its way out; carries its number."""


def main(argv: Sequence[str]) -> int:
    """`attack NAME ...` or `defense NAME ...`; returns the exit status.

    0 is success, 2 a user's mistake (said in one line), 71 want of memory, 75 a folder that another process has, 130
    and 143 a run that was stopped and can be resumed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    commands: dict[tuple[str, str], Callable[[str, Sequence[str]], None]] = {
        **{("attack", name): attack for name in ATTACKS},
        **{("defense", name): defend for name in DEFENSES},
    }
    try:
        command = commands.get((argv[0], argv[1])) if len(argv) > 1 else None
        if command is None:
            names = ", ".join(" ".join(words) for words in commands)
            print(f"usage: python -m sau KIND NAME [flags]; KIND NAME is one of: {names}", file=sys.stderr)
            return 0 if list(argv) in (["--help"], ["-h"]) else 2
        command(argv[1], argv[2:])
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return {LockedError: LOCKED, OutOfMemory: FULL}.get(type(error), 2)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({first_line(error)}); try a smaller --batch_size", file=sys.stderr)
        return FULL
    except _Stopped as stop:
        print(f"\n{_onward(argv)}", file=sys.stderr)
        return 128 + int(stop.args[0])
    finally:
        holding.give_all_back()
    return 0


def _onward(argv: Sequence[str]) -> str:
    """How the stopped command is gone on with: in the folder that it had begun, if it had come so far."""
    folder = holding.latest()
    if folder is None:
        return "stopped before it had begun; repeat the command"
    given = {word.split("=")[0] for word in argv}
    named = "" if argv[0] == "defense" or "--save_folder_name" in given else f" with --save_folder_name {folder.name}"
    afresh = " without --overwrite" if "--overwrite" in given else ""
    return f"stopped; repeat the command{named}{afresh} to resume from the last checkpoint"


def _stop(number: int, frame: Any) -> None:
    # A long backward pass does not let Python raise; leaving by force is safe, for every file is written atomically.
    timer = threading.Timer(GRACE, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
    raise _Stopped(number)
