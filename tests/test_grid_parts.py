"""What a grid's cells and its measurements are made of: helpers of one run, and the times by hand and by the grid."""

from contextlib import suppress

import pytest
import torch

from sau.machine import devices


class Started(Exception):
    """Where a helper would be started."""


@pytest.mark.parametrize(("kind", "threads", "each"), [("cpu", 4, 2), ("cpu", 1, 1), ("cuda", 4, 4)])
def test_devices_of_a_cpu_share_its_threads(monkeypatch, kind, threads, each):
    """All of them would want the same cores; what has a card of its own keeps its threads."""
    seen, before = list[int](), torch.get_num_threads()

    def start(rank: int, kind: str, count: int, share: int) -> None:
        seen.extend([share, torch.get_num_threads()])
        raise Started

    monkeypatch.setattr(devices, "_Helper", start)
    monkeypatch.setattr(devices, "leave", lambda: None)
    torch.set_num_threads(threads)
    try:
        with suppress(Started), devices._helpers(kind, 2):
            pass
        assert seen == [each, each] and torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
