"""Several audits as one: means and standard deviations over records and seeds, as tables and as a figure.

    python scripts/audits.py AUDIT [AUDIT ...] --out STEM

AUDIT is a folder that scripts/audit.py wrote, or a record with an `audit/` in it; all must be of the same attack.
STEM.png and STEM.svg are the figure, STEM.md the tables, which are also printed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    import matplotlib
except ModuleNotFoundError:
    print("error: drawing needs matplotlib: pip install 'sau[report]'", file=sys.stderr)
    sys.exit(2)

matplotlib.use("Agg")

from sau.audit import tables
from sau.audit.carry import RESULT
from sau.errors import RecordError, SauError
from sau.figures import audit, save
from sau.files import write


def read(place: Path) -> dict[str, Any]:
    """The result of one audit; RecordError if there is none."""
    file = next((file for file in (place / RESULT, place / "audit" / RESULT) if file.is_file()), place / RESULT)
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        if not all(key in found for key in ("attack", "rows", "asked")):
            raise ValueError("it is another kind of file")
    except (OSError, ValueError) as error:
        raise RecordError(f"cannot read {file}: {error}; make it with scripts/audit.py") from None
    return found


def run(given: argparse.Namespace) -> None:
    """Read, compare, draw, print."""
    audits = [read(place) for place in given.audit]
    first = audits[0]
    for place, one in zip(given.audit, audits, strict=True):
        if (one["attack"], one["asked"]) != (first["attack"], first["asked"]):
            raise RecordError(f"{place} audits another attack than {given.audit[0]}, or was asked something else")
    text = tables(audits)
    print(text)
    write(given.out.with_suffix(".md"), f"{text}\n".encode())
    print(*save(audit(audits), given.out), sep="\n")


def main() -> int:
    """Exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audit", nargs="+", type=Path, help="folders of audits")
    parser.add_argument("--out", type=Path, required=True, help="path of the results without an ending")
    try:
        run(parser.parse_args())
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
