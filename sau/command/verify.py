"""Whether result folders are whole, and whether their figures come out again when the stored weights are scored.

    sau verify RECORD [RECORD ...] [--record_root ./record] [--dataset_path DIR]

RECORD is the folder of an attack, by name below the record root or by path; the defenses in it are verified too.
Compared are the sums of the manifest, and ACC, ASR, R-ACC and DER. A figure is right if the prediction of at most one
image in a thousand (and at least one) differs from the recorded count.
Exit status: 0 everything is right, 1 something is wrong or could not be checked, 2 a mistake in the command.
"""

from collections.abc import Sequence

from sau.command.arguments import Parser, add_device, use_device
from sau.errors import RecordError, printable
from sau.files import existing
from sau.verify import verify


def main(argv: Sequence[str]) -> int:
    """Verify every record that is named."""
    parser = Parser(__doc__, prog="sau verify")
    parser.add_argument("record", nargs="+", help="folder of an attack")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [where the attack found them]")
    add_device(parser)
    asked = parser.parse_args(argv)
    device = use_device(asked)
    paths = [existing(asked.record_root, name) for name in asked.record]
    if missing := [path for path in paths if not path.is_dir()]:  # before the first is scored
        raise RecordError(f"there is no folder {missing[0]}; name a result folder")
    states = set[str]()
    for path in paths:
        checks = verify(path, asked.dataset_path, device)
        for check in checks:
            print(printable(f"{check.state:12}{check.name}: {check.text}"))
        found = {check.state for check in checks}
        state = "WRONG" if "wrong" in found else "not all could be checked" if "not checked" in found else "verified"
        print(f"{path}: {state}", flush=True)
        states |= found
    return int(states != {"ok"})
