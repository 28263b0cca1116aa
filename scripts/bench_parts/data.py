"""The data path: batches of augmented training pictures, against PIL; and its share of a training step.

In the second row `ours` is that share in percent and `reference` the 3 percent that it may be.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_parts import pil, setting, train
from bench_parts.measure import Work, interleaved, row

from sau.data.sources import source

MAY_BE = 3.0  # percent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=64, batch_size=128, steps=2)
    setting.add_workers(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; returns the rows."""
    images, _ = setting.pictures(args)
    poisoned = setting.first(setting.ATTACK.poison_train(images, seed=0), args.steps * args.batch_size)
    model, origin, device = setting.network(args, images.num_classes), source(args.dataset), args.device
    resident = poisoned.to(device)
    batches = resident.batches(args.batch_size, seed=0, augment=origin.augment, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        files = pil.Files(poisoned, poisoned.labels, pil.transform(origin, True), Path(folder))
        loader = pil.loader(files, args.batch_size, train=True, workers=setting.workers(args), device=device)
        makers: dict[str, Callable[[], Work]] = {
            "ours": lambda: lambda: [None for _ in batches],
            "reference": lambda: lambda: [(x.to(device), y.to(device)) for x, y in loader],
            "step": lambda: train.ours(args, model, resident, amp=True),
        }
        for make in makers.values():
            make()()  # warms everything up
        seconds = interleaved(makers, args)
    shares = [100 * data / step for data, step in zip(seconds["ours"], seconds["step"], strict=True)]
    middle = statistics.median(shares)
    return [
        row("augmented pictures", seconds["ours"], seconds["reference"], "s/picture", len(poisoned)),
        {"name": f"share of a bf16 step, width {args.width}", "ratio": MAY_BE / middle, "ours": middle,
         "reference": MAY_BE, "unit": "%", "low": MAY_BE / max(shares), "high": MAY_BE / min(shares)},
    ]  # fmt: skip
