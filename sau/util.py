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


def at_most(bound: float) -> str:
    """The largest number of four digits that is not above `bound`, which is above 0."""
    text = f"{bound:.4g}"
    return text if float(text) <= bound else f"{bound - 10.0 ** (math.floor(math.log10(bound)) - 3) / 2:.4g}"


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. Names in it may be a stranger's, so signs of its own and of HTML are written out."""
    plain = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|"})
    lines = [[printable(text).translate(plain) for text in line] for line in (head, *body)]
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(head), "|\n", *rows[1:]])


def marked(name: str, selection: str | None) -> str:
    """The name of a defense, marked where test data chose something of it: `selection` is a summary's."""
    return f"{name} (oracle)" if selection == "oracle" else name
