"""Two processes that want the same result folder, and locks that the dead left."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import torch
from torture_parts.common import Row, forked

from sau.errors import LockedError, RecordError
from sau.record.folder import Record

RACES, STALE = 200, 20
WON, LOCKED, TOO_LATE = 10, 11, 12


def _write(folder: Path, start: Path, identity: dict[str, int], tag: float) -> int:
    """Wait for the start, then make the folder, every file with the mark of this process."""
    while not start.exists():
        time.sleep(0.0005)
    record = Record(folder)
    try:
        record.begin({"tag": tag}, identity, overwrite=False)
    except LockedError as error:
        return LOCKED if str(folder) in str(error) else 99
    except RecordError:
        return TOO_LATE
    for step in range(3):
        record.row(epoch=step, tag=tag)
        record.save({"stage": 0, "place": {"epoch": step}, "objects": {}})
    record.save_tensors("model", {"tag": torch.full((3,), tag)})
    record.finish({"tag": tag})
    return WON


def _pair(folder: Path, start: Path, same: bool, late: float) -> list[int]:
    """Two processes at once; their outcomes."""
    children = []
    for tag in (1.0, 2.0):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                if tag == 2.0:
                    time.sleep(late)
                status = _write(folder, start, {"a": 0 if same else int(tag)}, tag)
            finally:
                os._exit(status)
        children.append(pid)
    start.touch()
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def _pure(folder: Path) -> bool:
    """Whether everything in the folder is of one process."""
    record = Record(folder)
    tag = record.check()["tag"]
    rows = (folder / "metrics.jsonl").read_text()
    model = record.load_tensors("model")["tag"]
    return record.summary()["tag"] == tag and rows.count(f'"tag": {tag}') == 3 and bool((model == tag).all())


def races(folder: Path, seed: int, share: float) -> list[Row]:
    """Races for a folder, with equal and with different settings; then locks of processes that were killed."""
    draw, count, survived, found = random.Random(seed), max(1, round(RACES * share)), 0, Counter[str]()
    words = {WON: "won", LOCKED: "told who has it", TOO_LATE: "too late", 99: "failed"}
    for i in range(count):
        place, start = folder / str(i) / "run", folder / f"start {i}"
        outcomes = _pair(place, start, i % 2 == 0, draw.choice((0.0, 0.0, 0.002, 0.01)))
        found.update(words.get(outcome, "failed") for outcome in outcomes)
        survived += outcomes.count(WON) == 1 and {*outcomes} <= {WON, LOCKED, TOO_LATE} and _pure(place)
    rows = [
        Row("R5", "two processes, one folder", count, survived, ", ".join(f"{n} {w}" for w, n in sorted(found.items())))
    ]
    stale = max(1, round(STALE * share))
    taken, slowest = 0, 0.0
    for i in range(stale):
        place, start = folder / f"stale {i}" / "run", folder / f"begin {i}"

        def die(place: Path = place) -> int:
            Record(place).begin({"tag": 0.0}, {"a": 0}, overwrite=False)
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        forked(die)
        start.touch()
        left, began = (place.parent / ".run.lock").exists(), time.monotonic()
        status, _ = forked(lambda place=place, start=start: _write(place, start, {"a": 0}, 3.0))  # type: ignore[misc]
        slowest = max(slowest, time.monotonic() - began)
        taken += left and status == WON
    return [*rows, Row("R5", "the lock of a killed process", stale, taken, f"taken over in {slowest:.2f} s at most")]
