"""Names of cells, without all that a plan needs."""

import re

_FOLDER = re.compile(r"(?P<label>.+)_[0-9a-f]{10}(?P<seed>_s\d+)?")


def plain(folder: str) -> str:
    """The name of a cell's folder without its digest, like badnet_r0.1_s0; other names stay as they are."""
    found = _FOLDER.fullmatch(folder)
    return found["label"] + (found["seed"] or "") if found else folder
