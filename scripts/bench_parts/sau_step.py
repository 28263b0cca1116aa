"""One update of SAU: ours in bf16 and in fp32, against the released order of work in fp32 and NCHW.

The network is first trained for a moment on pictures of which a fifth are stamped, and then purified for a moment, so
that h has left h_b as it has in most of a run. All start from the same weights and see the same pictures.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from bench_parts.measure import Work, interleaved, passes, peak_mb, row
from released_sau import ReleasedSAU
from torch import Tensor

from sau.attack import BadNet
from sau.data.images import Images, to_float
from sau.data.sources import load, source
from sau.defense import SAU
from sau.models import Normalized, build
from sau.optim import Training


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    parser.add_argument("--dataset", default="digits", choices=("digits", "cifar10"), help="pictures [digits]")
    parser.add_argument("--dataset_path", default="./data", help="folder that holds the data sets [./data]")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage [64]")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures an update [64]")
    parser.add_argument("--steps", type=int, default=1, help="updates a repetition [1]")
    parser.add_argument("--train_updates", type=int, default=60, help="updates that plant the backdoor [60]")
    parser.add_argument("--purify_updates", type=int, default=3, help="updates of SAU before the comparison [3]")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each variant does and needs, returns the rows."""
    torch.manual_seed(0)
    images = load(args.dataset, args.dataset_path)[0].to(args.device)
    h_b = _backdoored(args, images)
    stream = _endless(images, args.batch_size, seed=1)
    h = _purified(h_b, stream, args.purify_updates)
    batches = list(islice(stream, args.steps))
    makers: dict[str, Callable[[], Work]] = {
        "ours bf16": lambda: _ours(h, h_b, batches, amp=True),
        "ours fp32": lambda: _ours(h, h_b, batches, amp=False),
        "reference": lambda: _reference(h, h_b, batches),
    }
    seen = args.steps * args.batch_size
    facts = {}
    for name, make in makers.items():  # these runs also warm everything up
        memory = peak_mb(make(), args.device)
        facts[name] = {"passes_per_image": passes(make(), h, batches[0][0]) / seen, "peak_mb": memory}
    seconds = interleaved(makers, args.repeats, args.device)
    for name, fact in facts.items():
        fact["images_per_second"] = seen / sorted(seconds[name])[args.repeats // 2]
        print(
            f"{name:10}{fact['images_per_second']:10.1f} images/s{fact['passes_per_image']:8.1f} passes/image"
            f"{fact['peak_mb']:10.1f} MB at most"
        )
    rows = []
    for name, label in (("ours bf16", "bf16 channels-last"), ("ours fp32", "fp32 channels-last")):
        title = f"SAU update, width {args.width}, {label}"
        found = row(title, seconds[name], seconds["reference"], "s/update", args.steps)
        rows.append({**found, "details": {"ours": facts[name], "reference": facts["reference"]}})
    return rows


def _backdoored(args: argparse.Namespace, images: Images) -> Normalized:
    about = source(args.dataset)
    net = build("preactresnet18", images.num_classes, width=args.width, mean=about.mean, std=about.std)
    model = net.to(args.device)
    attack = BadNet(pratio=0.2)
    # A rate that ends at 0 lets the statistics of batch norm settle within few updates.
    recipe = Training(epochs=1, lr=0.1, lr_scheduler="OneCycleLR")
    state = attack.prepare(model.train(), recipe, args.train_updates)
    stream = _endless(attack.poison_train(images, seed=0), args.batch_size, seed=0)
    for x, y in islice(stream, args.train_updates):
        attack.step(state, x, y)
    model.eval()
    some = images[torch.arange(min(256, len(images)), device=args.device)]
    x, y = to_float(some.pixels), some.true_labels
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double().mean()
        hit = (model(attack.stamp(x)).argmax(1) == attack.attack_target).double().mean()
    print(f"network: {100 * right:.0f} % of the clean pictures right, {100 * hit:.0f} % of the stamped ones on target")
    return model


def _purified(h_b: Normalized, stream: Iterator[tuple[Tensor, Tensor]], updates: int) -> Normalized:
    method = SAU(lr=1e-3)
    state = method.prepare(copy.deepcopy(h_b), max(1, updates))
    for x, y in islice(stream, updates):
        method.step(state, x, y)
    state["model"].zero_grad(set_to_none=True)
    return state["model"]


def _endless(images: Images, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    batches = images.batches(size, seed=seed, drop_last=True)
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        for x, y, _ in batches:
            yield x, y
        epoch += 1


def _ours(h: Normalized, h_b: Normalized, batches: list[tuple[Tensor, Tensor]], amp: bool) -> Work:
    method, model, reference = SAU(), copy.deepcopy(h), copy.deepcopy(h_b)
    model.amp = reference.amp = amp
    state = method.prepare(model, len(batches))
    state["reference"] = reference.eval().requires_grad_(False)
    return lambda: [method.step(state, x, y) for x, y in batches]


def _reference(h: Normalized, h_b: Normalized, batches: list[tuple[Tensor, Tensor]]) -> Work:
    pair = (copy.deepcopy(net).to(memory_format=torch.contiguous_format) for net in (h, h_b))
    twin = ReleasedSAU(*pair)
    return lambda: [twin.step(x, y) for x, y in batches]
