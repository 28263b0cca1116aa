"""A process that is started to work for another one."""

import os
import time
from pathlib import Path

import sau


def python_path() -> str:
    """The PYTHONPATH of a process that is to import this library from where it is."""
    home = str(Path(sau.__file__).parents[1])
    return os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])


def outlive(parent: int) -> None:
    """Wait until the process `parent`, which started this one, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
