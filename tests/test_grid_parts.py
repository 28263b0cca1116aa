"""What a grid's cells and its measurements are made of: helpers of one run, and the times by hand and by the grid."""

import runpy
from contextlib import suppress

import pytest
import torch
from toys import REPOSITORY

from sau.errors import ConfigError
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


def test_the_cost_of_a_grid_is_measured_in_turns(monkeypatch, tmp_path, capsys):
    """The machine may slow down meanwhile: both ways see the same of it."""
    drill = runpy.run_path(str(REPOSITORY / "scripts" / "grid_drill.py"))
    ways, times = list[str](), iter([(10.0, 8.0), (11.0, 8.5), (20.0, 18.0), (20.0, 18.0), (30.0, 28.0), (36.0, 33.0)])

    def timed(way: str, *more: object) -> tuple[float, float]:
        ways.append(way)
        return next(times)

    monkeypatch.setitem(drill["overhead"].__globals__, "timed", timed)
    drill["overhead"](tmp_path, 1, 3)
    out = capsys.readouterr().out.splitlines()
    assert ways == ["hand", "grid"] * 3 and len(out) == 5
    assert out[0] == "1/3: 4 cells of 2.5 s: 10.0 s by hand, 8.0 in the runs; 11.0 s by the grid, 8.5 in the runs"
    assert out[3] == "grid / hand: median 1.100, least 1.000, most 1.200"
    assert out[4] == "added outside the runs: median 3.33%, least 0.00%, most 5.00%"
    (tmp_path / "mine" / "app").mkdir(parents=True)
    (tmp_path / "mine" / "app" / "config.yaml").write_text("theirs: 1\n")  # other programs have such files, too
    with pytest.raises(ConfigError, match="no folder of an earlier drill"):
        drill["emptied"](tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()
