"""What is in a network file that somebody else made, found out in a process that cannot do much harm.

The process that opens the file has a limit on its memory and on its time, and may write no file. It reads by allow
list (`torchfile`), so that nothing in the file is run, and hands back JSON and plain tensors, never objects.
"""

import hashlib
import json
import multiprocessing
import os
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from sau.data.sources import SOURCES
from sau.errors import RecordError, printable
from sau.files import write
from sau.foreign import pickles, torchfile, weights
from sau.foreign.confinement import confine
from sau.foreign.formats import file_format
from sau.foreign.guess import Guess, guess
from sau.models.zoo import torchvision_names

SECONDS = 120  # on the clock, from the start of the process
MEMORY = 1 << 30  # bytes beyond what the process has before it opens the file, and eight times the file
HARMLESS, SUSPICIOUS, UNREADABLE = 0, 1, 2  # exit status of `scripts/inspect_checkpoint.py`
Report = dict[str, Any]


def inspect(path: Path, to: Path | None = None) -> Report:
    """Look into a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.onnx` file in a process of its own.

    Args:
        path: the file.
        to: where to write its tensors as safetensors: those of the network under their own names if one was
            recognised, otherwise all of them; not written unless the verdict is harmless.

    Returns a dictionary that JSON can hold: path, bytes, sha256, format, imports (names that the file's pickles
    import), refused (those among them that weights do not need), tensors (name, shape, dtype, values, nan), network
    (see `Guess`, or None), several (under what, where it holds a known network more than once), normalisation (mean,
    std and where from, or None), status and verdict (one line).
    Raises RecordError if there is no such file and if `to` exists or cannot be written.
    """
    if not path.is_file():
        raise RecordError(f"there is no file {path}")
    if to is not None and to.exists():
        raise RecordError(f"{to} exists; name a new file")
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_work, args=(there, path, to is not None), daemon=True)
    child.start()
    there.close()
    deadline = time.monotonic() + SECONDS
    try:
        report: Report = json.loads(_receive(here, deadline))
        if to is not None and report["status"] == HARMLESS:
            write(to, _receive(here, deadline))
    except (EOFError, OSError):
        late = time.monotonic() >= deadline
        child.join(0 if late else 2)  # a process that ends by itself is soon gone
        if child.exitcode == 1:
            raise RuntimeError(f"reading {path} failed by a fault of the program; its traceback stands above") from None
        reason = f"it took more than {SECONDS} seconds" if late else "it took too much memory or time"
        report = {**_outside(path), "status": SUSPICIOUS, "verdict": f"suspicious: {reason} to read, and was stopped"}
    finally:
        child.kill()
        child.join()
        here.close()
    return report


def _receive(here: Connection, deadline: float) -> bytes:
    if not here.poll(max(0.0, deadline - time.monotonic())):
        raise EOFError
    return here.recv_bytes()


def _work(there: Connection, path: Path, convert: bool) -> None:
    """What the process does."""
    torchvision_names()  # imported now, because its import looks for a folder to write to
    content = b""
    try:
        confine(MEMORY + 8 * path.stat().st_size, SECONDS)
        report, found, known = look(path)
        if convert and found is not None and report["status"] == HARMLESS:
            try:
                content = found.packed(known.prefix if known else "")
            except RecordError as error:
                report |= {"status": UNREADABLE, "verdict": f"harmless to open, but not to be converted: {error}"}
        answer = json.dumps(report).encode()
    except MemoryError:
        os._exit(SUSPICIOUS + 1)
    except Exception as error:  # what nobody thought of is the file's doing, too
        verdict = f"unreadable: {type(error).__name__}: {ascii(str(error))[1:-1][:160]}"
        answer = json.dumps({**_outside(path), "status": UNREADABLE, "verdict": verdict}).encode()
    there.send_bytes(answer)
    if content:
        there.send_bytes(content)


