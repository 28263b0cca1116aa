"""Mean and standard deviation over seeds or attacks, and one defense against another on the same networks."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sau.report.results import PERCENT, Result

Network = tuple[str, Path]  # an attacked network: its attack and its folder


@dataclass(frozen=True)
class MeanStd:
    """Values of one figure over seeds, or over attacks.

    Args:
        values: at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float | None:
        """Standard deviation with n - 1; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def half_interval(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None for fewer than three values."""
        from scipy.special import stdtrit

        n = len(self.values)
        return None if self.std is None or n < 3 else float(stdtrit(n - 1, 0.975)) * self.std / math.sqrt(n)

    def text(self, digits: int = 2, interval: bool = False, sign: str = "") -> str:
        """`mean±std` or `mean±half_interval`, which no table breaks; one or two values are listed."""
        if len(self.values) < 3:
            return ", ".join(f"{value:{sign}.{digits}f}" for value in self.values)
        return f"{self.mean:{sign}.{digits}f}±{self.half_interval if interval else self.std:.{digits}f}"


def mean_std(values: Sequence[float | None]) -> MeanStd | None:
    """MeanStd of the values; None if there are none or one is None."""
    known = tuple(value for value in values if value is not None)
    return MeanStd(known) if known and len(known) == len(values) else None


@dataclass(frozen=True)
class PairedComparison:
    """A defense minus a rival, in points, on the networks that both purified.

    Differences are taken per network, so that what makes a network easy or hard for every defense cancels out, and
    averaged over the networks of an attack: seeds are no further attacks.

    Args:
        acc: one difference an attack.
        asr: the same; below 0 is better.
        racc: the same.
        der: the same.
        networks: how many both purified.
    """

    acc: MeanStd
    asr: MeanStd
    racc: MeanStd
    der: MeanStd
    networks: int

    @property
    def wins(self) -> int:
        """Attacks on which the defense has the higher DER."""
        return sum(value > 0 for value in self.der.values)

    @property
    def p(self) -> float:
        """Two-sided sign test over attacks; ties are left out."""
        from scipy.stats import binomtest

        decided = [value for value in self.der.values if value]
        return float(binomtest(self.wins, len(decided)).pvalue) if decided else 1.0


def compare(ours: Sequence[Result], theirs: Sequence[Result]) -> PairedComparison | None:
    """Compare the results of two defenses; None if they share no network."""
    first, second = _by_network(ours), _by_network(theirs)
    differences: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in PERCENT}
    for network in first.keys() & second.keys():
        for name in PERCENT:
            difference = first[network][name] - second[network][name]
            differences[name][network[0]].append(difference)
    if not differences["der"]:
        return None
    means = {name: [statistics.fmean(found[attack]) for attack in sorted(found)] for name, found in differences.items()}
    return PairedComparison(
        **{name: MeanStd(tuple(values)) for name, values in means.items()},
        networks=sum(map(len, differences["der"].values())),
    )


def _by_network(results: Sequence[Result]) -> dict[Network, dict[str, float]]:
    """Mean figures by network, over the defense's own seeds; a network without a trigger has no DER and is left out."""
    found: dict[Network, list[Result]] = defaultdict(list)
    for result in results:
        if all(result.figures.get(name) is not None for name in PERCENT):
            found[result.attack, result.attack_path].append(result)
    return {
        network: {name: statistics.fmean(result.figures[name] or 0.0 for result in some) for name in PERCENT}
        for network, some in found.items()
    }
