"""Several devices for one run: which can, and the processes that do a part of the command's work.

The command starts a helper for every further device of this machine and hands it the method, the network and the
pictures; see `sau.machine.team` for what they then do together.
"""

import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sau.data.images import Images
from sau.errors import ConfigError, SauError, TrainingError
from sau.machine.device import choose_device, prepare, set_threads
from sau.machine.parent import outlive, python_path
from sau.machine.team import Team, fabric, leave
from sau.method import Method
from sau.session import Session
from sau.settings.run import Run

GRACE = 5.0  # seconds that a process has to say by itself what went wrong


def place(run: Run, method: Method, batch_size: int) -> torch.device:
    """The device of this process; ConfigError if `run.devices` of them cannot work together on `method`."""
    where, n = choose_device(run.device), run.devices
    if n == 1:
        return prepare(where)
    united(run, method, batch_size)
    cards = torch.cuda.device_count()
    _require(n, where.index is None, f"device is {run.device!r}, which is one of them; give cuda")
    _require(n, where.type == "cpu" or n <= cards, f"this machine has {cards} cuda devices")
    fabric()
    return prepare(torch.device("cuda", 0) if where.type == "cuda" else where)


def united(run: Run, method: Method, batch_size: int) -> None:
    """Refuse, by a ConfigError, what so many devices could do together on no machine."""
    n = run.devices
    _require(n, n == 1 or method.teamwork, f"{method.name} works on one; leave the flag out")
    minutes = "max_minutes ends the run of one alone; leave one of the two flags out"
    _require(n, n == 1 or run.max_minutes is None, minutes)
    _require(n, batch_size % n == 0, f"batch_size is {batch_size}; allowed is a multiple of {n}")


def _require(devices: int, fine: bool, problem: str) -> None:
    if not fine:
        raise ConfigError(f"devices is {devices}, but {problem}")


def spread(devices: int, work: Any, model: nn.Module, images: Images, *, session: Session, **more: Any) -> nn.Module:
    """`work(model, images, session=session, **more)` on so many devices; returns what it returns in this process.

    Args:
        devices: how many, this process's included.
        work: `fit` of an attack or `purify` of a defense whose class has `teamwork`.
        model: where this process computes; its first argument.
        images: the second one, on the same device.
        session: progress and checkpoints, of this process alone.
        more: further arguments; they are pickled.

    Raises TrainingError if a helper is lost.
    """
    if devices == 1:
        alone: nn.Module = work(model, images, session=session, **more)
        return alone
    where, method = images.pixels.device, work.__self__
    with _helpers(where.type, devices) as helpers:
        try:
            for helper in helpers:
                helper.greet()
            team = Team(where.type, devices)
            task = {"kind": type(method), "params": method.params(), "work": work.__name__, "more": more}
            team.fabric.broadcast({**task, "model": model.to("cpu"), "images": images.to(torch.device("cpu"))})
            done: nn.Module = work(model.to(where), images, session=team.session(session), **more)
            team.close()
        except RuntimeError:  # the backends raise several types of it where another process is gone
            lost = _lost(helpers, GRACE)
            if lost:
                raise TrainingError(lost) from None
            raise
    return done


def assist(parent: int, kind: str, devices: int, threads: int) -> None:
    """What the process of a helper does: its part of what the command, the process `parent`, hands over."""
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()
    set_threads(threads)
    torch.backends.cudnn.benchmark = kind == "cuda"  # as `prepare` does for the command
    fabric()  # most of the time until here was importing
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nobody reads on, so what NCCL may print would fill the pipe
    team = Team(kind, devices)
    task, where = team.fabric.broadcast(None), team.fabric.device
    work = getattr(task["kind"](**task["params"]), task["work"])
    session = team.session(Session(say=lambda text: None, save_every=math.inf))
    try:
        work(task["model"].to(where), task["images"].to(where), session=session, **task["more"])
    except SauError as error:
        sys.exit(str(error))
    team.close()


def _follow(parent: int) -> None:
    outlive(parent)
    os._exit(1)


class _Helper:
    """The process of a further device."""

    def __init__(self, rank: int, kind: str, devices: int, threads: int) -> None:
        self.rank, self.errors = rank, tempfile.TemporaryFile()
        words = (os.getpid(), kind, devices, threads)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from sau.machine.devices import assist; assist{words}"],
            env={**os.environ, "LOCAL_RANK": str(rank), "PYTHONPATH": python_path()},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,  # Ctrl-C reaches the command alone, which then stops its helpers
        )

    def greet(self) -> None:
        """Wait until it is ready to join; RuntimeError if it never will be."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise RuntimeError("a helper did not start")

    def end(self) -> str:
        """How it ended before its work was done, in a line; empty if it did not."""
        status = self.process.poll()
        if not status:
            return ""
        lines = os.pread(self.errors.fileno(), 100_000, 0).decode(errors="replace").strip().splitlines() or [
            f"exit status {status}"
        ]
        return f"the process of device {self.rank} was lost ({lines[-1]}); repeat the command to resume"

    def close(self) -> None:
        """Stop it, whatever it does; it holds nothing."""
        self.process.kill()
        self.process.communicate()
        self.errors.close()


@contextmanager
def _helpers(kind: str, devices: int) -> Iterator[list[_Helper]]:
    """Inside, the other processes exist and this one has what it needs to join them; none is left behind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NODE_RANK": "0"}
    before, done = {name: os.environ.get(name) for name in (*group, "LOCAL_RANK")}, threading.Event()
    threads = torch.get_num_threads()
    share = threads if kind == "cuda" else max(1, threads // devices)  # on the CPU all of them want the same cores
    os.environ.update(group, LOCAL_RANK="0")
    helpers: list[_Helper] = []
    watch = threading.Thread(target=_watch, args=(helpers, done), daemon=True)
    watch.start()
    try:
        set_threads(share)
        for rank in range(1, devices):
            helpers.append(_Helper(rank, kind, devices, share))
        yield helpers
    finally:
        done.set()
        watch.join()
        for helper in helpers:
            helper.close()
        leave()
        set_threads(threads)
        os.environ.update({name: value for name, value in before.items() if value is not None})
        for name in (name for name, value in before.items() if value is None):
            os.environ.pop(name, None)


def _watch(helpers: Sequence[_Helper], done: threading.Event) -> None:
    """End this process where a helper is lost and it does not notice: a card that waits for another one waits on."""
    while not done.wait(0.5):
        lost = _lost(helpers, 0.0)
        if lost and not done.wait(GRACE):
            sys.stderr.write(f"error: {lost}\n")
            sys.stderr.flush()
            os._exit(1)  # safe, for every file is written atomically


def _lost(helpers: Sequence[_Helper], patience: float) -> str:
    """How a helper was lost, in a line; empty if none is within so many seconds."""
    until = time.monotonic() + patience
    while True:
        ends = [end for end in (helper.end() for helper in helpers) if end]
        if ends or time.monotonic() >= until:
            return ends[0] if ends else ""
        time.sleep(0.1)
