"""How cost grows: one thing is doubled twice, and the time is compared with what the smallest one foretells.

`reference` is the time of the smallest one times the growth of the work (the operations of its convolutions), `ours`
the time of the largest: 1 is growth in proportion, above 1 is less.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from bench_parts import setting
from bench_parts.measure import Work, flops, interleaved, peak_mb, row

from sau.data.images import Images
from sau.data.sources import source
from sau.defense import SAU
from sau.optim import Training

SIZES = (1, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=16, batch_size=64)
    setting.add_amp(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure; prints every point, returns the rows."""
    train, _ = setting.pictures(args)
    unit = 2 * args.batch_size
    sau = partial(_sau, args, train)
    width = max(1, args.width // 2)
    axes: dict[str, dict[int, Callable[[], Work]]] = {
        "training: pictures": {n * unit: partial(_training, args, train, n * unit) for n in SIZES},
        "training: epochs": {n: partial(_training, args, train, unit, epochs=n) for n in SIZES},
        "training: width": {n * width: partial(_training, args, train, unit, width=n * width) for n in SIZES},
        "SAU: clean pictures": {n * unit: partial(sau, n * unit) for n in SIZES},
        "SAU: rounds": {n: partial(sau, unit, rounds=n) for n in SIZES},
        "SAU: steps of the search": {n: partial(sau, unit, adv_steps=n) for n in SIZES},
        "SAU: width": {n * width: partial(sau, unit, width=n * width) for n in SIZES},
        "SAU: classes": {10 * n: partial(sau, unit, classes=10 * n) for n in SIZES},
    }
    return [_grown(name, points, args) for name, points in axes.items()]


def _grown(name: str, points: dict[int, Callable[[], Work]], args: argparse.Namespace) -> dict[str, Any]:
    work = {size: flops(make()) for size, make in points.items()}  # these runs also warm everything up
    memory = {size: peak_mb(make(), args.device) for size, make in points.items()}
    seconds = interleaved({str(size): make for size, make in points.items()}, args)
    for size in points:
        print(
            f"{name:26}{size:8}{work[size] / min(work.values()):8.2f} x the work"
            f"{statistics.median(seconds[str(size)]):10.3f} s{memory[size]:10.1f} MB at most"
        )
    least, most = min(points), max(points)
    foretold = [took * work[most] / work[least] for took in seconds[str(least)]]
    found = row(f"{name} {least} to {most}", seconds[str(most)], foretold, "s")
    points_found = [
        {"size": size, "work": work[size] / work[least], "seconds": statistics.median(seconds[str(size)]),
         "peak_mb": memory[size]} for size in points
    ]  # fmt: skip
    return {**found, "points": points_found}


def _training(
    args: argparse.Namespace, images: Images, count: int, epochs: int = 1, width: int | None = None
) -> Callable[[], object]:
    model = setting.network(args, images.num_classes, width, setting.amp(args))
    some = setting.first(images, count).to(args.device)
    recipe = Training(epochs=epochs, batch_size=args.batch_size)
    augment = source(args.dataset).augment
    return lambda: setting.ATTACK.fit(model, some, recipe, augment=augment, session=setting.QUIET)


def _sau(
    args: argparse.Namespace, images: Images, count: int, rounds: int = 1, adv_steps: int = 5, width: int | None = None,
    classes: int = 10,
) -> Callable[[], object]:  # fmt: skip
    model = setting.network(args, classes, width, setting.amp(args)).eval()
    clean = setting.first(images, count).to(args.device)
    # Without a stop for shared samples the work does not depend on what the search finds.
    method = SAU(epochs=rounds, batch_size=args.batch_size, adv_steps=adv_steps, stop_fooled=False)
    return lambda: method.purify(model, clean, session=setting.QUIET)
