"""One update of SAU: ours in bf16 and in fp32, against the released order of work in fp32 and NCHW.

The network is first trained for a moment on pictures of which a fifth are stamped, and then purified for a moment, so
that h has left h_b as it has in most of a run. All see the same pictures and start from the same weights, but for
compiled variants, which go on from one repetition to the next, so that they are compiled once.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from typing import Any

from bench_parts import profile, roofline, setting
from bench_parts.measure import Task, Work, compare
from released_sau import ReleasedSAU
from torch import Tensor

from sau import perturb
from sau.defense import SAU
from sau.models import Normalized
from sau.runtime.graphs import MicroBatchedStep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=64, batch_size=64, steps=1)
    parser.add_argument("--train_updates", type=int, default=60, help="updates that plant the backdoor [60]")
    parser.add_argument("--purify_updates", type=int, default=3, help="updates of SAU before the comparison [3]")
    setting.add_compiled(parser)
    parser.add_argument("--whole_batch", default="false", choices=("true", "false"), help="also without compaction")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each variant does and needs and where our time goes, returns the rows."""
    images = setting.pictures(args)[0].to(args.device)
    h_b = setting.backdoored(args, images, args.train_updates, args.batch_size)
    stream = setting.endless(images, args.batch_size, seed=1)
    h = _purified(h_b, stream, args.purify_updates)
    batches = list(islice(stream, args.steps))
    makers: dict[str, Callable[[], Work]] = {
        "bf16": lambda: _ours(h, h_b, batches, amp=True),
        "fp32": lambda: _ours(h, h_b, batches, amp=False),
    }
    if args.whole_batch == "true":
        makers["bf16 whole batches"] = lambda: _whole(_ours(h, h_b, batches, amp=True))
    if args.compiled == "true":
        makers["bf16 compiled"] = cache(partial(_ours, h, h_b, batches, amp=True, compiled=True))
    makers["fp32 released"] = lambda: _reference(h, h_b, batches)
    needed = 4 * SAU.adv_steps + 7.0
    task = Task(args.steps * args.batch_size, h, batches[0][0], needed, roofline.peaks(args))
    rows = compare(f"SAU update, width {args.width}", makers, task, args, "s/update", args.steps)
    profile.add(rows[0], "bf16", _ours(h, h_b, batches, amp=True, captured=False), args.device)
    return rows


def _purified(h_b: Normalized, stream: Iterator[tuple[Tensor, Tensor]], updates: int) -> Normalized:
    method = SAU(lr=1e-3)
    state = method.prepare(copy.deepcopy(h_b), max(1, updates))
    for x, y in islice(stream, updates):
        method.step(state, x, y)
    state["model"].zero_grad(set_to_none=True)
    return state["model"]


def _ours(
    h: Normalized,
    h_b: Normalized,
    batches: list[tuple[Tensor, Tensor]],
    amp: bool,
    compiled: bool = False,
    captured: bool = True,
) -> Work:
    method = SAU()
    model, reference = (setting.copied(net, amp=amp, compiled=compiled, captured=captured) for net in (h, h_b))
    state = method.prepare(model, len(batches))
    state["reference"] = reference.eval().requires_grad_(False)
    step = MicroBatchedStep(
        method.step,
        state,
        setting.QUIET,
        supports_microbatch=method.supports_microbatch(),
        graph_safe=method.graph_safe,
    )
    if batches[0][0].is_cuda:
        step(*batches[0])  # so that it is captured
    return lambda: [step(x, y) for x, y in batches]


def _whole(work: Work) -> Work:
    """`work` with samples that stay in the batch when they are shared."""

    def whole() -> None:
        kept, perturb.BUCKET = perturb.BUCKET, 1 << 30
        work()
        perturb.BUCKET = kept

    return whole


def _reference(h: Normalized, h_b: Normalized, batches: list[tuple[Tensor, Tensor]]) -> Work:
    twin = ReleasedSAU(setting.as_released(h), setting.as_released(h_b))
    return lambda: [twin.step(x, y) for x, y in batches]
