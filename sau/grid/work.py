"""The process of one cell: `python -m sau.grid.work PARENT FOLDER KIND NAME flags...`.

It locks the result folder, and does what `python -m sau KIND NAME flags...` does. When the process that
started it dies, it stops, so that a killed grid leaves nothing behind that works on unseen.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sau.cli import main
from sau.errors import LockedError, run_command
from sau.grid.cells import LOCKED
from sau.record.folder import Record
from sau.record.lock import acquire, release
from sau.runtime.process import outlive


def work(folder: Path, argv: Sequence[str]) -> int:
    """Run a cell unless it is finished; the exit status is that of `sau.cli.main`, or LOCKED."""
    try:
        acquire(folder)
    except LockedError as error:
        print(f"error: {error}", file=sys.stderr)
        return LOCKED
    try:
        return 0 if Record(folder).finished else main(argv)
    finally:
        release(folder)


def _follow(parent: int) -> None:
    """Stop this process, as Ctrl-C would, once its parent is gone."""
    outlive(parent)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(10)
    os._exit(1)  # a long call into torch did not let Python raise; every file is written atomically


if __name__ == "__main__":
    started_by, where, *words = sys.argv[1:]
    threading.Thread(target=_follow, args=(int(started_by),), daemon=True).start()
    sys.argv = ["sau", *words]  # the record keeps this as its command
    sys.exit(run_command(partial(work, Path(where), words)))
