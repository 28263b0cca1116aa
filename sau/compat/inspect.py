"""What is in a network file that somebody else made. Nothing in the file is run, and no object is made of it but
tensors, plain values and the stand-ins of `torch_file`."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from sau.compat import torch_file, weights
from sau.compat.guess import Guess, guess
from sau.data.sources import SOURCES
from sau.errors import RecordError, one_line, printable
from sau.files import write

HARMLESS, SUSPICIOUS, UNREADABLE = 0, 1, 2  # exit status of `scripts/inspect_checkpoint.py`
Report = dict[str, Any]


def inspect(path: Path, to: Path | None = None) -> Report:
    """Look into a `.pt`, `.pth`, `.ckpt`, `.safetensors` or `.onnx` file.

    Args:
        path: the file.
        to: where to write its tensors as safetensors: those of the network under their own names if one was
            recognised, otherwise all of them; not written unless the verdict is harmless.

    Returns a dictionary that JSON can hold: path, bytes, sha256, format, imports (names that the file's pickles
    import), tensors (name, shape, dtype, values, nan), network (see `Guess`, or None), several (under what, where it
    holds a known network more than once), classes (names, or None), input_size, normalisation (mean, std and where
    from, or None), status and verdict (one line).
    Raises RecordError if there is no such file and if `to` exists or cannot be written.
    """
    if not path.is_file():
        raise RecordError(f"there is no file {path}")
    if to is not None and to.exists():
        raise RecordError(f"{to} exists; name a new file")
    report, found, known = look(path)
    if to is not None and found is not None and report["status"] == HARMLESS:
        try:
            content = found.packed(known.prefix if known else "")
        except RecordError as error:
            verdict = f"harmless to open, but not to be converted: {error}"
            return {**report, "status": UNREADABLE, "verdict": verdict}
        write(to, content)
    return report


def look(path: Path) -> tuple[Report, weights.Weights | None, Guess | None]:
    """The report of `inspect`; what could be read, and the network that it is."""
    report: Report = {"path": str(path), "bytes": path.stat().st_size, "sha256": None, "format": None, "imports": []}
    report |= {"tensors": [], "network": None, "classes": None, "input_size": None, "normalisation": None}
    try:
        raw = torch_file.content(path)
        report |= {"sha256": hashlib.sha256(raw).hexdigest(), "format": weights.file_format(path, raw) or None}
        report["imports"] = [] if report["format"] in (weights.SAFE, weights.ONNX) else torch_file.imports(raw)
        found = weights.read(path, raw)
    except torch_file.ProgramError as error:
        return {**report, "status": SUSPICIOUS, "verdict": f"suspicious: {error}"}, None, None
    except RecordError as error:
        return {**report, "status": UNREADABLE, "verdict": f"unreadable: {error}"}, None, None
    try:
        known = guess(found)
    except weights.SeveralError as error:
        known, report["several"] = None, error.under
    report |= {"classes": found.classes, "input_size": found.input_size, "normalisation": normalisation(found)}
    report |= {"tensors": [_described(*item) for item in found.tensors.items()]}
    report["network"] = asdict(known) if known else None
    return {**report, **_verdict(report)}, found, known


def _described(name: str, value: Tensor) -> Report:
    nan = int(value.isnan().sum()) if value.dtype.is_floating_point else 0
    dtype = str(value.dtype).removeprefix("torch.")
    return {"name": name, "shape": list(value.shape), "dtype": dtype, "values": value.numel(), "nan": nan}


def _verdict(report: Report) -> Report:
    if not report["tensors"]:
        return {"status": UNREADABLE, "verdict": "unreadable: there is no tensor in it"}
    network, broken = report["network"], sum(tensor["nan"] > 0 for tensor in report["tensors"])
    what = f"{network['name']} with {network['classes']} classes" if network else "of no network that is known here"
    if "several" in report:
        what = f"a known network more than once: under {report['several']}"
    nan = f"; {broken} of them hold NaN" if broken else ""
    return {"status": HARMLESS, "verdict": f"harmless to open: {len(report['tensors'])} tensors, {what}{nan}"}


def normalisation(found: weights.Weights) -> Report | None:
    """Mean and standard deviation of 1 or 3 channels, from tensors or lists of these names, or from a data set that
    the file names."""
    held = {**found.facts, **found.tensors}
    for place, given in held.items():
        if place.split(".")[-1] not in ("mean", "new_mean"):
            continue
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


def _short(name: str) -> str:
    """A name from the file, for the screen: whatever it is, it moves no cursor and forges no line."""
    return ascii(name)[1:-1][:100]


def mapping(names: list[str]) -> str:
    """`0 = airplane, 1 = automobile, 2 = bird, ..., 9 = truck`, on one printable line."""
    pairs = [f"{number} = {name[:40]}" for number, name in enumerate(names)]
    return one_line(", ".join(pairs if len(pairs) <= 5 else [*pairs[:3], "...", pairs[-1]]))


def text(report: Report) -> str:
    """The report for people; the verdict is its last line."""
    network, norm = report["network"], report["normalisation"]
    lines = [f"{printable(report['path'])}: {report['bytes']:,} bytes"]
    lines.append(f"SHA-256   {report['sha256'] or 'not computed'}")
    lines.append(f"format    {report['format'] or 'not recognised'}")
    lines += [f"imports   {_short(name)}" for name in report["imports"]] or ["imports   nothing"]
    for tensor in report["tensors"]:
        nan = f"  {tensor['nan']} NaN" if tensor["nan"] else ""
        lines.append(f"tensor    {_short(tensor['name'])}  {tensor['shape']}  {tensor['dtype']}{nan}")
    total, nans = (sum(tensor[key] for tensor in report["tensors"]) for key in ("values", "nan"))
    lines.append(f"tensors   {len(report['tensors'])}, {total:,} values, {nans} NaN")
    which = f"more than once, under {report['several']}" if "several" in report else "none of those known here"
    if network:
        width = f", width {network['width']}" if network["width"] else ""
        which = f"{network['name']}{width}, {network['classes']} classes, names under '{_short(network['prefix'])}'"
    lines.append(f"network   {which}")
    lines.append(f"classes   {mapping(report['classes']) if report['classes'] else 'not named in the file'}")
    lines.append(f"size      {report['input_size'] or 'not in the file; whoever made it knows'}")
    given = "not in the file; whoever made it knows"
    if norm:
        given = f"mean {norm['mean']}, std {norm['std']}, by {_short(norm['from'])}"
    lines.append(f"normalise {given}")
    return "\n".join([*lines, report["verdict"]])
