"""Faults by the thousand: what survives, in a table.

    python scripts/torture.py [PART ...] [--seed 0] [--share 1.0] [--out torture.json]

Parts: mutations (R1), kills (R2), disks (R4), races (R5), names (P1), repeats (G2), leaks (E2). Without a part all of
them. `--share 0.1` injects a tenth of the faults. Everything happens on 300 of scikit-learn's digits with a network of
width 4 on one CPU thread, in a temporary folder. Exit status 1 if anything did not survive.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from script_parts.asking import Parser
from torture_parts import faults, races, runs
from torture_parts.common import Row, shrink

from sau.errors import told
from sau.files import write

PARTS: dict[str, Callable[[Path, int, float], Iterable[Row]]] = {
    "mutations": faults.mutations,
    "disks": faults.disks,
    "names": faults.names,
    "races": races.races,
    "repeats": runs.repeats,
    "leaks": runs.leaks,
    "kills": runs.kills,
}


def main() -> int:
    """Run the parts and print a row for each promise."""
    parser = Parser(__doc__)
    parser.add_argument("part", nargs="*", help="what to run [all]")
    parser.add_argument("--seed", type=int, default=0, help="of every draw of a fault [0]")
    parser.add_argument("--share", type=float, default=1.0, help="share of the faults to inject [1.0]")
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file, too")
    asked = parser.parse_args()
    unknown = [part for part in asked.part if part not in PARTS]
    if unknown or not 0 < asked.share <= 1:
        print(f"error: parts are {', '.join(PARTS)}, share is above 0 and up to 1", file=sys.stderr)
        return 2
    if asked.out is not None and asked.out.is_dir():
        print(f"error: --out {asked.out} is a folder; name a file", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    shrink()
    rows: list[Row] = []
    print("| row | fault | injected | survived | figures | seconds |\n|---|---|---|---|---|---|")
    for part in asked.part or PARTS:
        with tempfile.TemporaryDirectory(prefix="torture-") as folder:
            started = time.monotonic()
            for row in PARTS[part](Path(folder), asked.seed, asked.share):
                seconds = time.monotonic() - started
                started = time.monotonic()
                cells = (row.row, row.fault, f"{row.injected:,}", f"{row.survived:,}", row.figures, f"{seconds:.0f}")
                print(f"| {' | '.join(cells)} |", flush=True)
                rows.append(row)
    if asked.out is not None:
        write(asked.out, (json.dumps([vars(row) for row in rows], indent=2) + "\n").encode())
    return int(any(row.survived < row.injected for row in rows))


if __name__ == "__main__":
    sys.exit(told(main))
