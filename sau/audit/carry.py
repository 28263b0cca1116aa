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
from sau.files import write
from sau.record.holding import give_back, hold
from sau.record.schema import plain

PIECES, RESULT = "pieces", "audit.json"


def carry_out(plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the pieces that are not in `out` yet, and `audit.json` from all of them, which is returned.

    The folder is this process's meanwhile (LockedError names who else has it). What was interrupted goes on where it
    was: each finished piece is a file.
    """
    hold(out)
    try:
        return _carried_out(plan, out, say)
    finally:
        give_back(out)


def _carried_out(plan: Plan, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    pieces, rows = plan.pieces(), []
    for note in plan.case.notes:
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
    found = {"record": case.name, "attack": attack, "networks": networks, "asked": plain(asked), "seconds": seconds}
    result = {**found, "notes": list(case.notes), "rows": rows}
    write(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    return result


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
    kept = {"identity": piece.identity, "rows": rows, "seconds": round(time.monotonic() - started, 2)}
    write(place, (json.dumps(kept, indent=1) + "\n").encode())
    return kept


def _kept(place: Path, piece: Piece, say: Callable[[str], None]) -> dict[str, Any] | None:
    """A finished piece; None if there is none, or none that can be read, which is said."""
    if not place.is_file():
        return None
    try:
        kept: dict[str, Any] = json.loads(place.read_text())
        if kept["identity"] == piece.identity and isinstance(kept["rows"], list):
            return {"rows": kept["rows"], "seconds": float(kept["seconds"])}
    except (OSError, ValueError, KeyError, TypeError):
        pass
    say(f"{place} is damaged; it is made again")
    return None


def _brief(kept: dict[str, Any]) -> str:
    """The last figure of a piece, and what it took."""
    last = kept["rows"][-1]
    figure = f"ASR {last['asr']:.1f} %" if "asr" in last else f"s {last['s']:.3f}"
    return f"{figure}  {kept['seconds']:.1f} s"
