"""Audits that were written, as tables and as a figure: a row for each network, a column for each step of what the
attacker spent, means over seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sau.audit.runner import ALONE, ANEW, BETWEEN, CONTROL, FRESH, NOISE, RELEASED, RESULT, TRIGGER
from sau.errors import one_line
from sau.files import parse_json, read_json
from sau.files import read as read_bytes
from sau.report.results import NONE, MeanStd, mean_std
from sau.util import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Audit = Mapping[str, Any]  # what `audit.json` holds
Key = tuple[str, str]  # part and curve
Line = dict[Any, MeanStd]  # by what the attacker spent

TITLES: dict[Key, tuple[str, str]] = {  # of a table, and of a panel of the figure
    ("before", ""): ("As they are", ""),
    ("relearn", RELEASED): ("Re-learning from k poisons, augmented once (as released)", "re-learning, augmented once"),
    ("relearn", FRESH): ("Re-learning from k poisons, every batch augmented anew", "re-learning, augmented anew"),
    ("path", BETWEEN): (
        "On the path from the attacked weights (0) to the purified ones (1)", "path from the attacked weights",
    ),
    ("path", ANEW): (
        "On the same path, statistics of batch norm estimated anew", "path, batch norm estimated anew"
    ),
    ("white", TRIGGER): ("White box: trigger and universal D, by radius", "white box, trigger + D"),
    ("white", ALONE): ("White box: D on images without a trigger (gUAA), by radius", "white box, D alone"),
    ("white", NOISE): ("Trigger and noise, by radius", ""),
}  # fmt: skip
SPENT = {"relearn": "poisoned images", "path": "share of the way", "white": "radius of D"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#8c564b", "#6a3d9a")
MARKS = "osv^DPX*h"
COLUMNS = 4


def read(place: Path) -> dict[str, Any]:
    """One audit: of its folder or record, or FILE.jsonl/NAME, the line of a file whose `name` this is.

    Raises OSError, or ValueError if there is none.
    """
    if place.parent.is_file():
        lines = [parse_json(line) for line in read_bytes(place.parent).decode().splitlines()]
        found = next((line for line in lines if isinstance(line, dict) and line.get("name") == place.name), {})
    else:
        found = read_json((place if (place / RESULT).is_file() else place / "audit") / RESULT)
    if not {"rows", "asked", "about", "networks"} <= found.keys():
        raise ValueError("it is no result of scripts/audit.py, or no line has the name")
    return found


def curves(audits: Sequence[Audit], figure: str = "asr") -> dict[Key, dict[str, Line]]:
    """A figure by part and curve, network, and what the attacker spent.

    One value for each audit, or draw of a lone one: draws on one network do not count as networks where several are
    compared.
    """
    found: dict[Key, dict[str, dict[Any, list[float]]]] = {}
    for audit in audits:
        drawn: dict[tuple[Key, str, Any], list[float]] = {}
        for row in (row for row in audit["rows"] if row.get(figure) is not None):
            drawn.setdefault(((row["part"], row["curve"]), row["network"], row["x"]), []).append(row[figure])
        for (key, network, x), values in drawn.items():
            line = found.setdefault(key, {}).setdefault(network, {})
            line.setdefault(x, []).extend(values if len(audits) == 1 else [statistics.mean(values)])
    return {
        key: {network: {x: MeanStd(tuple(values)) for x, values in line.items()} for network, line in lines.items()}
        for key, lines in found.items()
    }


def coefficients(audits: Sequence[Audit]) -> dict[str, dict[str, MeanStd | None]]:
    """`s` and `bec` by network; None where a value is not defined."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for row in (row for audit in audits for row in audit["rows"] if row["part"] == "bec"):
        for name, values in found.setdefault(row["network"], {"s": [], "bec": []}).items():
            values.append(row[name])
    return {network: {name: mean_std(values) for name, values in some.items()} for network, some in found.items()}


