"""The summaries of many result folders in one file: a JSON object a line, sorted by folder.

`cell` is the folder, like badnet_r0.1_fbb5bbdd0a_s0/defense/sau_c0.05_0a4c2f6d1e; the rest is its `summary.json`
without the intervals of its scores, which follow from the counts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sau.errors import RecordError
from sau.files import is_number, parse_json, read, write


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
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise RecordError(f"{file}, line {number} is no summary ({error}); delete the line") from None
        summaries[cell] = content
    return summaries


def save(file: Path, summaries: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the summaries of folders, replacing the file."""
    lines = [json.dumps({"cell": cell, **_short(summaries[cell])}) for cell in sorted(summaries)]
    write(file, "".join(f"{line}\n" for line in lines).encode())


def _short(scores: Mapping[str, Any]) -> dict[str, Any]:
    """Without the intervals of these scores, or of those before and after a defense."""
    kept = {name: value for name, value in scores.items() if not name.endswith("_interval")}
    return kept | {part: _short(kept[part]) for part in ("before", "after") if part in kept}


def gate(summary: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """`gate` of a summary, `{"asr": least ASR in percent, "passed": bool}`, or None; RecordError for anything else."""
    found = summary.get("gate")
    if found is None:
        return None
    if isinstance(found, dict) and type(found.get("passed")) is bool:
        if is_number(least := found.get("asr")) and 0 <= least <= 100:
            return found
    raise RecordError(f"{folder}: gate is {str(found)[:60]!r}, allowed are asr, 0 to 100, and passed, true or false")
