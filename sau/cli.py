"""`attack/NAME.py`, `defense/NAME.py` and `python -m sau`: which command is meant, and how it ends."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from sau.attack import ATTACKS
from sau.command.attack_and_defend import attack, defend
from sau.defense import DEFENSES
from sau.errors import RecordError, told
from sau.record import holding, schema
from sau.record.folder import CONFIG, Record
from sau.settings.config import nearest

GRACE = 1.0  # seconds that a stopped run has to leave by itself
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Stopped(BaseException):
    """SIGINT or SIGTERM on its way out; carries its number."""


def main(argv: Sequence[str]) -> int:
    """`attack NAME ...` or `defense NAME ...`; returns the exit status.

    0 is success, also where the run was finished before, 2 a user's mistake (said in one line), 71 want of memory, 74 a
    fault of a disk or the like, 75 a folder that another process has, 130 and 143 a run that was stopped and can be
    resumed, 141 a reader of the output who left.
    """
    commands: dict[tuple[str, str], Callable[[str, Sequence[str]], None]] = {
        **{("attack", name): attack for name in ATTACKS},
        **{("defense", name): defend for name in DEFENSES},
    }
    command = commands.get((argv[0], argv[1])) if len(argv) > 1 else None
    if command is None:
        names = [" ".join(words) for words in commands]
        asked = " ".join(argv[:2])
        near = f"{asked!r} is no command{nearest(asked, names)}; " if len(argv) > 1 else ""
        print(f"{near}usage: python -m sau KIND NAME [flags]; KIND NAME is one of: {', '.join(names)}", file=sys.stderr)
        return 0 if list(argv) in (["--help"], ["-h"]) else 2
    try:
        with _stoppable(argv[0] == "attack") as farewell:
            return _ended(partial(command, argv[1], argv[2:]), farewell)
    except _Stopped as stop:  # between the last step and the end
        return 128 + int(stop.args[0])


def _ended(command: Callable[[], None], farewell: Callable[[], None]) -> int:
    """Run a command to its end; what went wrong is said, and is the exit status."""
    try:
        return told(command)
    except _Stopped as stop:
        farewell()
        return 128 + int(stop.args[0])
    finally:
        holding.give_all_back()


def _onward(attacks: bool) -> str:
    """How the stopped command is gone on with, by what the folder says of it that it had begun."""
    folder, run = holding.first(), dict[str, Any]()
    if folder is not None and not Record(folder).finished:  # else the one to overwrite was not touched yet
        with suppress(RecordError):
            run = schema.configuration(folder / CONFIG, light=True).get("run", {})
    if folder is None or not run:
        return "stopped; repeat the command to go on"
    named = f" with --save_folder_name {folder.name}" if attacks and run.get("save_folder_name") is None else ""
    afresh = " without overwrite" if run.get("overwrite") else ""
    return f"stopped; repeat the command{named}{afresh} to resume from the last checkpoint"


@contextmanager
def _stoppable(attacks: bool) -> Iterator[Callable[[], None]]:
    """Inside, SIGINT and SIGTERM raise `_Stopped`; yields what says, once, how to go on.

    A long backward pass does not let Python raise, and torch may take minutes to leave. So a thread, which is told at
    once, ends the process after GRACE; leaving by force is safe, for every file is written atomically.
    """
    once, left, said = threading.Lock(), threading.Event(), list[bool]()

    def farewell() -> None:
        with once, suppress(OSError, ValueError):  # the reader of stderr may have left
            if not said:
                print(f"\n{_onward(attacks)}", file=sys.stderr, flush=True)
                said.append(True)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield farewell
        return
    hear, tell = os.pipe()
    os.set_blocking(tell, False)
    stopped = threading.Event()

    def stop(number: int, frame: Any) -> None:
        for one in _SIGNALS:  # the process is on its way out, and stays so
            signal.signal(one, signal.SIG_IGN)
        stopped.set()
        raise _Stopped(number)

    def leave() -> None:
        for number in iter(lambda: os.read(hear, 1), b""):
            if number[0] in _SIGNALS and not left.wait(GRACE):
                end = threading.Timer(GRACE, os._exit, (128 + number[0],))  # where stderr takes no text
                end.daemon = True
                end.start()
                farewell()
                os._exit(128 + number[0])
        os.close(hear)

    threading.Thread(target=leave, daemon=True).start()
    before = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    handlers = {number: signal.signal(number, stop) or signal.SIG_DFL for number in _SIGNALS}
    try:
        yield farewell
    finally:
        if not stopped.is_set():
            left.set()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(tell)  # ends the thread, unless it is to end the process
