"""A process that was started to work for another one."""

import os
import time


def outlive(parent: int) -> None:
    """Wait until the process `parent`, which started this one, is gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
