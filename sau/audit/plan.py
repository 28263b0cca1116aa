"""An audit cut into pieces."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

from sau.audit.asked import PARTS, Asked
from sau.audit.case import CONTROL, NONE, Case, Network
from sau.audit.measure import ALONE, ANEW, BETWEEN, FRESH, RELEASED, TRIGGER, Measure, Row
from sau.audit.path import STEPS, connected
from sau.audit.relearn import mixture
from sau.data.sources import fingerprint
from sau.errors import ConfigError
from sau.record.schema import as_json, digest
from sau.run import versioned


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
        self.reached = [net for net in case.purified if connected(case.networks[NONE].model, net.model)]
        cut = [net.name for net in case.purified if net not in self.reached] if "path" in asked.parts else []
        self.notes = [*case.notes, *(f"no path leads to {name}, which has other layers" for name in cut)]
        pictures = {"test": fingerprint(case.test), "poisons": fingerprint(case.poisons)}
        self.common = {"attack": case.digest, "triggered": fingerprint(case.triggered), **pictures}
        self.about = {**case.about, "test": pictures["test"]}  # what audits that are compared must agree in

    def pieces(self) -> list[Piece]:
        """All of them, part by part."""
        makers = {
            "relearn": self._relearn, "path": self._path, "white": self._white, "transfer": self._transfer,
            "bec": self._bec,
        }  # fmt: skip
        asked = [part for part in PARTS if part in self.asked.parts]
        return [*self._before(), *(piece for part in asked for piece in makers[part]())]

    def _piece(
        self, part: str, about: str, networks: list[Network], work: Callable[[], list[Row]], **settings: Any
    ) -> Piece:
        who = {network.name: [network.digest, network.model.amp] for network in networks}
        identity = versioned({**self.common, "part": part, "networks": who, **settings})
        return Piece(part, about, as_json(identity), work)

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

    def _path(self) -> Iterator[Piece]:
        attacked, settings = self.case.networks[NONE], {"share": self.asked.share, "steps": STEPS, "augmented": True}
        for network, curve in product(self.reached, (BETWEEN, ANEW)):
            work = partial(self.measure.walked, network, curve)
            yield self._piece("path", f"{network.name}, {curve}", [attacked, network], work, curve=curve, **settings)

    def _white(self) -> Iterator[Piece]:
        for network, curve, seed in product(self.case.networks.values(), (TRIGGER, ALONE), self.asked.seeds):
            also = [] if network.control or curve == ALONE else self.case.controls
            work = partial(self.measure.white, network, curve, seed)
            about = f"{network.name}, {curve}, seed {seed}"
            yield self._piece("white", about, [network, *also], work, curve=curve, seed=seed, **self._gradients)

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

    def _bec(self) -> Iterator[Piece]:
        for network in self.case.networks.values():
            work = partial(self.measure.alike, network)
            yield self._piece("bec", network.name, [self.case.networks[NONE], network], work)

    @property
    def _gradients(self) -> dict[str, Any]:
        return {"eps": self.asked.eps, "steps": self.asked.steps, "pictures": self.asked.pictures}

    def _surrogates(self, network: Network) -> list[Network]:
        """The record's purified networks except this one; where that leaves none, the attacked network."""
        attacked = self.case.networks[NONE]
        others = [other for other in self.case.purified if other is not network]
        return others or ([] if network is attacked else [attacked])
