"""What it takes to bring the backdoor back into purified networks: curves of ASR against what the attacker spent.

    python scripts/audit.py --result_file NAME --defense sau ft d3 --control CLEAN

audits the attacked network itself, those of the defenses, and the control, a network that was trained without a
backdoor (a record of attack/prototype.py): without it the curves mean little. docs/audit.md says what each part does.
Several records are audited one after the other, each with its own control: of a grid, with --record_root its folder,
`--result_file badnet_s0 badnet_s1 --control prototype_s0 prototype_s1`.
Results go to `audit/` in the record: audit.json, audit.png, audit.svg.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.audit import PARTS, AuditConfig, draw, open_case, read, run_audit, tables
from sau.audit.runner import RESULT, described
from sau.config import Setting, options, values, written
from sau.errors import ConfigError, run_command
from sau.figures import save
from sau.files import safe_join, write
from sau.grid.store import find
from sau.tools import Parser, add_device, use_device

say = partial(print, flush=True)
CONFIG = options(AuditConfig)


def parser() -> argparse.ArgumentParser:
    flags = Parser(__doc__)
    add = flags.add_argument
    add("--result_file", required=True, nargs="+", help="attacks: folders or names below --record_root, like badnet_s0")
    add("--defense", action="extend", nargs="+", default=[], help="defenses in it, by name or by folder")
    add("--control", nargs="+", help="a network without a backdoor, or one for each attack, on the same images [none]")
    for name, option in CONFIG.items():
        default = "all that there is material for" if name == "parts" else written(option.default)
        add(f"--{name}", help=f"{option.help} [{default}]")
    add("--samples", type=int, default=2500, help="test images that figures come from [2500]")
    add("--amp", choices=("true", "false"), help="bf16 or fp32 [as the attack ran]")
    add("--out", type=Path, help="folder of the results, of one attack [audit/ in the record]")
    add("--record_root", default="./record", help="folder of the result folders, or of a grid [./record]")
    add("--dataset_path", help="folder of the data sets [where the attack had them]")
    add_device(flags)
    return flags


def run(given: argparse.Namespace) -> None:
    """Audit one attack after the other: draw, and print the tables."""
    device, count = use_device(given), len(given.result_file)
    controls = given.control or [None]
    controls = controls * count if len(controls) == 1 else controls
    if len(controls) != count:
        raise ConfigError(f"there are {len(controls)} of --control; allowed is one, or one for each attack")
    if given.out and count > 1:
        raise ConfigError(f"--out is for one attack, there are {count}; leave it out")
    settings = {name: Setting(getattr(given, name), f"--{name}") for name in CONFIG if getattr(given, name) is not None}
    chosen = values(settings, CONFIG)
    if "parts" not in chosen and given.control is None:
        say("note: --control is missing, so bec is left out and there is nothing to compare with")
        chosen["parts"] = tuple(part for part in PARTS if part != "bec")
    config = AuditConfig(**chosen)
    records = [find(given.record_root, name) for name in given.result_file]
    for attacked, control in zip(records, controls, strict=True):
        case = open_case(
            attacked, given.defense, control and find(given.record_root, control), dataset_path=given.dataset_path,
            samples=given.samples, amp=None if given.amp is None else given.amp == "true", device=device,
        )  # fmt: skip
        out = given.out or safe_join(attacked, "audit")  # which is no link in a record of others
        if (out / RESULT).exists():
            if not described(case, config).items() <= read(out).items():
                raise ConfigError(f"{out / RESULT} is another audit; remove it, or name another folder with --out")
            say(f"{out / RESULT} is this audit, finished")
            continue
        found = run_audit(case, config, say)
        say("\n" + tables([found]) + "\n")
        say(", ".join(f"{part} {seconds:.0f} s" for part, seconds in found["seconds"].items()))
        say(*save(draw([found]), out / "audit"), out / RESULT, sep="\n")
        write(out / RESULT, (json.dumps(found, indent=1) + "\n").encode())  # last, for it says that all is there


if __name__ == "__main__":
    sys.exit(run_command(lambda: run(parser().parse_args())))
