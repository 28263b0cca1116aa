"""Triggers that are trained are trained once: finished ones are kept by content, interrupted ones are resumed."""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

import sau
from sau.data.decode import cache_folder
from sau.errors import LockedError, RecordError
from sau.loop import Session
from sau.record.folder import Record
from sau.record.schema import digest

Made = tuple[dict[str, Tensor], dict[str, float]]  # tensors, and figures about them
_TENSORS = "trigger"


def made(
    name: str, identity: Mapping[str, Any], build: Callable[[Session], Made], session: Session | None = None
) -> Made:
    """What `build` makes, on the CPU: from `cache_folder()/triggers` if it is there whole, else made and kept there.

    The folder is a record: files are written at once or not at all, and their SHA-256 is compared. What is damaged
    costs a line and is made again; what was interrupted goes on from its checkpoint; of two processes that want the
    same thing, one makes it and the other one waits. A folder that cannot be written costs a line, not the run.

    Args:
        name: what it is, for the folder and the screen; a plain folder name.
        identity: everything that determines the result, as JSON has it, the kind of device too; the number of threads,
            on which rounding depends, and the version of the library are added.
        build: gets the session to train with; returns tensors and figures about them.
        session: progress; None prints it and keeps a log.
    """
    known = {**identity, "made": name, "sau": sau.__version__, "threads": torch.get_num_threads()}
    say, shelf = (session or Session()).say, None
    with ExitStack() as stack:
        try:
            record = Record(cache_folder() / "triggers" / f"{name}-{digest(known)[:16]}")
            found = _whole(record) or _begin(record, known, stack, say)
            if found is not None:
                say(f"{name}: {in_words(found[1])}; made before, {record.path}")
                return found
            shelf = _Shelf(record, say)
        except (OSError, RuntimeError, RecordError) as error:  # no home, no folder that can be written
            say(f"{name}: it will not be kept ({_brief(error)}); SAU_CACHE names another folder")
        kept: dict[str, Any] = {"checkpoint": shelf, "on_epoch": shelf.on_epoch} if shelf else {"checkpoint": None}
        printed = session or Session(say=shelf.tell if shelf else print)
        tensors, figures = build(replace(printed, stage=0, **kept))
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}  # as from a file
        say(f"{name}: {in_words(figures)}")
        if shelf is not None:
            shelf.close(tensors, figures)
        return tensors, figures


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over a network's printed form, its tensors, those of its normalisation too, and its precision: tells what
    was trained with what."""
    amp = "amp" if getattr(network, "amp", False) else ""
    digest = hashlib.sha256(f"{network}{amp}".encode())
    for key, tensor in {**network.state_dict(), **dict(network.named_buffers())}.items():
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def same_trigger(record: Record, trigger: nn.Module | None) -> None:
    """Note in a record what its trigger is. RecordError if it goes on with another one than it began with, as it may
    where the trigger was trained again, with other threads or elsewhere: the network has seen the first.
    """
    mark = None if trigger is None else fingerprint(trigger)
    if record.config.get("trigger_digest", mark) != mark:
        what = f"{record.path} began with another trigger, which was trained with other threads or on another machine"
        raise RecordError(f"{what}; repeat it as it was, choose another name, or --overwrite")
    record.update_config(trigger_digest=mark)


def _whole(record: Record) -> Made | None:
    """A finished folder's content; None if it is unfinished or damaged."""
    try:
        if record.finished:
            record.check()
            return record.load_tensors(_TENSORS), record.summary()
    except RecordError:
        return None
    return None


def _begin(record: Record, identity: dict[str, Any], stack: ExitStack, say: Callable[[str], None]) -> Made | None:
    """Take the folder until `stack` closes, clean up and begin; what another process made in the meantime, if it did.

    Raises OSError or RecordError if it cannot be written.
    """
    stack.enter_context(_alone(record.path, say))
    found = _whole(record)
    if found is not None:
        return found
    try:
        if record.finished:
            record.check()
        record.begin({}, identity, overwrite=False)
        resumes = record.load() is not None
    except LockedError:
        raise
    except RecordError as error:
        say(f"{_brief(error)}; making it again")
        shutil.rmtree(record.path, ignore_errors=True)
        record.begin({}, identity, overwrite=False)
        resumes = False
    say(f"{'going on with' if resumes else 'making'} {identity['made']}, once for all runs, in {record.path}")
    return None


class _Shelf:
    """A record as a checkpoint that gives up, with one line, when it cannot be written any more."""

    def __init__(self, record: Record, say: Callable[[str], None]) -> None:
        self.record, self.say, self.open = record, say, True

    def tell(self, text: str) -> None:
        """Print a line, and keep it while the record is kept."""
        if self.open:
            self._try(lambda: self.record.log(text))
        else:
            self.say(text)

    def load(self) -> dict[str, Any] | None:
        return self.record.load()

    def save(self, place: dict[str, Any]) -> None:
        self._try(lambda: self.record.save(place))

    def on_epoch(self, epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
        self._try(lambda: self.record.log_metrics(epoch=epoch, **losses))
        return {}

    def close(self, tensors: dict[str, Tensor], figures: dict[str, float]) -> None:
        self._try(lambda: self.record.save_tensors(_TENSORS, tensors))
        self._try(lambda: self.record.finish(figures))

    def _try(self, write: Callable[[], None]) -> None:
        if self.open:
            try:
                write()
            except (OSError, RecordError) as error:
                self.open = False
                self.say(f"it will not be kept ({_brief(error)}); SAU_CACHE names another folder")


@contextmanager
def _alone(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process works in `path`; OSError if nothing can be written beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f"{path.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"another run is at work in {path}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def in_words(figures: Mapping[str, float]) -> str:
    """Figures as a line."""
    return ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in figures.items())


def _brief(error: Exception) -> str:
    return " ".join(str(error).split(";")[0].split())
