"""One defense beside each rival on the same attacked networks: differences pair by pair, so that what makes a network
easy or hard for every defense falls out.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sau.report.read import NONE, Run
from sau.report.spread import Spread
from sau.report.table import Cell, Section

Network = tuple[str, str, int | None]  # an attacked network: attack, its variant, seed


@dataclass(frozen=True)
class Duel:
    """A defense against a rival.

    Args:
        champion: the defense, with its variant.
        rival: the other one, with its variant.
        acc: champion - rival in points, one value for each attacked network that both purified.
        asr: the same; below 0 is better.
        der: the same.
        oracle: whether test data chose something of the rival's.
    """

    champion: str
    rival: str
    acc: Spread
    asr: Spread
    der: Spread
    oracle: bool

    @property
    def wins(self) -> int:
        """Networks on which the champion's DER is higher."""
        return sum(value > 0 for value in self.der.values)

    @property
    def p(self) -> float:
        """Two-sided sign test: how probable so uneven a record is between equals; ties are left out."""
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
    """The cells of each defense and variant, over attacks."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in section.cells:
        if cell.good:
            groups.setdefault((cell.defense, cell.variant), []).append(cell)
    for (defense, variant), cells in groups.items():
        yield f"{defense} {variant}".strip(), cells


def _duel(name: str, own: list[Cell], rival: str, other: list[Cell]) -> Iterator[Duel]:
    ours, theirs = _runs(own), _runs(other)
    both = [network for network in ours if network in theirs]
    if both:
        gaps = {
            key: Spread(tuple(_figure(ours[at], key) - _figure(theirs[at], key) for at in both))
            for key in ("acc", "asr", "der")
        }
        yield Duel(name, rival, **gaps, oracle=any(cell.oracle for cell in other))


def _runs(cells: list[Cell]) -> dict[Network, Run]:
    """Runs that count, by the network they purified; a network without a trigger has no DER and takes no part."""
    return {
        (cell.attack, cell.attack_variant, run.seed): run
        for cell in cells for run in cell.good if run.figures["der"] is not None
    }  # fmt: skip


def _figure(run: Run, name: str) -> float:
    value = run.figures[name]
    assert value is not None  # who has a DER has both rates
    return value
