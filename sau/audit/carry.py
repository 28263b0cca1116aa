"""The pieces of an audit are kept as they are finished, and put together in the end."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sau.audit.case import CONTROL, NONE
from sau.audit.coefficient import existence, stretched
from sau.audit.measure import Row
from sau.audit.plan import Piece, Plan
from sau.files import parse_json, read_json, write
from sau.files import read as read_bytes
from sau.record.lock import acquire, release
from sau.record.schema import as_json, digest

SEAL = "seal"  # key of the digest of everything else in a file
PIECES, RESULT = "pieces", "audit.json"


def carry_out(plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the pieces that are not in `out` yet, and `audit.json` from all of them, which is returned.

    The folder is this process's meanwhile (LockedError if another process uses it). What was interrupted goes on where
    it was: each finished piece is a file.
    """
    acquire(out)
    try:
        return _carried_out(plan, out, say)
    finally:
        release(out)


def _carried_out(plan: Plan, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    pieces, rows = plan.pieces(), []
    for note in plan.notes:
        say(f"note: {note}")
    seconds: dict[str, float] = {}
    for number, piece in enumerate(pieces, 1):
        kept = _kept(out / PIECES / piece.file, piece, say)
        again = kept is not None
        if kept is None:
            kept = _made(out / PIECES / piece.file, piece)
        rows += kept["rows"]
        seconds[piece.part] = round(seconds.get(piece.part, 0.0) + kept["seconds"], 2)
        say(f"{number}/{len(pieces)}  {piece.part}: {piece.about}  {'as before' if again else _brief(kept)}")
    _scale(rows)
    case = plan.case
    networks = {name: network.digest for name, network in case.networks.items()}
    asked = {**asdict(plan.asked), "samples": [len(case.test), len(case.triggered)]}
    attack = case.attack.name if case.attack is not None else None
    found = {"record": case.name, "attack": attack, "networks": networks, "asked": as_json(asked), "seconds": seconds}
    return _keep(out / RESULT, {**found, "about": as_json(plan.about), "notes": plan.notes, "rows": rows})


def _keep(place: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write with a seal, by which damage is noticed; returns the content."""
    write(place, (json.dumps({**content, SEAL: digest(content)}, indent=1) + "\n").encode())
    return content


def read(place: Path) -> dict[str, Any]:
    """What a file of an audit holds; ValueError if it is no such file or damaged, OSError if it cannot be read."""
    return _unsealed(read_json(place))


def read_line(file: Path, name: str) -> dict[str, Any]:
    """The audit that a line of a file holds, a JSON object whose `name` is this; ValueError if no line does."""
    for line in read_bytes(file).decode().splitlines():
        content = parse_json(line)
        if isinstance(content, dict) and content.pop("name", None) == name:
            return _unsealed(content)
    raise ValueError(f"no line has the name {name}")


def _unsealed(content: dict[str, Any]) -> dict[str, Any]:
    if content.pop(SEAL, None) != digest(content):
        raise ValueError("it is damaged, or another kind of file")
    return content


def _scale(rows: list[Row]) -> None:
    """Add BEC to the rows that have similarities, which means something only among all of them."""
    alike = {row["network"]: row["s"] for row in rows if row["part"] == "bec"}
    if alike:
        natural, released = existence(alike, CONTROL), stretched(alike, NONE)
        for row in (row for row in rows if row["part"] == "bec"):
            row |= {"bec": natural[row["network"]], "stretched": released[row["network"]]}


def _made(place: Path, piece: Piece) -> dict[str, Any]:
    started = time.monotonic()
    rows = piece.work()
    seconds = round(time.monotonic() - started, 2)
    return _keep(place, {"identity": piece.identity, "rows": rows, "seconds": seconds})


def _kept(place: Path, piece: Piece, say: Callable[[str], None]) -> dict[str, Any] | None:
    """A finished piece; None if there is none, or none that can be read, which is said."""
    if not place.is_file():
        return None
    try:
        kept = read(place)
        if kept["identity"] == piece.identity:
            return kept
    except (OSError, ValueError, KeyError):
        pass
    say(f"{place} is damaged; it is made again")
    return None


def _brief(kept: dict[str, Any]) -> str:
    """The last figure of a piece, and what it took."""
    last = kept["rows"][-1]
    figure = f"ASR {last['asr']:.1f} %" if "asr" in last else f"s {last['s']:.3f}"
    return f"{figure}  {kept['seconds']:.1f} s"
