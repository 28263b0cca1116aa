"""One defense beside each rival on the same attacked networks: differences pair by pair, so that what makes a network
easy or hard for every defense falls out, and then their mean for each attack, for its networks are no further attacks.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from sau.report.parse import PERCENT
from sau.report.read import NONE, Run
from sau.report.spread import Spread
from sau.report.table import Cell, Section

Network = tuple[str, Path]  # an attacked network: the attack and its folder


@dataclass(frozen=True)
class Duel:
    """A defense against a rival.

    Args:
        champion: the defense, with its variant.
        rival: the other one, with its variant.
        name: of the rival in tables.
        acc: champion - rival in points, one value for each attack: the mean over its networks that both purified.
        asr: the same; below 0 is better.
        racc: the same, of the triggered pictures that are answered rightly again.
        der: the same.
        networks: that both purified.
        oracle: whether test data chose something of the rival's.
    """

    champion: str
    rival: str
    name: str
    acc: Spread
    asr: Spread
    racc: Spread
    der: Spread
    networks: int
    oracle: bool

    @property
    def wins(self) -> int:
        """Attacks on which the champion's DER is higher."""
        return sum(value > 0 for value in self.der.values)

    @property
    def p(self) -> float:
        """Two-sided sign test over attacks: how probable so uneven a record is between equals; ties are left out."""
        from scipy.stats import binomtest

        decided = [value for value in self.der.values if value]
        return float(binomtest(self.wins, len(decided)).pvalue) if decided else 1.0


def duels(section: Section, champion: str = "sau") -> list[Duel]:
    """The champion against every other defense of the section, the strongest rival first; the oracle's rows last."""
    found: list[Duel] = []
    for name, own in _defenses(section):
        if own[0].defense != champion or own[0].oracle:
            continue
        for rival, other in _defenses(section):
            if other[0].defense not in (champion, NONE):
                found += _duel(name, own, rival, other)
    return sorted(found, key=lambda duel: (duel.oracle, duel.der.mean))


def _defenses(section: Section) -> Iterator[tuple[str, list[Cell]]]:
    """The cells of each defense and variant, over the attacks that took."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in section.cells:
        if cell.good and not cell.dead:
            groups.setdefault((cell.defense, cell.variant), []).append(cell)
    for (defense, variant), cells in groups.items():
        yield f"{defense} {variant}".strip(), cells


def _duel(name: str, own: list[Cell], rival: str, other: list[Cell]) -> Iterator[Duel]:
    ours, theirs = _runs(own), _runs(other)
    both = [network for network in ours if network in theirs]
    if both:
        gaps = {key: _gaps(ours, theirs, both, key) for key in PERCENT}
        shown = max(other, key=lambda cell: cell.oracle)  # one that test data chose speaks for all
        yield Duel(name, rival, shown.name, **gaps, networks=len(both), oracle=shown.oracle)


def _runs(cells: list[Cell]) -> dict[Network, list[Run]]:
    """Runs that count, by the network they purified; a network without a trigger has no DER and takes no part."""
    found: dict[Network, list[Run]] = defaultdict(list)
    for cell in cells:
        for run in cell.good:
            if all(run.figures[name] is not None for name in PERCENT):
                found[cell.attack, run.home].append(run)
    return found


def _gaps(ours: dict[Network, list[Run]], theirs: dict[Network, list[Run]], both: list[Network], name: str) -> Spread:
    gaps: dict[str, list[float]] = defaultdict(list)
    for network in both:
        gaps[network[0]].append(_mean(ours[network], name) - _mean(theirs[network], name))
    return Spread(tuple(fmean(each) for each in gaps.values()))


def _mean(runs: list[Run], name: str) -> float:
    """Over the runs of a network, of which there are several where the defense has seeds of its own."""
    return fmean(value for run in runs if (value := run.figures[name]) is not None)  # who has a DER has all of them
