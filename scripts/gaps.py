"""How far the adversarial and the shared adversarial risk lie above the backdoor risk, as a table.

    python scripts/gaps.py RECORD [RECORD ...]

For every defense of the records that ran with --track_risk: the mean of R_adv - R_bd, of R_share - R_bd and of the same
with what SAU's own search finds, over the rounds that were evaluated, least and most in brackets; and each for the
purified network, with Newcombe's 95 % interval (from two Wilson intervals; wide, for the risks share their pictures).
"""

import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.command.arguments import Parser
from sau.errors import RecordError, run_command
from sau.formatting import markdown, marked
from sau.record.folder import METRICS, Record
from sau.report import parse

GAPS = {"r_adv": "R_adv - R_bd", "r_share": "R_share - R_bd", "r_share_sau": "R_share - R_bd, SAU's search"}


def newcombe(risk: dict, name: str) -> tuple[float, float, float]:
    """The difference of two shares in percent, and its interval (Newcombe 1998, method 10)."""
    (low, high), (floor, roof) = risk[f"{name}_interval"], risk["r_bd_interval"]
    gap = risk[name] - risk["r_bd"]
    below = math.hypot(risk[name] - low, roof - risk["r_bd"])
    above = math.hypot(high - risk[name], risk["r_bd"] - floor)
    return gap, gap - below, gap + above


def line(record: Record) -> list[str]:
    """A row of the table."""
    summary, rows = record.summary(), parse.last_stage(parse.rows(record.path / METRICS))
    risk, name = summary["risk"]["after"], marked(record.path.name, summary.get("selection"))
    tracked = [row for row in rows if "r_bd" in row]
    cells = [record.path.parents[1].name, name, str(len(tracked)), f"{risk['r_bd']:.1f}"]
    for key in GAPS:
        gaps = [row[key] - row["r_bd"] for row in tracked]
        after, low, high = newcombe(risk, key)
        cells.append(f"{statistics.mean(gaps):.1f} ({min(gaps):.1f}..{max(gaps):.1f})")
        cells.append(f"{after:.1f} [{low:.1f}, {high:.1f}]")
    return cells


def main() -> int:
    """Print the table; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD", help="result folder of an attack")
    lines = []
    for path in parser.parse_args().records:
        if not path.is_dir():
            raise RecordError(f"there is no folder {path}; give result folders of attacks")
        for manifest in sorted(path.glob("defense/*/manifest.json")):
            record = Record(manifest.parent)
            record.check()
            if "r_bd" in record.summary().get("risk", {}).get("after", {}):
                lines.append(line(record))
    if not lines:
        raise RecordError("none of these folders has a defense with risks; run one with --track_risk true")
    heads = [f"{gap}{part}" for gap in GAPS.values() for part in (", mean of rounds", ", purified")]
    print(markdown(["attack", "defense", "rounds", "R_bd %", *heads], lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
