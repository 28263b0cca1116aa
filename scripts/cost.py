"""What a defense computes, in forward passes of the network per clean image: the command `tables.py cost`."""

import argparse
import copy

import torch
from bench_parts.measure import flops, forward_flops

from sau.data.batches import clean_batches
from sau.defense import DEFENSES
from sau.errors import require
from sau.loop import RunContext
from sau.models import build
from sau.report.tables import markdown

IMAGES, SIZE = 2500, 16  # as many as published, for what a defense does once; small ones, for speed


def cost(args: argparse.Namespace) -> None:
    """Print the forward passes an image and round, and those of the default rounds. A backward pass counts as it is.

    The cost of a round is that of a run of two less that of one, on PreAct-ResNet18 and random images. A method of
    several stages, like NC, has a round of each.
    """
    torch.manual_seed(0)
    x, y = torch.rand(IMAGES, 3, SIZE, SIZE), torch.arange(IMAGES) % 10
    network = build("preactresnet18", 10, width=8, shape=[3, SIZE, SIZE], mean=[0.5] * 3, std=[0.25] * 3).eval()
    unit, body = IMAGES * forward_flops(network, x), []
    for name in args.defenses:
        require("DEFENSE", name, name in DEFENSES, f"one of {', '.join(DEFENSES)}")
        kind, found = DEFENSES[name], list[float]()
        require("DEFENSE", name, bool(kind.lengths), "a defense that has rounds")
        for rounds in (1, 2):
            method, model = kind(**dict.fromkeys(kind.lengths, rounds)), copy.deepcopy(network)
            batches = clean_batches((x, y), method.batch_size, x.device, (None, None), 0)
            found.append(flops(lambda: method.run(model, batches, RunContext().quiet())) / unit)  # noqa: B023
        spent, rounds = found[1] - found[0], max(getattr(kind(), length) for length in kind.lengths)
        body.append([name, f"{spent:.1f}", str(rounds), f"{found[0] + (rounds - 1) * spent:,.0f}"])
    print(markdown(["defense", "forward passes an image and round", "rounds", "in all"], body), end="")
