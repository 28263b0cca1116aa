"""What a grid will take, from what like cells took."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sau.errors import RecordError
from sau.files import number
from sau.grid.plan import Cell
from sau.grid.store import Store
from sau.wording import duration

Like = tuple[str, ...]
SAMPLE = 20  # like cells whose cost is looked at


@dataclass(frozen=True)
class Cost:
    """What like cells took, as means; None where none is recorded."""

    seconds: float | None
    memory_mb: float | None
    disk_bytes: float | None


def costs(cells: Iterable[Cell], store: Store) -> dict[Like, Cost]:
    """What finished cells took, by what they are like."""
    seen: dict[Like, list[tuple[float | int | None, ...]]] = defaultdict(list)
    for cell in cells:
        over = store.over(cell) if len(seen[cell.like]) < SAMPLE else ""
        if over:
            summary = store.summary(cell)
            files = store.folder(cell).glob("*.*") if over == "finished" else ()
            disk = sum(file.stat().st_size for file in files) if over == "finished" else None
            seen[cell.like].append((_number(cell, summary, "seconds"), _number(cell, summary, "peak_memory_mb"), disk))
    return {like: Cost(*(_mean(column) for column in zip(*rows, strict=True))) for like, rows in seen.items() if rows}


def _number(cell: Cell, summary: Mapping[str, Any], name: str) -> float | int | None:
    value = summary.get(name)
    if value is None or number(value):
        return value
    damage = f"the summary of {cell.folder} is damaged ({name} is {value!r}, allowed is a number)"
    raise RecordError(f"{damage}; remove it, and the cell runs again")


def _mean(column: Iterable[float | int | None]) -> float | None:
    values = [value for value in column if value is not None]
    return fmean(values) if values else None


class Forecast:
    """Seconds, memory and disk of cells to come.

    Args:
        costs: of like cells, from `costs`.
    """

    def __init__(self, costs: Mapping[Like, Cost]) -> None:
        self.costs = dict(costs)
        self.seen: dict[Like, list[float]] = {}

    def add(self, cell: Cell, summary: Mapping[str, Any]) -> None:
        """Learn from a cell that just ended; the mean of this run takes the place of older ones."""
        seconds = self.seen.setdefault(cell.like, [])
        seconds.append(float(summary.get("seconds", 0.0)))
        old = self.costs.get(cell.like, Cost(None, None, None))
        self.costs[cell.like] = Cost(sum(seconds) / len(seconds), old.memory_mb, old.disk_bytes)

    def seconds(self, left: Mapping[Like, int]) -> float | None:
        """Seconds of all cells that are left, one after another; None if nothing is known.

        Cells unlike any so far count as the mean of the others.
        """
        mean = self._mean()
        return None if mean is None else sum((count * (self._of(like) or mean) for like, count in left.items()), 0.0)

    def longest(self, cells: Iterable[Cell]) -> float:
        """Seconds of the slowest attack and defense, one after the other, which no number of machines shortens."""
        mean = self._mean() or 0.0
        each = {cell.digest: (cell, self._of(cell.like) or mean) for cell in cells}
        befores = ((each[cell.attack][1] if cell.attack in each else 0.0, seconds) for cell, seconds in each.values())
        return max(map(sum, befores), default=0.0)

    def _mean(self) -> float | None:
        return _mean(cost.seconds for cost in self.costs.values())

    def _of(self, like: Like) -> float | None:
        cost = self.costs.get(like)
        return cost.seconds if cost else None

    def table(self, cells: Sequence[Cell]) -> list[str]:
        """A line for each kind of cell: how many, seconds each, memory, disk; `unknown` where nothing is recorded."""
        lines = []
        groups: dict[Like, list[Cell]] = {}
        for cell in cells:
            groups.setdefault(cell.like, []).append(cell)
        for like, group in groups.items():
            cost = self.costs.get(like, Cost(None, None, None))
            each = "time unknown" if cost.seconds is None else f"{duration(cost.seconds)} each"
            memory = f"needs {group[0].memory_gb:g} GiB" + (
                f" (took {cost.memory_mb:.0f} MiB)" if cost.memory_mb else ""
            )
            disk = "disk unknown" if cost.disk_bytes is None else f"{cost.disk_bytes / 2**20:.1f} MiB each on disk"
            lines.append(f"{len(group):5} x {' '.join(like)}: {each}, {memory}, {disk}")
        return lines

    def disk(self, cells: Iterable[Cell]) -> float:
        """Bytes that the cells will take, as far as like cells are known."""
        costs = (self.costs.get(cell.like) for cell in cells)
        return sum((cost.disk_bytes or 0.0 for cost in costs if cost), 0.0)


def totals(cells: Sequence[Cell], forecast: Forecast, parallel: int) -> str:
    """One line: time, memory and disk of the cells, and of how many of them there is no record."""
    parallel = max(1, min(parallel, len(cells)))
    left: dict[Like, int] = {}
    for cell in cells:
        left[cell.like] = left.get(cell.like, 0) + 1
    unknown = sum(count for like, count in left.items() if like not in forecast.costs)
    seconds = forecast.seconds(left)
    time = "time unknown (nothing like it is recorded)"
    if seconds is not None:
        time = f"about {duration(max(seconds / parallel, forecast.longest(cells)))}"
    guess = (
        f"; {unknown} of them like no recorded cell, counted as the mean of the others" if unknown and seconds else ""
    )
    memory = max((cell.memory_gb for cell in cells), default=0.0)
    disk = forecast.disk(cells) / 2**20
    needs = f"up to {memory * parallel:g} GiB of memory; {disk:.0f} MiB of disk known"
    return f"{len(cells)} cells, {parallel} at a time: {time}{guess}; {needs}"
