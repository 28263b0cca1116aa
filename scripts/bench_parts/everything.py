"""Every part but the risks, one after the other, each with its own defaults."""

import argparse
from typing import Any

from bench_parts import attacks, data, defenses, evaluation, growth, runs, sau_step, setting, train

PARTS = {
    "data": data, "train": train, "eval": evaluation, "sau": sau_step, "runs": runs, "growth": growth,
    "attacks": attacks, "defenses": defenses,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_pictures(parser)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by their names with commas")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows, each with the name of its part."""
    rows = []
    for name in setting.among("--only", args.only, PARTS):
        print(f"\n{name}: {(PARTS[name].__doc__ or '').splitlines()[0]}")
        parser = argparse.ArgumentParser()
        PARTS[name].add_arguments(parser)
        own = parser.parse_args([])
        for key in ("dataset", "dataset_path", "repeats", "device", "clock", "threads"):
            setattr(own, key, getattr(args, key))
        rows += [{"part": name, **row} for row in PARTS[name].run(own)]
    return rows
