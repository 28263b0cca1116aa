"""ASR against the poisoning ratio, a curve an attack, as PNG and as a Markdown table.

    python scripts/ratios.py RECORDS [RECORDS ...] [--out ratios]

reads RECORDS/<attack>_r<ratio>_s<seed>/summary.json, and those of a grid, which have a digest before the seed. RECORDS
may also be a file of summaries that a grid published.
"""

import math
import statistics
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.command.arguments import Parser
from sau.command.drawing import plt
from sau.errors import RecordError, printable, run_command
from sau.figures import save
from sau.files import read_json
from sau.formatting import markdown
from sau.grid.names import attack_named
from sau.record.summaries import load
from sau.report.parse import within

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
Found = dict[str, dict[float, list[tuple[float, float]]]]  # attack -> ratio -> (ACC, ASR) of each seed


def read(*roots: Path) -> Found:
    """The summaries below the folders; RecordError for two that differ in nothing that a curve tells apart."""
    found: Found = defaultdict(lambda: defaultdict(list))
    seen: dict[tuple[str, float, int | None], Path] = {}
    for folder, summary in sorted(item for root in roots for item in summaries(root).items()):
        attack, seed, settings = attack_named(folder.name)
        if settings is None:
            continue
        ratio = settings["pratio"]
        first = seen.setdefault((attack, ratio, seed), folder)
        if first != folder:
            raise RecordError(f"{first} and {folder} are of one attack, ratio and seed; keep one of them there")
        found[attack][ratio].append(scores(folder, summary))
    return found


def summaries(root: Path) -> dict[Path, dict[str, Any]]:
    """The summaries of the attacks in a folder, or in a file that a grid published."""
    if root.is_file():
        return {root / cell: summary for cell, summary in load(root).items() if "/" not in cell}
    found = {}
    for file in root.glob("*_r*_s*/summary.json"):
        try:
            found[file.parent] = read_json(file)
        except (OSError, ValueError) as error:
            raise RecordError(f"{file} is damaged ({error}); delete its folder and run it again") from None
    return found


def scores(folder: Path, summary: dict[str, Any]) -> tuple[float, float]:
    """ACC and ASR of a summary; RecordError if it does not say them."""
    for name in ("acc", "asr"):
        if not within(summary.get(name), 100):
            got = str(summary.get(name, "missing"))[:40]
            raise RecordError(
                f"{folder}: {name} is {got}, wanted is a number from 0 to 100; delete its folder and run it again"
            )
    return summary["acc"], summary["asr"]


def table(found: Found) -> str:
    """ACC / ASR, means over seeds."""
    ratios = sorted({ratio for curve in found.values() for ratio in curve})
    body = []
    for attack, curve in sorted(found.items()):
        body.append([attack, *("-" if ratio not in curve else _mean(curve[ratio]) for ratio in ratios)])
    return markdown(["attack", *(f"{ratio:g}" for ratio in ratios)], body)


def _mean(scores: list[tuple[float, float]]) -> str:
    return " / ".join(f"{statistics.mean(column):.2f}" for column in zip(*scores, strict=True))


def draw(found: Found) -> plt.Figure:
    """Ratios on a logarithmic scale, with 0 at the left; a vertical line from the least to the most over seeds. No line
    leads over a ratio that an attack was not run with and another one was."""
    ratios = sorted({ratio for curve in found.values() for ratio in curve})
    figure, axis = plt.subplots(figsize=(5.5, 3.6))
    for colour, (attack, curve) in zip(cycle(COLOURS), sorted(found.items()), strict=False):
        asr = [[score[1] for score in curve.get(ratio, [(math.nan, math.nan)])] for ratio in ratios]
        means = [statistics.mean(values) for values in asr]
        low = [mean - min(values) for mean, values in zip(means, asr, strict=True)]
        high = [max(values) - mean for mean, values in zip(means, asr, strict=True)]
        axis.errorbar(ratios, means, yerr=[low, high], marker="o", label=printable(attack), color=colour, capsize=2)
    axis.set_xscale("symlog", linthresh=1e-3)
    axis.set(xlabel="poisoning ratio", ylabel="ASR %", ylim=(-3, 103))
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> int:
    """Draw the curve and print the table; exit status 2 for a user's mistake."""
    parser = Parser((__doc__ or "").split("\n\n")[0])
    parser.add_argument("records", type=Path, nargs="+", help="folders of results, or files of summaries")
    parser.add_argument("--out", type=Path, default=Path("ratios"), help="path of the PNG and the SVG [ratios]")
    asked = parser.parse_args()
    runs = read(*asked.records)
    if not runs:
        where = " or ".join(map(str, asked.records))
        raise RecordError(f"no <attack>_r<ratio>_s<seed>/summary.json in {where}; see docs/results/ratios.md")
    print(table(runs), end="")
    stem = asked.out.with_suffix("") if asked.out.suffix in (".png", ".svg") else asked.out
    print(*save(draw(runs), stem), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
