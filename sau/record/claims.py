"""What a record says about itself, each claim checked: one line that it holds, or a RecordError that says how not."""

import platform
from typing import Any

import torch

import sau
from sau.errors import RecordError
from sau.evaluate import Score, Share
from sau.evaluate import der as rating_of
from sau.record.folder import MANIFEST, Record
from sau.record.schema import digest

SLACK = 0.001  # share of the pictures that may be answered otherwise here: other processors round otherwise
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


def der(said: dict[str, Any]) -> str:
    """The rating follows from the figures beside it."""

    def shares(part: dict[str, Any]) -> Score:
        asr, racc = (counted(part, name) if f"{name}_count" in part else None for name in ("asr", "racc"))
        return Score(counted(part, "acc"), asr, racc)

    rating = rating_of(shares(said["before"]), shares(said["after"]))
    if rating != said["der"]:
        raise RecordError(f"{said['der']} there, but its own figures give {rating}")
    return f"{rating}, that of its figures"
