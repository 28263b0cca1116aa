"""Training of the victim: ours in bf16 and in fp32, against one PIL picture at a time in fp32 and NCHW.

Both go through the same pictures, a tenth of them with BadNets' patch, from the same weights. Compiled networks go on
from one repetition to the next, so that they are compiled once.
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from bench_parts import pil, profile, roofline, setting
from bench_parts.measure import Task, Work, compare, forward_flops

from sau.data.images import Images, to_float
from sau.data.sources import source
from sau.models import Normalized
from sau.optim import Training
from sau.runtime.graphs import MicroBatchedStep

RECIPE = Training(lr_scheduler="constant")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=64, batch_size=128, steps=10)
    setting.add_workers(parser)
    setting.add_compiled(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each does and where our time goes, returns the rows."""
    train, _ = setting.pictures(args)
    poisoned = setting.first(setting.ATTACK.poison_train(train, seed=0), args.steps * args.batch_size)
    model = setting.network(args, train.num_classes)
    images = poisoned.to(args.device)
    with tempfile.TemporaryDirectory() as folder:
        made = partial(ours, args=args, model=model, images=images)
        makers: dict[str, Callable[[], Work]] = {"bf16": partial(made, amp=True), "fp32": partial(made, amp=False)}
        if args.compiled == "true":
            makers["bf16 compiled"] = cache(partial(made, amp=True, compiled=True))
        makers["fp32 released"] = partial(released, args, model, _loader(args, poisoned, Path(folder)))
        task = Task(len(images), model, to_float(images.pixels[:1]), _needed(model, images), roofline.peaks(args))
        rows = compare(f"training step, width {args.width}", makers, task, args, "s/step", args.steps)
    for row, name in zip(rows[:2], ("bf16", "fp32"), strict=True):
        profile.add(row, name, made(amp=name == "bf16", captured=False), args.device)
    return rows


def ours(
    args: argparse.Namespace,
    model: Normalized,
    images: Images,
    amp: bool,
    compiled: bool = False,
    captured: bool = True,
) -> Callable[[], None]:
    """An epoch as `Attack.fit` makes it."""
    victim = setting.copied(model, amp=amp, compiled=compiled, captured=captured).train()
    state = setting.ATTACK.prepare(victim, RECIPE, args.steps)
    step = MicroBatchedStep(setting.ATTACK.step, state, setting.QUIET, supports_microbatch=True, graph_safe=True)
    batches = images.batches(args.batch_size, seed=0, augment=source(args.dataset).augment, drop_last=True)

    def work() -> None:
        for x, y, *_ in batches:
            step(x, y)

    if args.device.type == "cuda":
        work()  # so that what can be captured is
    return work


def released(args: argparse.Namespace, model: Normalized, batches: pil.Batches) -> Callable[[], float]:
    """An epoch in the released order; the loader and its processes are the same in all repetitions."""
    net = setting.as_released(model.net)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return lambda: pil.train_epoch(net, sgd, batches, args.device)


def _loader(args: argparse.Namespace, images: Images, folder: Path) -> pil.Batches:
    files = pil.Files(images, images.labels, pil.transform(source(args.dataset), True), folder)
    return pil.loader(files, args.batch_size, train=True, workers=setting.workers(args), device=args.device)


def _needed(model: Normalized, images: Images) -> float:
    """Passes that a step needs: three, but for the gradient with respect to the pictures, which nobody asks for."""
    x = to_float(images.pixels[:1])
    stem = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    return 3.0 - forward_flops(stem, x) / forward_flops(model, x)
