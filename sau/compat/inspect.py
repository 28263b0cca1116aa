"""The report on an untrusted network file. Nothing in it is run."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sau.compat import torch_file, weights
from sau.compat.weights import guess, short_names
from sau.data.sources import SOURCES
from sau.errors import RecordError, printable
from sau.files import write

HARMLESS, SUSPICIOUS, UNREADABLE = 0, 1, 2  # exit status of `sau inspect`
Report = dict[str, Any]


def inspect(path: Path, to: Path | None = None) -> Report:
    """Look into a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.onnx` file.

    Args:
        path: the file.
        to: a new file for its tensors as safetensors, written if the verdict is harmless: those of the network under
            their own names if one was recognised, else all.

    Returns:
        path, bytes, sha256, format, imports (names that its pickles import), tensors (name, shape, dtype, values,
        nan), network (see `Guess`, or None), several (prefixes, if it holds a network more than once), classes (names,
        or None), input_size, normalisation (mean, std and where from, or None), status and verdict (one line).

    Raises:
        RecordError: there is no such file; `to` exists or cannot be written.
    """
    if not path.is_file():
        raise RecordError(f"there is no file {path}")
    if to is not None and to.exists():
        raise RecordError(f"{to} exists; name a new file")
    report: Report = {"path": str(path), "bytes": path.stat().st_size, "sha256": None, "format": None, "imports": []}
    report |= {"tensors": [], "network": None, "classes": None, "input_size": None, "normalisation": None}
    try:
        raw = torch_file.content(path)
        report |= {"sha256": hashlib.sha256(raw).hexdigest(), "format": weights.file_format(path, raw) or None}
        report["imports"] = [] if report["format"] in (weights.SAFE, weights.ONNX) else torch_file.imports(raw)
        found = weights.read(path, raw)
        _describe(report, found)
    except torch_file.ProgramError as error:
        return {**report, "status": SUSPICIOUS, "verdict": f"suspicious: {error}"}
    except RecordError as error:
        return {**report, "status": UNREADABLE, "verdict": f"unreadable: {error}"}
    if to is not None:
        try:
            packed = found.packed(report["network"]["prefix"] if report["network"] else "")
        except RecordError as error:
            verdict = f"harmless to open, but not to be converted: {error}"
            return {**report, "status": UNREADABLE, "verdict": verdict}
        write(to, packed)
    return report


def _describe(report: Report, found: weights.Weights) -> None:
    """Add the tensors, the network, the facts and the verdict; RecordError if there is no tensor."""
    if not found.tensors:
        raise RecordError("there is no tensor in it")
    what = "of no network that is known here"
    try:
        if known := guess(found):
            report["network"], what = asdict(known), f"{known.name} with {known.classes} classes"
    except weights.SeveralError as error:
        report["several"], what = error.under, f"a known network more than once: under {error.under}"
    report["tensors"] = [_entry(*item) for item in found.tensors.items()]
    report |= {"classes": found.classes, "input_size": found.input_size, "normalisation": normalisation(found)}
    broken = sum(tensor["nan"] > 0 for tensor in report["tensors"])
    nan = f"; {broken} of them hold NaN" if broken else ""
    verdict = f"harmless to open: {len(found.tensors)} tensors, {what}{nan}"
    report |= {"status": HARMLESS, "verdict": verdict}


def _entry(name: str, value: Tensor) -> Report:
    about = {"name": name, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return {**about, "values": value.numel(), "nan": int(value.isnan().sum()) if value.is_floating_point() else 0}


def normalisation(found: weights.Weights) -> Report | None:
    """Mean and standard deviation of 1 or 3 channels, from values of these names or a data set that the file names."""
    held = {**found.facts, **found.tensors}
    for place, given in held.items():
        if place.split(".")[-1] in ("mean", "new_mean"):
            mean, std = _numbers(given), _numbers(held.get(f"{place.removesuffix('mean')}std"))
            if mean and std and len(mean) == len(std):
                return {"mean": mean, "std": std, "from": place}
    named = next((value for place, value in found.facts.items() if place.split(".")[-1] == "clean_data"), None)
    if not isinstance(named, str) or named not in SOURCES:
        return None
    return {"mean": list(SOURCES[named].mean), "std": list(SOURCES[named].std), "from": f"clean_data, {named}"}


def _numbers(value: Any) -> list[float] | None:
    """One or three finite numbers, else None."""
    if isinstance(value, Tensor):
        value = value.flatten().tolist() if value.numel() in (1, 3) else None
    plain = isinstance(value, list | tuple) and all(type(x) in (int, float) and abs(x) < 1e6 for x in value)
    return [float(x) for x in value] if plain and len(value) in (1, 3) else None


def text(report: Report) -> str:
    """The report for people; the verdict is its last line."""
    network, norm, unknown = report["network"], report["normalisation"], "not in the file; whoever made it knows"
    which = f"more than once, under {report['several']}" if "several" in report else "none of those known here"
    if network:
        width = f", width {network['width']}" if network["width"] else ""
        which = f"{network['name']}{width}, {network['classes']} classes, names under '{network['prefix']}'"
    given = f"mean {norm['mean']}, std {norm['std']}, by {norm['from']}" if norm else unknown
    total, nans = (sum(tensor[key] for tensor in report["tensors"]) for key in ("values", "nan"))
    lines = [
        f"{report['path']}: {report['bytes']:,} bytes",
        f"SHA-256   {report['sha256'] or 'not computed'}",
        f"format    {report['format'] or 'not recognised'}",
        *(f"imports   {name[:100]}" for name in report["imports"] or ["nothing"]),
        *(f"tensor    {t['name'][:100]}  {t['shape']}  {t['dtype']}  {t['nan']} NaN" for t in report["tensors"]),
        f"tensors   {len(report['tensors'])}, {total:,} values, {nans} NaN",
        f"network   {which}",
        f"classes   {short_names(report['classes']) if report['classes'] else 'not named in the file'}",
        f"size      {report['input_size'] or unknown}",
        f"normalise {given}",
        report["verdict"],
    ]
    return "\n".join(map(printable, lines))
