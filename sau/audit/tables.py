"""Audits that were written, as tables and as a figure: a row for each network, a column for each step of what the
attacker spent, means over seeds.
"""

import json
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sau import files
from sau.audit.runner import CONTROL, RESULT
from sau.errors import MALFORMED, RecordError, one_line
from sau.record.attack_result import NOT_TAKEN
from sau.report.results import NONE, MeanStd, shown
from sau.report.tables import markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Audit = Mapping[str, Any]  # what `audit.json` holds
Key = tuple[str, str]  # part and curve
Line = dict[Any, MeanStd]  # by what the attacker spent

TITLES: dict[Key, str] = {
    ("before", ""): "As they are",
    ("statistics", ""): "With statistics of batch norm estimated anew",
    ("relearn", "released"): "Re-learning from k poisons, augmented once (as released)",
    ("relearn", "fresh"): "Re-learning from k poisons, every batch augmented anew",
    ("path", "statistics between"): "On the path from the attacked weights (0) to the purified ones (1)",
    ("path", "statistics anew"): "On the same path, statistics of batch norm estimated anew",
    ("white", "trigger + D"): "White box: trigger and universal D, by radius",
    ("white", "D alone"): "White box: D on images without a trigger (gUAA), by radius",
    ("white", "trigger + noise"): "Trigger and noise, by radius",
}
SPENT = {"relearn": "poisoned images", "path": "share of the way", "white": "radius of D"}  # parts that are drawn
MARKS = "osv^DPX*h"
COLUMNS = 4


def read(place: Path) -> dict[str, Any]:
    """One audit: of its folder or record, or FILE.jsonl/NAME, the line of a file whose `name` this is; RecordError if
    there is none."""
    try:
        if place.parent.is_file():
            lines = [json.loads(line) for line in files.read(place.parent).decode().splitlines()]
            found: dict[str, Any] = next((line for line in lines if line.get("name") == place.name), {})
        else:
            found = files.read_json((place if (place / RESULT).is_file() else place / "audit") / RESULT)
        if not {"rows", "asked", "about", "networks"} <= found.keys():
            raise ValueError("it is no result of an audit, or no line has the name")
    except (OSError, *MALFORMED) as error:
        raise RecordError(f"cannot read {place}: {error}; make it with scripts/audit.py") from None
    return found


def curves(audits: Sequence[Audit], figure: str = "asr") -> dict[Key, dict[str, Line]]:
    """A figure by part and curve, network, and what the attacker spent.

    One value for each audit, or draw of a lone one: draws on one network do not count as networks where several are
    compared.
    """
    found: dict[Key, dict[str, Line]] = {}
    for audit in audits:
        drawn = defaultdict[tuple[Key, str, Any], list[float]](list)
        for row in (row for row in audit["rows"] if row.get(figure) is not None):
            drawn[(row["part"], row["curve"]), row["network"], row["x"]].append(row[figure])
        for (key, network, x), values in drawn.items():
            line = found.setdefault(key, {}).setdefault(network, {})
            earlier = line[x].values if x in line else ()
            line[x] = MeanStd((*earlier, *(values if len(audits) == 1 else [statistics.mean(values)])))
    return found


def did_not_take(audits: Sequence[Audit]) -> list[str]:
    """A line for each audit of an attack that did not pass its gate."""
    return [one_line(f"{audit['record']}: {NOT_TAKEN}") for audit in audits if NOT_TAKEN in audit.get("notes", ())]


