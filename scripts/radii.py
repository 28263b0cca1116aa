"""The risks of a record's networks against the radius of the ball, as a table.

    python scripts/radii.py RECORD [DEFENSE ...] [--record_root ./record] [--radii 0.001 0.004]

for the attacked network and for the purified ones of the defenses named, on the same test pictures.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.command.arguments import Parser, add_device, use_device
from sau.errors import require, run_command
from sau.files import existing, safe_join
from sau.record import attack_result
from sau.risk import gauge
from sau.witness import Search

COLUMNS = {
    "r_adv": "R_adv",
    "r_share": "R_share",
    "r_share_sau": "R_share, SAU's search",
    "type1": "type I",
    "r_bd": "R_bd",
}


def main() -> int:
    """Print the table; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("record", help="result folder of an attack, a name below the record root or a path")
    parser.add_argument("defenses", nargs="*", help="defenses of the record")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    parser.add_argument("--radii", type=float, nargs="+", default=[0.001, 0.004, 0.016, 0.2], help="L-infinity radii")
    parser.add_argument("--samples", type=int, default=250, help="test pictures [250]")
    parser.add_argument("--steps", type=int, default=10, help="gradient steps of each search, from one place [10]")
    add_device(parser)
    asked = parser.parse_args()
    where = use_device(asked)
    require("--samples", asked.samples, asked.samples >= 1, "1 and more")
    searches = [Search(eps=eps, steps=asked.steps, restarts=1) for eps in asked.radii]
    attacked = attack_result.load(existing(asked.record_root, asked.record))
    networks = {"attacked": attacked.model()}
    for name in asked.defenses:
        networks[name] = attacked.model()
        attack_result.load_weights(networks[name], safe_join(attacked.path, "defense", name))
    _, test, _ = attacked.pictures(asked.dataset_path)
    test, triggered = test.to(where), attacked.triggered and attacked.triggered.to(where)
    reference = attacked.model().to(where)
    print(f"| network | radius | {' | '.join(COLUMNS.values())} |\n|---|---|{'---|' * len(COLUMNS)}")
    for name, model in networks.items():
        for search in searches:
            row = gauge(reference, test, triggered, asked.samples, search, 0)(model.to(where)).row()
            cells = [f"{row[column]:.1f}" if column in row else "-" for column in COLUMNS]
            print(f"| {name} | {search.eps:g} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
