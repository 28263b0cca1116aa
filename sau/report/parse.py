"""The small files of a result folder, which a stranger may have written: each value is looked at before it counts."""

from pathlib import Path
from typing import Any, TypeGuard

from sau.errors import RecordError
from sau.files import MOST, is_number, parse_json, read, read_json
from sau.record.folder import SUMMARY

PERCENT = ("acc", "asr", "racc", "der")
COST = ("seconds", "peak_memory_mb")


def figures(summary: dict[str, Any], defense: bool) -> dict[str, float | None]:
    """The figures of a summary; RecordError if it lacks one that it has to have or one is no such number."""
    scores = summary.get("after") if defense else summary
    before = summary.get("before") if defense else {}
    if not isinstance(scores, dict) or not isinstance(before, dict) or (defense and "acc" not in before):
        raise RecordError(f"{SUMMARY} lacks the scores before or after; run the defense again")
    found = {"acc": scores.get("acc"), "asr": scores.get("asr"), "racc": scores.get("racc"), "der": summary.get("der")}
    found |= {name: summary.get(name) for name in COST}
    found |= {f"before_{name}": before.get(name) for name in ("acc", "asr", "racc")}
    for name, value in found.items():
        most = MOST if name in COST else 100
        if value is not None and not within(value, most):
            raise RecordError(f"{SUMMARY}: {name} is {str(value)[:40]!r}, allowed is a number from 0 to {most}")
    if found["acc"] is None:
        raise RecordError(f"{SUMMARY} has no acc; make the folder again")
    return {name: None if value is None else float(value) for name, value in found.items()}


def within(value: Any, most: int) -> TypeGuard[float]:
    """Whether it is a number from 0 to `most`."""
    return is_number(value) and 0 <= value <= most


def clean_set(config: dict[str, Any]) -> dict[str, Any]:
    """Which clean pictures a defense was given, as a setting: a share, or the file that lists them, which beats it."""
    run = mapping(config.get("run"))
    return {"ratio": run.get("ratio")} if run.get("index") is None else {"index": str(run["index"])}


def json_object(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds; RecordError if it is missing or holds something else."""
    try:
        return read_json(file)
    except FileNotFoundError:
        raise RecordError(f"{file.name} is missing; make the folder again") from None
    except ValueError as error:
        raise RecordError(f"{file.name} is no JSON object ({str(error)[:80]}); make the folder again") from None


def rows(file: Path) -> list[dict[str, float]]:
    """Rows of figures up to the first line that is none: a run that was killed may leave half a line."""
    rows = []
    try:
        for line in read(file).decode().splitlines():
            figures = {str(key): float(value) for key, value in parse_json(line).items() if is_number(value)}
            if "epoch" not in figures:
                break
            rows.append(figures)
    except (OSError, ValueError, AttributeError):
        return rows
    return rows


def last_stage(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Of a method with several stages the rows of its last one, which trains the result."""
    stage = max((row.get("stage", 0.0) for row in rows), default=0.0)
    return [row for row in rows if row.get("stage", 0.0) == stage]


def mapping(value: Any) -> dict[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> list[Any]:
    """`value` if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def whole(value: Any) -> TypeGuard[int]:
    """Whether it is an int."""
    return isinstance(value, int) and not isinstance(value, bool)