def tables(audits: Sequence[Audit]) -> str:
    """Markdown: ASR in percent for every part, then BEC; mean ± standard deviation where there are several seeds."""
    n, draws = len(audits), len(audits[0]["asked"]["seeds"])
    over, texts = f"{n} attacked networks" if n > 1 else f"{draws} draws of the attacker's", did_not_take(audits)
    texts += [f"Mean ± standard deviation over {over}; of two both values."] if n > 1 or draws > 1 else []
    acc = curves(audits, "acc")
    for key, lines in curves(audits).items():
        steps = _steps(lines)
        alone = key[0] in ("before", "statistics")
        heads = ["network", *("ASR" if alone else f"k = {x}" if key[0] == "relearn" else str(x) for x in steps)]
        body = [[name, *(shown(line.get(x), 1) for x in steps)] for name, line in lines.items()]
        if alone or key[0] == "relearn":
            heads.append("ACC" if alone else f"ACC at {heads[-1]}")
            body = [[*cells, shown(acc[key][cells[0]].get(steps[-1]), 1)] for cells in body]
        texts.append(f"{one_line(_title(key))}\n\n{markdown(heads, body)}".rstrip())
    s, bec = (curves(audits, figure).get(("bec", ""), {}) for figure in ("s", "bec"))
    if s:
        body = [[name, shown(line[0], 3), shown(bec.get(name, {}).get(0), 3)] for name, line in s.items()]
        texts.append(f"Backdoor existence coefficient\n\n{markdown(['network', 's', 'BEC'], body)}".rstrip())
    return "\n\n".join(texts)


def _steps(lines: Mapping[str, Line]) -> list[Any]:
    """What the attacker spent in any line, rising; the names that an earlier version wrote stay in their order."""
    every = dict.fromkeys(x for line in lines.values() for x in line)
    return sorted(every, key=lambda x: 0 if isinstance(x, str) else x)


def _title(key: Key) -> str:
    return TITLES.get(key, ": ".join(filter(None, key)))


def draw(audits: Sequence[Audit]) -> "Figure":
    """A panel for each part that was audited: means over audits and seeds, bars of one standard deviation.

    The steps on the horizontal axes stand side by side whatever lies between them. The attacked network is black,
    networks that never had a backdoor are grey and dashed.
    """
    from sau.figures import COLOURS, GREY, add_legend, panels

    found = {key: lines for key, lines in curves(audits).items() if key[0] in SPENT}
    left = curves(audits, "bec").get(("bec", ""), {})
    count = max(1, len(found) + bool(left))
    rows, columns = -(-count // COLUMNS), min(COLUMNS, count)
    figure, every = panels(rows, columns, (0.6 + 3.2 * columns, 0.8 + 2.7 * rows))
    names = dict.fromkeys(name for lines in (*found.values(), left) for name in lines if name not in (NONE, CONTROL))
    styles = {name: {"color": colour, "marker": mark}
              for name, colour, mark in zip(names, cycle(COLOURS), cycle(MARKS), strict=False)}  # fmt: skip
    styles[NONE] = {"color": "black", "marker": "."}
    styles[CONTROL] = {"color": GREY, "marker": ".", "linestyle": "--"}
    for panel, (key, lines) in zip(every, found.items(), strict=False):
        steps = _steps(lines)
        for name, line in lines.items():
            places, values = zip(*((place, line[x]) for place, x in enumerate(steps) if x in line), strict=True)
            means, bars = [value.mean for value in values], [value.std for value in values]
            panel.errorbar(places, means, bars, label=name, markersize=4, linewidth=1.2, elinewidth=0.7, **styles[name])
        panel.set_xticks(range(len(steps)), [f"{x:,}" if isinstance(x, int) else str(x) for x in steps], fontsize=8)
        panel.set_title(textwrap.fill(_title(key), 40), fontsize=9)
        panel.set(xlabel=SPENT[key[0]], ylabel="ASR (%)", ylim=(-3, 103))
    if left:  # BEC, where it is defined
        panel = every[len(found)]
        means = [line[0].mean for line in left.values()]
        panel.barh(list(left), means, color=[styles[name]["color"] for name in left])
        panel.invert_yaxis()
        panel.axvline(0, color="black", linewidth=0.7)
        panel.set(title="existence coefficient", xlabel="BEC (attacked 1, control 0)")
    for panel in every[len(found) + bool(left) :]:
        panel.set_axis_off()
    add_legend(figure, 6)
    return figure
