"""A step of SAU's search through both networks: two calls, which is what ours does, against one batched call.

`ours` are two calls, `reference` is `torch.func.stack_module_state` under vmap: above 1 two calls are faster.
"""

import argparse
import copy
from typing import Any

import torch
from bench_parts import setting
from bench_parts.measure import Work, interleaved, row
from torch import Tensor
from torch.func import functional_call, stack_module_state

from sau.data.images import to_float
from sau.defense.sau import jensen_shannon


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=16, batch_size=64)
    setting.add_amp(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; returns the row."""
    images = setting.first(setting.pictures(args)[0], args.batch_size).to(args.device)
    x = to_float(images.pixels)
    pair = [setting.network(args, images.num_classes, amp=setting.amp(args)).eval() for _ in range(2)]
    for net in pair:
        net.requires_grad_(False)
    parameters, buffers = stack_module_state(pair)
    blank = copy.deepcopy(pair[0]).to("meta")

    def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(blank, (parameters, buffers), (x,))

    def gradient(logits: Any) -> Work:
        def work() -> Tensor:
            d = torch.zeros_like(x, requires_grad=True)
            u, v = logits(x + d)
            return torch.autograd.grad(jensen_shannon(u, v + 0.1).sum(), d)[0]

        return work

    makers = {
        "two": lambda: gradient(lambda x: (pair[0](x), pair[1](x))),
        "one": lambda: gradient(lambda x: torch.vmap(one, (0, 0, None))(parameters, buffers, x).unbind()),
    }
    for make in makers.values():
        make()()  # warms everything up
    seconds = interleaved(makers, args)
    return [row(f"one search step, both networks, width {args.width}", seconds["two"], seconds["one"], "s")]
