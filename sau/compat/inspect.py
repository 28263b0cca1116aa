"""The report on an untrusted network file. Nothing in it is run."""

import hashlib
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from sau.compat import pretrained, torch_file, weights
from sau.compat.weights import Guess, Weights, guess, short_names
from sau.errors import ConfigError, RecordError, printable
from sau.files import write
from sau.record.folder import on_cpu

HARMLESS, SUSPICIOUS, UNREADABLE = 0, 1, 2  # exit status of `sau inspect`
Report = dict[str, Any]


def inspect(path: Path, to: Path | None = None) -> Report:
    """Look into a `.pt`, `.pth`, `.ckpt` or `.safetensors` file, a folder of ours or one that `pretrained` opens.

    If the verdict is harmless, its tensors are written to the new file `to` as safetensors: those of the network under
    their own names if one was recognised, else all. OSError if there is no file `path`, RecordError if a folder has no
    weights, or if `to` exists, cannot be written, or would have to hold complex numbers.

    Returns:
        path, bytes, sha256, format, tensors (name, shape, dtype, values, nan), network (see `Guess`, or None), classes
        (names, or None), images (how a folder wants them, or None), status and verdict (one line).
    """
    holds = any((path / name).is_file() for name in (pretrained.CONFIG, pretrained.CLIP_CONFIG))
    folder, path = path if holds else None, pretrained.weights_file(path) if path.is_dir() else path
    if to is not None and to.exists():
        raise RecordError(f"{to} exists; name a new file")
    report: Report = {"path": str(path), "bytes": path.stat().st_size, "sha256": None, "format": None}
    report |= {"tensors": [], "network": None, "classes": None, "images": None, "status": UNREADABLE}
    try:
        raw = torch_file.content(path)
        report |= {"sha256": hashlib.sha256(raw).hexdigest(), "format": weights.file_format(raw) or None}
        found = weights.read(path, raw)
        report |= _described(found, folder)
    except torch_file.ProgramError as error:
        return {**report, "status": SUSPICIOUS, "verdict": f"suspicious: {error}"}
    except (RecordError, ConfigError, OSError) as error:
        return {**report, "verdict": f"unreadable: {error}"}
    if to is not None:
        tensors = on_cpu(found.below(report["network"]["prefix"] if report["network"] else ""))
        try:
            content = safetensors.torch.save(tensors)
        except Exception as error:  # of a type or name that it lacks
            raise RecordError(f"safetensors cannot hold it ({printable(str(error))[:100]})") from None
        write(to, content)
    return {**report, "status": HARMLESS}


def _described(found: Weights, folder: Path | None) -> Report:
    """The tensors, the network, the class names, the images and the verdict; RecordError if there is no tensor."""
    if not found.tensors:
        raise RecordError("there is no tensor in it")
    known, what, images = None, "of no network that is known here", None
    try:
        if folder is None:
            known = guess(found)
        else:
            opened = pretrained.open_folder(folder)
            found, images, size = opened.found, opened.view.text, opened.said["input_size"]
            with torch.no_grad():
                classes = opened.net(torch.zeros(1, 3, size, size)).shape[1]
            known = Guess(opened.said["arch"], None, classes, "")
        what = f"{known.name} with {known.classes} classes" if known else what
    except RecordError as error:  # it holds one several times
        what = str(error)
    tensors = list[Report]()
    for name, value in found.tensors.items():
        about = {"name": name, "shape": [*value.shape], "dtype": str(value.dtype).removeprefix("torch.")}
        tensors.append({**about, "values": value.numel(), "nan": int(value.isnan().sum())})
    verdict = f"harmless to open: {len(tensors)} tensors, {what}"
    if broken := sum(tensor["nan"] > 0 for tensor in tensors):
        verdict += f"; {broken} of them hold NaN"
    facts: Report = {"tensors": tensors, "network": known and known._asdict(), "images": images}
    return {**facts, "classes": found.classes, "verdict": verdict}


def text(report: Report) -> str:
    """The report for people; the verdict is its last line."""
    network, which = report["network"], "none of those known here"
    if network:
        width = f", width {network['width']}" if network["width"] else ""
        under = f", names under {network['prefix']}" if network["prefix"] else ""
        which = f"{network['name']}{width}, {network['classes']} classes{under}"
    lines = [
        f"{report['path']}: {report['bytes']:,} bytes",
        f"SHA-256   {report['sha256'] or 'not computed'}",
        f"format    {report['format'] or 'not recognised'}",
        *(f"tensor    {t['name'][:100]}  {t['shape']}  {t['dtype']}  {t['nan']} NaN" for t in report["tensors"]),
        f"tensors   {len(report['tensors'])}, {sum(tensor['values'] for tensor in report['tensors']):,} values",
        f"network   {which}",
        f"classes   {short_names(report['classes']) if report['classes'] else 'not named in the file'}",
        *([f"images    {report['images']}"] if report["images"] else []),
        report["verdict"],
    ]
    return "\n".join(map(printable, lines))
