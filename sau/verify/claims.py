"""What a record says about itself, each claim checked: one line that it holds, or a RecordError that says how not."""

import platform
from math import isclose
from typing import Any

import torch

import sau
from sau.errors import RecordError
from sau.evaluate import Score, Share
from sau.evaluate import der as rating_of
from sau.record.folder import MANIFEST, Record
from sau.record.schema import EARLY, digest

SLACK = 0.001  # share of the pictures that may be answered otherwise here: other processors round otherwise
ROUNDED = 5e-4  # relative: by how much a last digit may differ, where others round otherwise
APART = 0.01  # the same between a card and a CPU, which leaves the figure open; it is an assumption


class Otherwise(RecordError):
    """Another figure is measured here than the record has; `near` is whether another kind of device may explain it."""

    def __init__(self, text: str, near: bool) -> None:
        super().__init__(text)
        self.near = near


def files(record: Record) -> str:
    """Every file is as the manifest says; names those that it does not vouch for."""
    record.check()
    extra = sorted(
        file.name for file in record.path.iterdir() if file.is_file() and file.name not in (*record.sealed, MANIFEST)
    )
    more = f"; outside the manifest: {ascii(', '.join(extra))[1:-1][:200]}" if extra else ""
    return f"{len(record.sealed)} files as {MANIFEST} has them{more}"


def settings(config: dict[str, Any]) -> str:
    """What determines the result is what the settings say, and its digest is right."""
    if digest(config["identity"]) != config["digest"]:
        raise RecordError("config.yaml: the digest is not that of the identity")
    parts = {**config["method"], **config["data"], **config["model"]}
    other = [name for name, value in config["identity"].items() if name in parts and parts[name] != value]
    if other:
        raise RecordError(f"config.yaml: {', '.join(other)} are others in the identity than in the settings")
    return f"digest {config['digest'][:12]} is theirs"


def versions(config: dict[str, Any]) -> str:
    """The versions that made the record beside those here; a difference is no fault."""
    here = {"sau": sau.__version__, "torch": torch.__version__, "python": platform.python_version()}
    there = config["versions"]
    other = [f"{name} {there.get(name)} there, {here[name]} here" for name in here if there.get(name) != here[name]]
    return "; ".join(other) or "the same here: " + ", ".join(f"{name} {version}" for name, version in here.items())


def counted(said: dict[str, Any], name: str) -> Share:
    """The counts of a figure; RecordError if they are none."""
    found = said[f"{name}_count"]
    pair = isinstance(found, list) and len(found) == 2 and all(type(number) is int for number in found)
    if not pair or not 0 <= found[0] <= found[1] or found[1] < 1:
        raise RecordError(f"{name}_count is {str(found)[:60]}, allowed are hits and pictures, like [90, 100]")
    return Share(*found)


def equal(said: dict[str, Any], name: str, share: Share) -> str:
    """A figure of the summary is that of its counts, and those are the ones measured here."""
    there = counted(said, name)
    hits, total = there.hits, there.total
    if (there.percent, list(there.interval)) != (said[name], said[f"{name}_interval"]):
        raise RecordError(
            f"{said[name]} % and {said[f'{name}_interval']} are not those of its counts {hits} of {total}"
        )
    apart = abs(hits - share.hits)
    if total != share.total or apart > max(1, SLACK * total):
        raise Otherwise(
            f"{there.percent} % there ({hits} of {total}), {share.percent} % here ({share.hits} of {share.total})",
            near=total == share.total and apart <= APART * total,
        )
    return f"{share.percent} %" + (f", {apart} of {total} pictures answered otherwise here" if apart else ", equal")


def early(config: dict[str, Any], said: dict[str, Any]) -> str:
    """Where the run was ended before its end is what its identity says."""
    ended, there = config["identity"].get(EARLY), said.get(EARLY)
    if ended != there:
        raise RecordError(f"{EARLY} is {there!r} in the summary, {ended!r} in the identity")
    return "the run came to its end" if ended is None else f"the run was ended early, {ended}"


def selection(config: dict[str, Any], said: dict[str, Any]) -> str:
    """Who chose is what the settings say."""
    select = config["method"].get("select", "defender")
    if said["selection"] != select:
        raise RecordError(f"{said['selection']} there, but by its settings {select}")
    return f"{select}, as its settings say"


def trigger(said: dict[str, Any], found: dict[str, Any] | None) -> str:
    """How well the trigger hides is what its pictures show; SSIM only where it was measured both times."""
    there = said["trigger"]
    if (found is None) != (there is None):
        raise RecordError(f"{there} there, {found} here")
    if found is None:
        return "there is none"
    unseen = {"ssim", "ssim_count"} if None in (there["ssim"], found["ssim"]) else set()
    for name in found.keys() - unseen:
        one, other = there[name], found[name]
        if one != other and (None in (one, other) or not isclose(one, other, rel_tol=ROUNDED, abs_tol=1e-4)):
            raise RecordError(f"{name} is {one} there, {other} here")
    return "as its pictures show it" + ("; SSIM was not compared" if unseen else "")


def der(said: dict[str, Any]) -> str:
    """The rating follows from the figures beside it."""

    def shares(part: dict[str, Any]) -> Score:
        asr, racc = (counted(part, name) if f"{name}_count" in part else None for name in ("asr", "racc"))
        return Score(counted(part, "acc"), asr, racc)

    rating = rating_of(shares(said["before"]), shares(said["after"]))
    if rating != said["der"]:
        raise RecordError(f"{said['der']} there, but its own figures give {rating}")
    return f"{rating}, that of its figures"
