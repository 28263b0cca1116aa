"""The summaries of many result folders in one file: a JSON object a line, sorted by folder.

`cell` is the folder, like badnet_r0.1_fbb5bbdd0a_s0/defense/sau_c0.05_0a4c2f6d1e; the rest is its `summary.json`
without the intervals, which follow from the counts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sau.errors import RecordError
from sau.evaluate import Proportion
from sau.files import is_number, parse_json, read, write

_COUNT, _INTERVAL = "_count", "_interval"


def load(file: Path) -> dict[str, dict[str, Any]]:
    """The summaries by folder; RecordError names the line that is not one."""
    summaries: dict[str, dict[str, Any]] = {}
    try:
        lines = read(file).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(lines, 1):
        try:
            content = parse_json(line)
            cell = content.pop("cell")
            if not isinstance(cell, str) or cell in summaries:
                raise ValueError(f"cell is {str(cell)[:80]!r}, allowed is the name of a folder, once")
            summaries[cell] = _with_intervals(content)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RecordError(f"{file}, line {number} is no summary ({error}); delete the line") from None
    return summaries


def save(file: Path, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the summaries of folders, replacing the file."""
    lines = [json.dumps({"cell": cell, **_without_intervals(summaries[cell])}) for cell in sorted(summaries)]
    write(file, "".join(f"{line}\n" for line in lines).encode())


def _without_intervals(part: Mapping[str, Any]) -> dict[str, Any]:
    kept = {}
    for name, value in part.items():
        if not name.endswith(_INTERVAL) or name.removesuffix(_INTERVAL) + _COUNT not in part:
            kept[name] = _without_intervals(value) if name in ("before", "after") else value
    return kept


def _with_intervals(part: dict[str, Any]) -> dict[str, Any]:
    whole = {}
    for name, value in part.items():
        whole[name] = _with_intervals(value) if name in ("before", "after") else value
        if name.endswith(_COUNT) and part.get(name.removesuffix(_COUNT)) is not None:
            whole[name.removesuffix(_COUNT) + _INTERVAL] = list(Proportion(*value).interval)
    return whole


def gate(summary: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """`gate` of a summary, `{"asr": least ASR in percent, "passed": bool}`, or None; RecordError for anything else."""
    found = summary.get("gate")
    if found is None:
        return None
    if isinstance(found, dict) and type(found.get("passed")) is bool:
        if is_number(least := found.get("asr")) and 0 <= least <= 100:
            return found
    raise RecordError(f"{folder}: gate is {str(found)[:60]!r}, allowed are asr, 0 to 100, and passed, true or false")
