"""Mean and standard deviation over seeds of the records below a folder, as a Markdown table.

python scripts/seeds.py RECORDS        reads RECORDS/<attack>_s<seed>/summary.json and what its defenses wrote

A grid's digests in the names of folders are left out, its poisoning ratios and clean shares are not.
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.grid.names import plain

FIGURES = ("acc", "asr", "racc", "der", "lost", "seconds")


def rows(root: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """(attack, defense) -> figure -> its values over seeds; the attacked network itself has the defense `none`."""
    found: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for file in sorted(root.glob("*_s*/summary.json")):
        attack = plain(file.parent.name).rsplit("_s", 1)[0]
        _add(found[attack, "none"], json.loads(file.read_text()))
        for other in sorted(file.parent.glob("defense/*/summary.json")):
            summary = json.loads(other.read_text())
            lost = summary["before"]["acc"] - summary["after"]["acc"]
            _add(found[attack, plain(other.parent.name)], {**summary, **summary["after"], "lost": lost})
    return found


def _add(figures: dict[str, list[float]], summary: dict[str, Any]) -> None:
    for name in FIGURES:
        if summary.get(name) is not None:
            figures[name].append(summary[name])


def table(found: dict[tuple[str, str], dict[str, list[float]]]) -> str:
    """Markdown; one value alone has no spread."""
    lines = ["| attack | defense | seeds | ACC % | ASR % | R-ACC % | DER % | ACC lost | seconds |", "|---" * 9 + "|"]
    for (attack, defense), figures in found.items():
        cells = [_spread(figures.get(name, []), 0 if name == "seconds" else 2) for name in FIGURES]
        lines.append(f"| {attack} | {defense} | {len(figures['acc'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(table(rows(Path(sys.argv[1]))))
