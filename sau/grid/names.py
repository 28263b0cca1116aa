"""Names of cells, without all that a plan needs."""

import re

_FOLDER = re.compile(r"(?P<label>.+)_(?P<mark>[0-9a-f]{10})(?P<seed>_s\d+)?")


def without_digest(folder: str) -> str:
    """The name of a cell's folder without its digest, like badnet_r0.1_s0; other names stay as they are."""
    found = _FOLDER.fullmatch(folder)
    return found["label"] + (found["seed"] or "") if found else folder


def mark(folder: str) -> str:
    """The digits of the digest in the name of a cell's folder; empty for other names."""
    found = _FOLDER.fullmatch(folder)
    return found["mark"] if found else ""
