"""One figure over seeds or attacks: mean, standard deviation, interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Spread:
    """Values of one figure over seeds, or over attacks.

    Args:
        values: one a seed or an attack, at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Their mean."""
        return statistics.mean(self.values)

    @property
    def sd(self) -> float | None:
        """Standard deviation with n - 1; None for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @cached_property
    def half(self) -> float | None:
        """Half of the 95 % interval of the mean, by Student's t; None for fewer than three values."""
        from scipy.special import stdtrit

        n = len(self.values)
        return None if self.sd is None or n < 3 else float(stdtrit(n - 1, 0.975)) * self.sd / math.sqrt(n)

    def text(self, digits: int = 2, interval: bool = False, sign: str = "") -> str:
        """One value as it is, two values side by side, more as `mean ± standard deviation`, or `± half` of the 95 %
        interval: two values have a spread, but say next to nothing of how large it is."""
        if len(self.values) < 3:
            return ", ".join(f"{value:{sign}.{digits}f}" for value in self.values)
        return f"{self.mean:{sign}.{digits}f} ± {self.half if interval else self.sd:.{digits}f}"


def spread(values: Sequence[float | None]) -> Spread | None:
    """The spread; None if there are no values or some run has none."""
    known = tuple(value for value in values if value is not None)
    return Spread(known) if known and len(known) == len(values) else None
