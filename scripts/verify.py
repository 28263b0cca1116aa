"""Whether result folders say the truth: files, settings, data, and figures measured again from the weights.

    python scripts/verify.py RECORD [RECORD ...] [--record_root ./record] [--dataset_path DIR]

RECORD is the folder of an attack, by name below the record root or by path; the defenses in it are verified too.
A figure holds if at most one picture in a thousand (and at least one) is answered otherwise here than was recorded.
Exit status: 0 everything was checked and holds, 1 something does not hold, 2 a mistake in the command, 3 nothing is
broken, but something could not be checked (without the data set there is no ACC; up to ten pictures in a thousand
between a card and a CPU are no proof; tracked risks, and what a method found on its way, are not measured again).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from script_parts import place
from script_parts.asking import Parser

from sau.errors import RecordError, printable, told
from sau.files import existing
from sau.verify.findings import BROKEN, PARTLY, VERIFIED
from sau.verify.verification import Verification

WORDS = {VERIFIED: "verified", BROKEN: "BROKEN", PARTLY: "holds as far as it could be checked"}


def main() -> int:
    """Verify every record that is named; the exit status is the worst of theirs."""
    parser = Parser(__doc__)
    parser.add_argument("record", nargs="+", help="folder of an attack")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [where the attack had them]")
    place.add_arguments(parser)
    asked = parser.parse_args()
    states = []
    where = place.settle(asked)
    paths = [existing(asked.record_root, name) for name in asked.record]
    if lost := [path for path in paths if not path.is_dir()]:  # a slip in one before any is measured
        raise RecordError(f"there is no folder {lost[0]}; name a result folder")
    for path in paths:
        found = Verification(path, asked.dataset_path, where).run()
        for finding in found.findings:
            print(printable(f"{finding.state:12}{finding.what}: {finding.text}"))
        print(f"{path}: {WORDS[found.findings.status]}", flush=True)
        states.append(found.findings.status)
    return BROKEN if BROKEN in states else max(states)


if __name__ == "__main__":
    sys.exit(told(main))
