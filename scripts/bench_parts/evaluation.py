"""One evaluation, ACC, ASR and R-ACC: ours in bf16 and in fp32, against three passes over PIL pictures in fp32."""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench_parts import pil, profile, roofline, setting
from bench_parts.measure import Task, Work, compare

from sau.data.images import to_float
from sau.data.sources import source
from sau.evaluate import score


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=64, batch_size=128)
    setting.add_workers(parser)
    parser.add_argument("--pictures", type=int, default=500, help="clean test pictures [500]")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each does, returns the rows."""
    test = setting.first(setting.pictures(args)[1], args.pictures)
    triggered = setting.ATTACK.poison_test(test)
    model = setting.network(args, test.num_classes).eval()
    clean, stamped = test.to(args.device), triggered.to(args.device)

    def ours(amp: bool) -> Work:
        scored = setting.copied(model, amp=amp)
        return lambda: score(scored, clean, stamped)

    origin, workers = source(args.dataset), setting.workers(args)
    with tempfile.TemporaryDirectory() as folder:
        sets = pil.evaluations(test, triggered, origin, Path(folder), args.batch_size, workers, args.device)
        net = setting.as_released(model.net)
        makers: dict[str, Callable[[], Work]] = {
            "bf16": lambda: ours(True),
            "fp32": lambda: ours(False),
            "fp32 released": lambda: lambda: pil.evaluate(net, sets, args.device),
        }
        task = Task(len(test) + len(triggered), model, to_float(clean.pixels[:1]), 1.0, roofline.peaks(args))
        rows = compare(f"evaluation, width {args.width}", makers, task, args, "s")
    profile.add(rows[0], "bf16", ours(True), args.device)
    return rows
