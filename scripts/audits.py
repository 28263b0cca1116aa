"""Several audits as one: means and standard deviations over records and seeds, as tables and as a figure.

    python scripts/audits.py AUDIT [AUDIT ...] --out STEM

AUDIT is a folder that scripts/audit.py wrote, a record with an `audit/` in it, or FILE.jsonl/NAME, the line of that
name in a file of audits; all must be of the same attack.
STEM.png and STEM.svg are the figure, STEM.md the tables, which are also printed.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sau.command.drawing  # noqa: F401  before sau.figures
from sau.audit import carry, tables
from sau.audit.carry import RESULT
from sau.command.arguments import Parser
from sau.errors import RecordError, run_command
from sau.figures import audit, save
from sau.files import write
from sau.record.schema import difference

ROW = {"part", "curve", "network", "x"}  # what every row of a result has


def read(place: Path) -> dict[str, Any]:
    """The result of one audit; RecordError if there is none."""
    file = next((file for file in (place / RESULT, place / "audit" / RESULT) if file.is_file()), place / RESULT)
    try:
        found = carry.read_line(place.parent, place.name) if place.parent.is_file() else carry.read(file)
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {file}: {error}; make it with scripts/audit.py") from None
    rows = found.get("rows")
    whole = all(isinstance(found.get(part), dict) for part in ("asked", "about", "networks"))
    if not whole or not isinstance(rows, list) or not all(isinstance(row, dict) and ROW <= row.keys() for row in rows):
        raise RecordError(f"{file} is no result of scripts/audit.py; make it with that")
    return found


def _known(audit: dict[str, Any]) -> dict[str, Any]:
    """What must be alike: what the audit was asked, and what its attack was, which has epochs too."""
    return {f"{part}.{name}": value for part in ("asked", "about") for name, value in audit[part].items()}


def run(given: argparse.Namespace) -> None:
    """Read, compare, draw, print."""
    audits = [read(place) for place in given.audit]
    first = audits[0]
    for place, one in zip(given.audit, audits, strict=True):
        unlike = difference(_known(first), _known(one))
        if unlike:
            raise RecordError(f"{place} and {given.audit[0]} are not alike: {unlike}")
        if one["networks"].keys() != first["networks"].keys():
            both = ", ".join(sorted(one["networks"].keys() ^ first["networks"].keys()))
            raise RecordError(f"of {place} and {given.audit[0]} only one has {both}; audit the same networks in both")
    attacked = [one["networks"]["none"] for one in audits]
    if len(set(attacked)) < len(attacked):
        raise RecordError("two of the audits are of the same network; give each once")
    text = tables(audits)
    print(text)
    write(given.out.with_name(f"{given.out.name}.md"), f"{text}\n".encode())
    print(*save(audit(audits), given.out), sep="\n")


def main() -> int:
    """Compare; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("audit", nargs="+", type=Path, help="folders of audits")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without an ending")
    run(parser.parse_args())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
