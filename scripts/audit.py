"""What it takes to bring the backdoor back into purified networks: curves of ASR against what the attacker spent.

    python scripts/audit.py --result_file NAME --defense sau ft d3 --control CLEAN [--control_defense sau]

audits the attacked network itself, those of the defenses, and the control, a network that was trained without a
backdoor (a record of attack/prototype.py): without it the curves mean little. docs/audit.md says what each part does.
Results go to `audit/` in the record: audit.json, audit.png, audit.svg, and a file for each finished piece, so that an
interrupted audit goes on when its command is repeated, and one that is asked more does only what is new.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sau.command.drawing  # noqa: F401  before sau.figures
from sau.audit import PARTS, Asked, Plan, carry_out, open_case, tables
from sau.audit.relearn import most_shots
from sau.command.arguments import Parser, add_device, use_device
from sau.config import options
from sau.errors import run_command
from sau.figures import audit, save
from sau.files import existing, safe_join
from sau.flags import Setting, values

say = partial(print, flush=True)


ASKED = options(Asked)


def parser() -> argparse.ArgumentParser:
    """The flags."""
    asked = Parser(__doc__)
    add = asked.add_argument
    add("--result_file", required=True, help="result folder of an attack: a name below the record root, or a path")
    add("--defense", action="extend", nargs="+", default=[], help="defenses in it, by name or by folder")
    add("--control", help="result folder of a network without a backdoor, on the same pictures [none]")
    add("--control_defense", action="extend", nargs="+", default=[], help="defenses in the control's folder")
    for name, option in ASKED.items():
        shown = ",".join(map(str, option.default)) if isinstance(option.default, tuple) else option.default
        add(f"--{name}", help=f"{option.help} [{'all that there is material for' if name == 'parts' else shown}]")
    add("--samples", type=int, default=2500, help="test pictures that figures come from [2500]")
    add("--amp", choices=("true", "false"), help="bf16 or fp32 [as the attack ran]")
    add("--out", type=Path, help="folder of the results [audit/ in the record]")
    add("--record_root", default="./record", help="folder of the result folders [./record]")
    add("--dataset_path", help="folder of the data sets [where the attack had them]")
    add_device(asked)
    return asked


def run(given: argparse.Namespace) -> None:
    """Open, audit, draw, and print the tables."""
    where = use_device(given)
    said = {name: Setting(getattr(given, name), f"--{name}") for name in ASKED if getattr(given, name) is not None}
    chosen = values(said, ASKED)
    if "parts" not in chosen and given.control is None:
        say("note: there is no --control, so that nothing tells what is the backdoor's; and no bec, which needs one")
        chosen["parts"] = tuple(part for part in PARTS if part != "bec")
    asked = Asked(**chosen)
    for name in sorted(asked.idle().keys() & chosen.keys()):
        say(f"note: --{name} has no effect: {asked.idle()[name]}")
    attacked = existing(given.record_root, given.result_file)
    case = open_case(
        attacked,
        given.defense,
        existing(given.record_root, given.control) if given.control else None,
        given.control_defense,
        dataset_path=given.dataset_path,
        samples=given.samples,
        amp=None if given.amp is None else given.amp == "true",
        where=where,
    )
    if "shots" not in chosen and "relearn" in asked.parts:
        most = most_shots(case.train, case.poisons, asked.share)
        few = tuple(shots for shots in asked.shots if shots <= most) or (most,)
        if few != asked.shots:
            say(f"note: the attacker has {most} poisoned pictures at most, so --shots is {','.join(map(str, few))}")
            asked = replace(asked, shots=few)
    out = given.out or safe_join(attacked, "audit", "pieces").parent  # which are no links in a record of others
    found = carry_out(Plan(case, asked), out, say)
    say("\n" + tables([found]) + "\n")
    say(", ".join(f"{part} {seconds:.0f} s" for part, seconds in found["seconds"].items()))
    say(*save(audit([found]), out / "audit"), out / "audit.json", sep="\n")


def main() -> None:
    """Audit the networks that the command line names."""
    run(parser().parse_args())


if __name__ == "__main__":
    sys.exit(run_command(main))
