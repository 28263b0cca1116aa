"""Compare the library's speed with that of the released order of work, in one process and on the same pictures.

    python scripts/bench.py {train,sau,eval,data,runs,growth,stacked} [--width 64] [--batch_size 64] [--json out.json]
    python scripts/bench.py attacks [--width 16] [--batch_size 128] [--repeats 5] [--json out.json]
    python scripts/bench.py defenses [--width 16] [--pictures 256] [--only sau,ft] [--repeats 5] [--json out.json]
    python scripts/bench.py risks RECORD DEFENSE [--samples 2500] [--repeats 3] [--json out.json]
    python scripts/bench.py all [--json out.json]

prints one row for each comparison. train, sau, eval, data, runs: ratio = released / ours, so above 1 means that ours is
faster. stacked: one batched call / two calls. growth: 1 is growth in proportion. attacks: updates as attack / BadNets,
and stamping as ten seconds / the time for 50,000 pictures. defenses: released / ours, FT / method. risks: four
minutes / seconds, and the least passes / those made. all: every part but stacked, and but risks, which needs a record.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # the reference is the twin of the tests
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import joblib
import torch
from bench_parts import attacks, data, defenses, evaluation, everything, growth, risks, runs, sau_step, stacked, train

from sau.command.arguments import Parser, add_device, use_device
from sau.errors import ConfigError, run_command
from sau.files import write
from sau.runtime.device import processor

PATHS = ("dataset_path", "json")  # where something lies on this machine says nothing about the figures
PARTS: dict[str, ModuleType] = {
    "train": train, "sau": sau_step, "defenses": defenses, "eval": evaluation, "data": data, "runs": runs,
    "growth": growth, "stacked": stacked, "attacks": attacks, "risks": risks, "all": everything,
}  # fmt: skip
LEAST = {"purify_updates": 0} | dict.fromkeys(
    ("repeats", "width", "batch_size", "steps", "pictures", "epochs", "rounds", "samples", "restarts", "train_updates"),
    1,
)


def command_line() -> argparse.ArgumentParser:
    """The flags: those of every part, and each part's own."""
    common, clock = (argparse.ArgumentParser(add_help=False) for _ in range(2))
    common.add_argument("--repeats", type=int, default=5, help="repetitions; their median is reported [5]")
    add_device(common)
    common.add_argument("--json", type=Path, help="file to write the rows to")
    clock.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: processor seconds [wall]")
    parser = Parser((__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="part", required=True)
    for name, part in PARTS.items():
        about = (part.__doc__ or "").split("\n")[0]
        parents = [common] if part is risks else [common, clock]  # the four minutes of the risks are wall minutes
        part.add_arguments(commands.add_parser(name, parents=parents, help=about, description=about))
    return parser


def main() -> int:
    """Run the part that the command line names, print its rows and write them where `--json` says; the exit status."""
    args = command_line().parse_args()
    for name, least in LEAST.items():
        if getattr(args, name, least) < least:
            raise ConfigError(f"--{name} is {getattr(args, name)}, allowed is {least} and more")
    args.device, args.threads = use_device(args), torch.get_num_threads()
    others = round(os.getloadavg()[0], 2)
    if others + args.threads > joblib.cpu_count() + 0.5:
        print(f"warning: a load of {others} on {joblib.cpu_count()} cores; times will be too long", file=sys.stderr)
    rows = PARTS[args.part].run(args)
    print(f"\n{'':40}{'ratio':>8}{'min':>8}{'max':>8}{'ours':>12}{'reference':>12}")
    for row in rows:
        numbers = f"{row['ratio']:8.2f}{row['low']:8.2f}{row['high']:8.2f}{row['ours']:12.4g}{row['reference']:12.4g}"
        print(f"{row['name']:40}{numbers} {row['unit']}")
    if args.json:
        machine = {"processor": processor(torch.device("cpu")), "cores": joblib.cpu_count(), "load_before": others}
        if args.device.type == "cuda":
            machine["card"] = processor(args.device)
        setting = {
            "torch": torch.__version__,
            **machine,
            **{k: _plain(v) for k, v in vars(args).items() if k not in PATHS},
        }
        write(args.json, (json.dumps({"setting": setting, "rows": rows}, indent=2) + "\n").encode())
    return 0


def _plain(value: object) -> object:
    return value if isinstance(value, int | float | str | None) else str(value)


if __name__ == "__main__":
    sys.exit(run_command(main))
