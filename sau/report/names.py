"""What the names of folders say, where nothing else does: of results that are kept as summaries alone."""

import re
from typing import Any

from sau.grid.names import without_digest


def attack_named(folder: str) -> tuple[str, int | None, dict[str, Any] | None]:
    """Attack, seed and settings as `<attack>_s<seed>`, or a grid's `<attack>_r<ratio>_<digest>_s<seed>`, say them."""
    parts = re.fullmatch(r"(.+?)(?:_r([\d.]{1,9}))?_s(\d{1,10})", without_digest(folder))
    if parts is None:
        return folder, None, None
    return parts[1], int(parts[3]), {"pratio": float(parts[2])} if _decimal(parts[2]) else None


def defense_named(folder: str) -> tuple[str, dict[str, Any] | None]:
    """Defense and settings as its folder says them, in a grid `<defense>_c<share>_<digest>`.

    Where test data chose, `_oracle` stands before the digest.
    """
    parts = re.fullmatch(r"(.+?)_c([\d.]{1,9})(_oracle)?", without_digest(folder))
    if parts is None or not _decimal(parts[2]):
        return without_digest(folder), None
    return parts[1], {"ratio": float(parts[2]), "select": "oracle" if parts[3] else "defender"}


def _decimal(text: str | None) -> bool:
    return text is not None and re.fullmatch(r"\d+(\.\d+)?", text) is not None
