"""Mean and standard deviation over seeds of the records below a folder, as a Markdown table.

    python scripts/seeds.py RECORDS

Result folders that hold summaries alone are named <attack>_s<seed> and <attack>_s<seed>/defense/<name>; those that a
grid published <attack>_r<ratio>_<digest>_s<seed> and, in them, defense/<name>_c<share>_<digest>.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.command.arguments import Parser
from sau.errors import run_command
from sau.formatting import markdown
from sau.report.parse import PERCENT
from sau.report.read import NONE, read
from sau.report.spread import spread
from sau.report.table import Cell, sections

FIGURES = (*PERCENT, "lost", "seconds")


def table(cells: list[Cell]) -> str:
    """Markdown; three values and more have a mean and a standard deviation."""
    body = []
    for cell in cells:
        spreads = {**cell.figures, "lost": spread([run.lost for run in cell.good])}
        found = [(spreads[name], 0 if name == "seconds" else 2) for name in FIGURES]
        texts = [one.text(digits) if one else "-" for one, digits in found]
        body.append([cell.attack_name, cell.name, str(len(cell.good)), *texts])
    heads = ("attack", "defense", "seeds", "ACC %", "ASR %", "R-ACC %", "DER %", "ACC lost", "seconds")
    return markdown(heads, body)


def main() -> int:
    """Print a table for each data set and network; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("records", type=Path, help="folder that holds the result folders, like ./record")
    found = sections(read(parser.parse_args().records)[0])
    for section in found:
        cells = sorted(
            section.cells, key=lambda cell: (cell.attack, cell.attack_variant, cell.defense != NONE, cell.defense)
        )
        if len(found) > 1:
            print(f"\n{section.title}\n")
        print(table([cell for cell in cells if cell.good]), end="")
        print(f"\n{section.dead}\n" * bool(section.dead), end="")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
