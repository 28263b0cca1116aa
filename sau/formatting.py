"""Numbers and tables as text."""

import math
from collections.abc import Iterable, Sequence

from sau.errors import printable


def duration(seconds: float) -> str:
    """Like 45 s, 12 min or 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def short(value: float) -> str:
    """A whole number as one, anything else with four digits."""
    return f"{value:.0f}" if float(value).is_integer() and abs(value) >= 1 else f"{value:.4g}"


def at_most(bound: float) -> str:
    """The largest number of four digits that is not above `bound`, which is above 0."""
    text = f"{bound:.4g}"
    return text if float(text) <= bound else f"{bound - 10.0 ** (math.floor(math.log10(bound)) - 3) / 2:.4g}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. Names in it may be a stranger's, so signs of its own and of HTML are written out."""
    lines = [[_cell(text) for text in line] for line in (head, *body)]
    lines.insert(1, ["---"] * len(head))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def marked(name: str, selection: str | None) -> str:
    """The name of a defense, marked where test data chose something of it: `selection` is a summary's."""
    return f"{name} (oracle)" if selection == "oracle" else name
