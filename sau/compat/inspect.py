"""The report on an untrusted network file. Nothing in it is run."""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from sau.compat import torch_file, weights
from sau.compat.weights import guess, short_names
from sau.errors import RecordError, printable
from sau.files import write

HARMLESS, SUSPICIOUS, UNREADABLE = 0, 1, 2  # exit status of `sau inspect`
Report = dict[str, Any]


def inspect(path: Path, to: Path | None = None) -> Report:
    """Look into a `.pt`, `.pth`, `.ckpt` or `.safetensors` file.

    If the verdict is harmless, its tensors are written to the new file `to` as safetensors: those of the network under
    their own names if one was recognised, else all. RecordError if there is no file `path`, or there is one `to`.

    Returns:
        path, bytes, sha256, format, imports (names that its pickles import), tensors (name, shape, dtype, values,
        nan), network (see `Guess`, or None), classes (names, or None), status and verdict (one line).
    """
    if not path.is_file():
        raise RecordError(f"there is no file {path}")
    if to is not None and to.exists():
        raise RecordError(f"{to} exists; name a new file")
    report: Report = {"path": str(path), "bytes": path.stat().st_size, "sha256": None, "format": None, "imports": []}
    report |= {"tensors": [], "network": None, "classes": None}
    try:
        raw = torch_file.content(path)
        report |= {"sha256": hashlib.sha256(raw).hexdigest(), "format": weights.file_format(raw) or None}
        report["imports"] = [] if report["format"] == weights.SAFE else torch_file.imports(raw)
        found = weights.read(path, raw)
        _describe(report, found)
        inside = found.below(report["network"]["prefix"] if report["network"] else "")
        packed = b"" if to is None else _packed(inside)
    except torch_file.ProgramError as error:
        return {**report, "status": SUSPICIOUS, "verdict": f"suspicious: {error}"}
    except RecordError as error:
        return {**report, "status": UNREADABLE, "verdict": f"unreadable: {error}"}
    if to is not None:
        write(to, packed)
    return report


def _describe(report: Report, found: weights.Weights) -> None:
    """Add the tensors, the network, the class names and the verdict; RecordError if there is no tensor."""
    if not found.tensors:
        raise RecordError("there is no tensor in it")
    what = "of no network that is known here"
    try:
        if known := guess(found):
            report["network"], what = known._asdict(), f"{known.name} with {known.classes} classes"
    except RecordError as error:  # it holds one several times
        what = str(error)
    for name, value in found.tensors.items():
        nan = int(value.isnan().sum()) if value.is_floating_point() else 0
        about = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        report["tensors"].append({**about, "values": value.numel(), "nan": nan})
    verdict = f"harmless to open: {len(found.tensors)} tensors, {what}"
    if broken := sum(tensor["nan"] > 0 for tensor in report["tensors"]):
        verdict += f"; {broken} of them hold NaN"
    report |= {"classes": found.classes, "status": HARMLESS, "verdict": verdict}


def _packed(tensors: dict[str, Tensor]) -> bytes:
    """Tensors as safetensors; RecordError if safetensors cannot hold them."""
    try:
        return safetensors.torch.save({name: value.contiguous().clone() for name, value in tensors.items()})
    except Exception as error:  # of a type or name that it lacks
        raise RecordError(f"safetensors cannot hold it ({printable(str(error))[:100]})") from None


def _nans(count: int, before: str) -> str:
    return f"{before}{count:,} NaN" if count else ""


def text(report: Report) -> str:
    """The report for people; the verdict is its last line."""
    network, which = report["network"], "none of those known here"
    if network:
        width = f", width {network['width']}" if network["width"] else ""
        under = f", names under {network['prefix']}" if network["prefix"] else ""
        which = f"{network['name']}{width}, {network['classes']} classes{under}"
    total, nans = (sum(tensor[key] for tensor in report["tensors"]) for key in ("values", "nan"))
    lines = [
        f"{report['path']}: {report['bytes']:,} bytes",
        f"SHA-256   {report['sha256'] or 'not computed'}",
        f"format    {report['format'] or 'not recognised'}",
        *(f"imports   {name[:100]}" for name in report["imports"] or ["nothing"]),
        *(f"tensor    {t['name'][:100]}  {t['shape']}  {t['dtype']}{_nans(t['nan'], '  ')}" for t in report["tensors"]),
        f"tensors   {len(report['tensors'])}, {total:,} values{_nans(nans, ', ')}",
        f"network   {which}",
        f"classes   {short_names(report['classes']) if report['classes'] else 'not named in the file'}",
        report["verdict"],
    ]
    return "\n".join(map(printable, lines))
