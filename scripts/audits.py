"""Several audits as one: means and standard deviations over records and seeds, as tables and as a figure.

    python scripts/audits.py AUDIT [AUDIT ...] --out STEM

AUDIT is a folder that scripts/audit.py wrote, a record with an `audit/` in it, or FILE.jsonl/NAME, the line of that
name in a file of audits; all must be of the same attack.
STEM.png and STEM.svg are the figure, STEM.md the tables, which are also printed.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.audit import draw, read, tables
from sau.errors import RecordError, run_command
from sau.figures import save
from sau.files import write
from sau.tools import Parser


def comparable(found: dict[str, Any]) -> dict[str, Any]:
    """What must be alike: the settings of the audit, those of the attack, and the networks' names."""
    known = {f"{part}.{name}": value for part in ("asked", "about") for name, value in found[part].items()}
    return {**known, "networks": sorted(found["networks"])}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("audit", nargs="+", type=Path, help="folders of audits")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without an ending")
    given = parser.parse_args()
    audits = [read(place) for place in given.audit]
    first = comparable(audits[0])
    for place, other in zip(given.audit, map(comparable, audits), strict=True):
        if unlike := sorted(key for key in {**first, **other} if first.get(key) != other.get(key)):
            raise RecordError(f"{place} and {given.audit[0]} are not alike: they differ in {', '.join(unlike)}")
    if len({one["networks"]["none"] for one in audits}) < len(audits):
        raise RecordError("two of the audits are of the same network; give each once")
    text = tables(audits)
    print(text)
    write(given.out.with_name(f"{given.out.name}.md"), f"{text}\n".encode())
    print(*save(draw(audits), given.out), sep="\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