def look(path: Path) -> tuple[Report, weights.Weights | None, Guess | None]:
    """The report of `inspect`, made in this process; what could be read, and the network that it is."""
    report = _outside(path)
    try:
        raw = torchfile.content(path)
    except RecordError as error:
        return {**report, "status": UNREADABLE, "verdict": f"unreadable: {error}"}, None, None
    report["sha256"], report["imports"] = hashlib.sha256(raw).hexdigest(), pickles.imports(raw)
    report["format"] = file_format(path, raw) or None
    report["refused"] = sorted({*report["imports"]} - pickles.allowed())
    scripted = pickles.scripted(raw)
    try:
        found = weights.read(path, raw)
    except RecordError as error:
        verdict, status = f"unreadable: {error}", UNREADABLE
        if scripted:
            verdict, status = "suspicious: it holds TorchScript, a program, and not only weights", SUSPICIOUS
        elif report["refused"]:
            names = ", ".join(_short(name)[:60] for name in report["refused"][:3])
            verdict, status = f"suspicious: an ordinary reader of it would import {names}", SUSPICIOUS
        return {**report, "status": status, "verdict": verdict}, None, None
    try:
        known = guess(found)
    except weights.SeveralError as error:
        known, report["several"] = None, error.under
    report.update(
        tensors=[
            {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch."),
             "values": value.numel(), "nan": int(value.isnan().sum()) if value.dtype.is_floating_point else 0}
            for name, value in found.tensors.items()
        ],
        network=asdict(known) if known else None,
        normalisation=normalisation(found),
    )  # fmt: skip
    return {**report, **_verdict(report)}, found, known


def _outside(path: Path) -> Report:
    """What can be said without opening it."""
    empty: Report = {"sha256": None, "format": None, "imports": [], "refused": [], "tensors": [], "network": None}
    return {"path": str(path), "bytes": path.stat().st_size, **empty, "normalisation": None}


def _verdict(report: Report) -> Report:
    broken = sum(tensor["nan"] > 0 for tensor in report["tensors"])
    if report["refused"]:  # read without them, but another reader may come to them
        names = ", ".join(_short(name)[:60] for name in report["refused"][:3])
        return {"status": SUSPICIOUS, "verdict": f"suspicious: beside its weights it would import {names}"}
    if not report["tensors"]:
        return {"status": UNREADABLE, "verdict": "unreadable: there is no tensor in it"}
    network = report["network"]
    what = f"{network['name']} with {network['classes']} classes" if network else "of no network that is known here"
    if "several" in report:
        what = f"a known network more than once: under {report['several']}"
    nan = f"; {broken} of them hold NaN" if broken else ""
    return {"status": HARMLESS, "verdict": f"harmless to open: {len(report['tensors'])} tensors, {what}{nan}"}


def normalisation(found: weights.Weights) -> Report | None:
    """Mean and standard deviation, from tensors of these names or from a data set that the file names."""
    for place, mean in found.tensors.items():
        std = found.tensors.get(f"{place.removesuffix('mean')}std")
        if place.split(".")[-1] not in ("mean", "new_mean") or std is None or not mean.numel() == std.numel() in (1, 3):
            continue
        if all(values.dtype.is_floating_point and values.isfinite().all() for values in (mean, std)):
            return {"mean": mean.flatten().tolist(), "std": std.flatten().tolist(), "from": place}
    named = found.texts.get("clean_data")
    if named not in SOURCES:
        return None
    return {"mean": list(SOURCES[named].mean), "std": list(SOURCES[named].std), "from": f"clean_data, {named}"}


def _short(name: str) -> str:
    """A name from the file, for the screen: whatever it is, it moves no cursor and forges no line."""
    return ascii(name)[1:-1][:100]


def text(report: Report) -> str:
    """The report for people; the verdict is its last line."""
    network, norm = report["network"], report["normalisation"]
    imports = [_short(name) + (" (REFUSED)" if name in report["refused"] else "") for name in report["imports"]]
    lines = [f"{printable(report['path'])}: {report['bytes']:,} bytes"]
    lines.append(f"SHA-256   {report['sha256'] or 'not computed'}")
    lines.append(f"format    {report['format'] or 'not recognised'}")
    lines += [f"imports   {name}" for name in imports] or ["imports   nothing"]
    for tensor in report["tensors"]:
        nan = f"  {tensor['nan']} NaN" if tensor["nan"] else ""
        lines.append(f"tensor    {_short(tensor['name'])}  {tensor['shape']}  {tensor['dtype']}{nan}")
    total = sum(tensor["values"] for tensor in report["tensors"])
    lines.append(
        f"tensors   {len(report['tensors'])}, {total:,} values, {sum(t['nan'] for t in report['tensors'])} NaN"
    )
    width = f", width {network['width']}" if network and network["width"] else ""
    none = f"more than once, under {report['several']}" if "several" in report else "none of those known here"
    lines.append(
        f"network   {network['name']}{width}, {network['classes']} classes, names under '{_short(network['prefix'])}'"
        if network else f"network   {none}"
    )  # fmt: skip
    given = (
        f"mean {norm['mean']}, std {norm['std']}, by {_short(norm['from'])}"
        if norm
        else "not in the file; whoever made it knows"
    )
    lines.append(f"normalise {given}")
    return "\n".join([*lines, report["verdict"]])
