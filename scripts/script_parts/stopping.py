"""How a long script is stopped."""

import signal
import sys
from collections.abc import Callable
from typing import Any


def stoppable(run: Callable[[], int]) -> int:
    """What `run` returns; 130 or 143, after a line, where SIGINT or SIGTERM ends it, even if a parent ignores it."""
    numbers: list[int] = []

    def stop(number: int, frame: Any) -> None:
        numbers.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return run()
    except KeyboardInterrupt:
        print("\nstopped; repeat the command to go on", file=sys.stderr)
        return 128 + (numbers or [signal.SIGINT])[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
