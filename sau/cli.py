"""`attack/NAME.py`, `defense/NAME.py` and `python -m sau`: which command is meant, and how it ends."""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from sau.attack import ATTACKS
from sau.command.attack_and_defend import attack, defend
from sau.defense import DEFENSES
from sau.errors import RecordError, told
from sau.record import lock, schema
from sau.record.folder import CONFIG, Record
from sau.settings.config import nearest


def main(argv: Sequence[str]) -> int:
    """`attack NAME ...` or `defense NAME ...`; returns the exit status.

    0 is success, also where the run was finished before; 2 a mistake of the user; 1 another expected error (disk,
    memory, a folder in use); 130 a run that was stopped by Ctrl-C or SIGTERM and can be resumed.
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
    return told(lambda: _run(command, argv[0], argv[1], argv[2:]))


def _run(command: Callable[[str, Sequence[str]], None], kind: str, name: str, flags: Sequence[str]) -> int:
    try:
        command(name, flags)
        return 0
    except KeyboardInterrupt:
        print(f"\n{_onward(kind == 'attack')}", file=sys.stderr)
        return 130
    finally:
        lock.release_all()


def _onward(attacks: bool) -> str:
    """How to resume the stopped command, by the folder that it began."""
    folder, run = lock.first(), dict[str, Any]()
    if folder is not None and not Record(folder).finished:  # else the one to overwrite was not touched yet
        with suppress(RecordError):
            run = schema.configuration(folder / CONFIG, light=True).get("run", {})
    if folder is None or not run:
        return "stopped; repeat the command to go on"
    named = f" with --save_folder_name {folder.name}" if attacks and run.get("save_folder_name") is None else ""
    afresh = " without overwrite" if run.get("overwrite") else ""
    return f"stopped; repeat the command{named}{afresh} to resume from the last checkpoint"
