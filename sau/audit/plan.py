"""An audit cut into pieces, which are kept as they are finished, and put together again."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from sau.audit.asked import PARTS, Asked
from sau.audit.case import CONTROL, NONE, Case, Network
from sau.audit.coefficient import existence, stretched
from sau.audit.measure import ALONE, FRESH, RELEASED, TRIGGER, Measure, Row
from sau.audit.relearn import mixture
from sau.data.sources import fingerprint
from sau.errors import ConfigError
from sau.files import write
from sau.holding import give_back, hold
from sau.schema import digest, plain
from sau.watch import versioned

PIECES, RESULT = "pieces", "audit.json"


@dataclass(frozen=True, eq=False)
class Piece:
    """Some of an audit's work, a minute or less on a processor for a small network.

    Args:
        part: that it belongs to.
        about: what it does, for the screen.
        identity: what determines its rows.
        work: makes them.
    """

    part: str
    about: str
    identity: dict[str, Any]
    work: Callable[[], list[Row]]

    @property
    def file(self) -> str:
        """Where its rows are kept: the same name for the same identity alone."""
        return f"{self.part}_{digest(self.identity)[:16]}.json"


class Plan:
    """What is to be done.

    Args:
        case: the networks and pictures.
        asked: the parts, and how much the attacker may spend.

    Raises ConfigError for more shots than there are pictures, and for BEC without a control.
    """

    def __init__(self, case: Case, asked: Asked) -> None:
        if "bec" in asked.parts and CONTROL not in case.networks:
            raise ConfigError("bec needs a network without a backdoor; give --control, or leave bec out of --parts")
        if "relearn" in asked.parts:
            mixture(case.train, case.poisons, max(asked.shots), share=asked.share, seed=0)
        self.case, self.asked, self.measure = case, asked, Measure(case, asked)
        pictures = {"test": fingerprint(case.test), "poisons": fingerprint(case.poisons)}
        self.common = {"attack": case.digest, "triggered": fingerprint(case.triggered), **pictures}

    def pieces(self) -> list[Piece]:
        """All of them, part by part."""
        makers = dict(zip(PARTS, (self._relearn, self._white, self._black, self._transfer, self._near, self._bec),
                          strict=True))  # fmt: skip
        asked = [part for part in PARTS if part in self.asked.parts]
        return [*self._before(), *(piece for part in asked for piece in makers[part]())]

    def _piece(
        self, part: str, about: str, networks: list[Network], work: Callable[[], list[Row]], **settings: Any
    ) -> Piece:
        who = {network.name: [network.digest, network.model.amp] for network in networks}
        identity = versioned({**self.common, "part": part, "networks": who, **settings})
        return Piece(part, about, plain(identity), work)

    def _before(self) -> Iterator[Piece]:
        for network in self.case.networks.values():
            yield self._piece("before", network.name, [network], partial(self.measure.before, network))

    def _relearn(self) -> Iterator[Piece]:
        settings = {"epochs": self.asked.epochs, "share": self.asked.share}
        shots, networks = sorted({0, *self.asked.shots}), self.case.networks.values()
        for network, curve, seed, k in product(networks, (RELEASED, FRESH), self.asked.seeds, shots):
            work = partial(self.measure.relearned, network, curve, seed, k)
            about = f"{network.name}, {curve}, {k} poisons, seed {seed}"
            yield self._piece("relearn", about, [network], work, curve=curve, seed=seed, shots=k, **settings)

    def _white(self) -> Iterator[Piece]:
        for network, curve, seed in product(self.case.networks.values(), (TRIGGER, ALONE), self.asked.seeds):
            also = [] if network.control or curve == ALONE else self.case.controls
            work = partial(self.measure.white, network, curve, seed)
            about = f"{network.name}, {curve}, seed {seed}"
            yield self._piece("white", about, [network, *also], work, curve=curve, seed=seed, **self._gradients)

    def _black(self) -> Iterator[Piece]:
        settings = {"eps": self.asked.eps[-1], "queries": self.asked.queries, "scored": self.asked.scored}
        for network, seed in product(self.case.networks.values(), self.asked.seeds):
            work = partial(self.measure.questioned, network, seed)
            yield self._piece("black", f"{network.name}, seed {seed}", [network], work, seed=seed, **settings)

    def _transfer(self) -> Iterator[Piece]:
        groups: dict[tuple[str, ...], list[Network]] = {}
        for network in self.case.networks.values():
            groups.setdefault(tuple(other.name for other in self._surrogates(network)), []).append(network)
        for (names, targets), seed in product(groups.items(), self.asked.seeds):
            surrogates = [self.case.networks[name] for name in names]
            who = {"surrogates": names, "targets": [target.name for target in targets]}
            about = f"{', '.join(names)} to {', '.join(who['targets'])}, seed {seed}"
            work = partial(self.measure.transferred, surrogates, targets, seed)
            if surrogates:
                everybody = [*surrogates, *targets]
                yield self._piece("transfer", about, everybody, work, seed=seed, **who, **self._gradients)

    def _near(self) -> Iterator[Piece]:
        named = sorted(self.case.attack.neighbours()) if self.case.attack is not None else []
        for network in self.case.networks.values():
            work = partial(self.measure.nearby, network)
            yield self._piece("neighbours", network.name, [network], work, named=named)

    def _bec(self) -> Iterator[Piece]:
        for network in self.case.networks.values():
            work = partial(self.measure.alike, network)
            yield self._piece("bec", network.name, [self.case.networks[NONE], network], work)

    @property
    def _gradients(self) -> dict[str, Any]:
        return {"eps": self.asked.eps, "steps": self.asked.steps, "pictures": self.asked.pictures}

    def _surrogates(self, network: Network) -> list[Network]:
        """The record's purified networks except this one; where that leaves none, the attacked network."""
        others = [other for other in self.case.purified if other is not network]
        return others or [other for other in (self.case.networks[NONE],) if other is not network]


def carry_out(plan: Plan, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Make the pieces that are not in `out` yet, and `audit.json` from all of them, which is returned.

    The folder is this process's meanwhile (LockedError names who else has it). What was interrupted goes on where it
    was: each finished piece is a file.
    """
    hold(out)
    pieces, rows = plan.pieces(), []
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
    result = {**found, "rows": rows}
    write(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
    give_back(out)
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
