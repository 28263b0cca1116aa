"""Compare the library's speed with that of the released order of work, in one process and on the same images.

    python scripts/bench.py {train,sau,eval,data,runs} [--width 64] [--batch_size 128] [--json out.json]

The released order is our own code in tests/released_sau.py and scripts/bench_parts/released.py: PIL images one at a
time, fp32, NCHW, everything evaluated after every epoch. Ratio = released / ours, so above 1 ours is faster; it is the
median over repetitions, with the least and the most.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))  # for released_sau
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import joblib
import torch
from bench_parts import parts
from bench_parts.setting import Setting

from sau.config import check, options
from sau.device import CPU_INFO
from sau.errors import run_command
from sau.files import write
from sau.tools import Parser, add_device, use_device

PARTS: dict[str, tuple[Callable[[Setting], parts.Rows], dict[str, int]]] = {  # with defaults other than Setting's
    "train": (parts.train, {}),
    "sau": (parts.sau, {"batch_size": 64, "steps": 1}),
    "eval": (parts.evaluation, {}),
    "data": (parts.data, {"steps": 2}),
    "runs": (parts.runs, {"width": 16, "images": 5120}),
}
USED = {
    "train": {"steps", "workers"}, "sau": {"steps", "train_updates", "purify_updates"}, "eval": {"images", "workers"},
    "data": {"steps", "workers"}, "runs": {"images", "epochs", "rounds", "workers"},
}  # fmt: skip


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":")[1].strip() for line in CPU_INFO.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command_line() -> argparse.ArgumentParser:
    """A subcommand a part, with the flags that it uses."""
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    for name, (function, defaults) in PARTS.items():
        about = (function.__doc__ or "").split("\n")[0]
        part = commands.add_parser(name, help=about, description=about)
        part.add_argument("--dataset", default="digits", choices=("digits", "cifar10"), help="images [digits]")
        part.add_argument("--dataset_path", default="./data", help="folder of the data sets [./data]")
        for option in options(Setting).values():
            if option.name in USED[name] | {"width", "batch_size", "repeats"}:
                default = defaults.get(option.name, option.default)
                part.add_argument(f"--{option.name}", type=int, default=default, help=f"{option.about} [{default}]")
        add_device(part)
        part.add_argument("--json", type=Path, help="file to write the rows to")
    return parser


def main() -> None:
    args = command_line().parse_args()
    device = use_device(args)
    given = {**vars(args), "device": device, "threads": torch.get_num_threads()}
    del given["part"], given["json"]
    setting = Setting(**given)
    check(setting)
    load_before = round(os.getloadavg()[0], 2)
    if load_before + setting.threads > joblib.cpu_count() + 0.5:
        print(f"warning: a load of {load_before} on {joblib.cpu_count()} cores; times will be long", file=sys.stderr)
    rows = PARTS[args.part][0](setting)
    print(f"\n{'':48}{'ratio':>8}{'min':>8}{'max':>8}{'ours':>12}{'released':>12}")
    for one in rows:
        numbers = f"{one['ratio']:8.2f}{one['low']:8.2f}{one['high']:8.2f}{one['ours']:12.4g}{one['reference']:12.4g}"
        print(f"{one['name']:48}{numbers} {one['unit']}")
    if args.json:
        machine = {"processor": processor(torch.device("cpu")), "cores": joblib.cpu_count(), "load_before": load_before}
        machine |= {"card": processor(device)} if device.type == "cuda" else {}
        del given["dataset_path"]
        used = {"part": args.part, "torch": torch.__version__, **machine, **given, "device": str(device)}
        found = {"setting": used, "rows": rows}
        write(args.json, (json.dumps(found, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(run_command(main))