def tables(audits: Sequence[Audit]) -> str:
    """Markdown: ASR in percent for every part, then BEC; mean ± standard deviation where there are several seeds."""
    n, draws = len(audits), len(audits[0]["asked"]["seeds"])
    over = f"{n} attacked networks" if n > 1 else f"{draws} draws of the attacker's"
    texts = [f"Mean ± standard deviation over {over}."] if n > 1 or draws > 1 else []
    acc = curves(audits, "acc")
    for key, lines in curves(audits).items():
        steps = _steps(lines)
        heads = ["network", *({"before": "ASR", "relearn": f"k = {x}"}.get(key[0], str(x)) for x in steps)]
        body = [[name, *(_text(line.get(x)) for x in steps)] for name, line in lines.items()]
        if key[0] in ("before", "relearn"):
            heads.append("ACC" if key[0] == "before" else f"ACC at {heads[-1]}")
            body = [[*cells, _text(acc[key][cells[0]].get(steps[-1]))] for cells in body]
        title, _ = TITLES.get(key, (f"{key[0]}: trigger and the {key[1]}", ""))
        texts.append(_table(title, heads, body))
    if found := coefficients(audits):
        body = [[name, *(_text(value, 3) for value in values.values())] for name, values in found.items()]
        texts.append(_table("Backdoor existence coefficient", ["network", "s", "BEC"], body))
    return "\n\n".join(texts)


def _steps(lines: Mapping[str, Line]) -> list[Any]:
    """What the attacker spent, in order, in any line."""
    return list(dict.fromkeys(x for line in lines.values() for x in line))


def _text(value: MeanStd | None, digits: int = 1) -> str:
    return "-" if value is None else value.text(digits)


def _table(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return f"{one_line(title)}\n\n{markdown(heads, body)}".rstrip()


def draw(audits: Sequence[Audit]) -> "Figure":
    """A panel for each part that was audited: means over audits and seeds, bars of one standard deviation.

    The steps on the horizontal axes stand side by side whatever lies between them. The attacked network is black,
    networks that never had a backdoor are grey and dashed.
    """
    import matplotlib.pyplot as plt

    from sau.figures import add_legend

    found, left = curves(audits), coefficients(audits)
    shown = [key for key, (_, title) in TITLES.items() if title and key in found]
    count = max(1, len(shown) + bool(left))
    rows, columns = -(-count // COLUMNS), min(COLUMNS, count)
    figure = plt.figure(figsize=(0.6 + 3.2 * columns, 0.8 + 2.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    styles = _styles([*(name for key in shown for name in found[key]), *left])
    for panel, key in zip(grid.flat, shown, strict=False):
        _curves(panel, found[key], styles)
        ylabel = "ASR (%)" if panel in grid[:, 0] else ""
        panel.set(title=TITLES[key][1], xlabel=SPENT[key[0]], ylim=(-3, 103), ylabel=ylabel)
    if left:
        _bars(grid.flat[len(shown)], left, styles)
    for panel in grid.flat[len(shown) + bool(left) :]:
        panel.set_axis_off()
    add_legend(figure, list(grid.flat[: len(shown)])[::-1], 6)  # the line of the first panel, for not all draw each
    return figure


def _styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Colour, line and mark of each network."""
    others = [name for name in dict.fromkeys(names) if name not in (NONE, CONTROL)]
    styles = {
        name: {"color": colour, "linestyle": "-", "marker": mark}
        for name, colour, mark in zip(others, cycle(COLOURS), cycle(MARKS), strict=False)
    }
    styles[NONE] = {"color": "black", "linestyle": "-", "marker": "."}
    return {**styles, CONTROL: {"color": "#888888", "linestyle": "--", "marker": "."}}


def _curves(panel: Any, lines: Mapping[str, Line], styles: Mapping[str, dict[str, Any]]) -> None:
    steps = _steps(lines)
    for name, line in lines.items():
        places, means = [steps.index(x) for x in line], [value.mean for value in line.values()]
        spreads = [value.std or 0.0 for value in line.values()]
        panel.errorbar(places, means, spreads, label=name, markersize=4, linewidth=1.2, elinewidth=0.7, **styles[name])
    texts = [f"{x:,}" if isinstance(x, int) else str(x) for x in steps]
    panel.set_xticks(range(len(steps)), texts, fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)


def _bars(panel: Any, left: Mapping[str, Mapping[str, MeanStd | None]], styles: Mapping[str, dict[str, Any]]) -> None:
    """BEC of each network, where it is defined."""
    known = {name: value.mean for name, some in left.items() if (value := some["bec"]) is not None}
    panel.barh(list(known), list(known.values()), color=[styles[name]["color"] for name in known])
    panel.invert_yaxis()
    panel.axvline(0, color="black", linewidth=0.7)
    panel.set(title="existence coefficient", xlabel="BEC (attacked 1, control 0)")
    panel.spines[["top", "right"]].set_visible(False)
