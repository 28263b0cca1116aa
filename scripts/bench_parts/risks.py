"""What the risks cost: seconds for all of them in one pass, and the forward passes a picture beside the least.

`seconds`: reference is four minutes, the time they may take. `passes`: reference counts only pictures whose witness is
still looked for; a batch is filled with others.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from bench_parts import setting

from sau.data.images import sample
from sau.models import Normalized
from sau.record import attack_result
from sau.risk import Found, measure
from sau.witness import Search

MAY_TAKE = 240.0  # seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    parser.add_argument("record", type=Path, help="result folder of an attack")
    parser.add_argument("defense", help="defense in it whose network is measured")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    parser.add_argument("--samples", type=int, default=2500, help="test pictures [2500]")
    parser.add_argument("--steps", type=int, default=20, help="steps of each search [20]")
    parser.add_argument("--restarts", type=int, default=2, help="searches from random places [2]")
    parser.add_argument("--eps", type=float, default=0.2, help="L-infinity radius [0.2]")
    setting.add_amp(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure `repeats` times; prints the risks, returns the rows."""
    attacked = attack_result.load(args.record)
    _, test, _ = attacked.pictures(args.dataset_path)
    clean, triggered = sample(
        test.to(args.device), attacked.triggered and attacked.triggered.to(args.device), args.samples
    )
    model, reference = (_network(attacked, args) for _ in range(2))
    attack_result.load_weights(model, args.record / "defense" / args.defense)
    search = Search(eps=args.eps, steps=args.steps, restarts=args.restarts)
    seconds, found = [], None
    for _ in range(args.repeats):
        begun = time.monotonic()
        found = measure(model, reference, clean, triggered, search)
        seconds.append(time.monotonic() - begun)
    assert isinstance(found, Found)
    print(found.row(), f"{len(clean)} pictures, {sum(p.numel() for p in model.parameters()):,} weights")
    args.record = args.record.name
    took = sorted(seconds)[len(seconds) // 2]
    spare = found.least / found.passes
    return [
        {"name": "seconds", "ratio": MAY_TAKE / took, "low": MAY_TAKE / max(seconds), "high": MAY_TAKE / min(seconds),
         "ours": took, "reference": MAY_TAKE, "unit": "s"},
        {"name": "passes", "ratio": spare, "low": spare, "high": spare,
         "ours": found.passes, "reference": found.least, "unit": "passes a picture of D'"},
    ]  # fmt: skip


def _network(attacked: attack_result.AttackResult, args: argparse.Namespace) -> Normalized:
    model = attacked.model().to(args.device)
    model.amp = setting.amp(args)
    return model
