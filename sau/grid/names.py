"""What the names of folders say: of cells, and of results that are kept as summaries alone."""

import re
from typing import Any

_FOLDER = re.compile(r"(?P<label>.+)_(?P<mark>[0-9a-f]{10})(?P<seed>_s\d+)?")


def without_digest(folder: str) -> str:
    """The name of a cell's folder without its digest, like badnet_r0.1_s0; other names stay as they are."""
    found = _FOLDER.fullmatch(folder)
    return found["label"] + (found["seed"] or "") if found else folder


def mark(folder: str) -> str:
    """The digits of the digest in the name of a cell's folder; empty for other names."""
    found = _FOLDER.fullmatch(folder)
    return found["mark"] if found else ""


def attack_named(folder: str) -> tuple[str, int | None, dict[str, Any] | None]:
    """Attack, seed and settings as `<attack>_s<seed>`, or a grid's `<attack>_r<ratio>_<digest>_s<seed>`, say them."""
    parts = re.fullmatch(r"(.+?)(?:_r([\de.-]{1,11}))?_s(\d{1,10})", without_digest(folder))
    if parts is None:
        return folder, None, None
    return parts[1], int(parts[3]), {"pratio": float(parts[2])} if _decimal(parts[2]) else None


def defense_named(folder: str) -> tuple[str, dict[str, Any] | None]:
    """Defense and settings as its folder says them, in a grid `<defense>_c<share>_<digest>`.

    Where test data chose, `_oracle` stands before the digest.
    """
    parts = re.fullmatch(r"(.+?)_c([\de.-]{1,11})(_oracle)?", without_digest(folder))
    if parts is None or not _decimal(parts[2]):
        return without_digest(folder), None
    return parts[1], {"ratio": float(parts[2]), "select": "oracle" if parts[3] else "defender"}


def _decimal(text: str | None) -> bool:
    return text is not None and re.fullmatch(r"\d+(\.\d+)?(e-\d+)?", text) is not None
