"""What an attack costs: an update of each beside BadNets' on the same pictures, and stamping 50,000 pictures.

Ratios of updates are attack / BadNets; `ours` is the attack, `reference` BadNets, so here a small ratio is cheap.
"""

import argparse
from collections.abc import Callable
from itertools import islice
from typing import Any

import torch
from bench_parts import setting
from bench_parts.measure import Work, interleaved, passes
from torch import Tensor, nn

from sau.attack import ATTACKS, Attack
from sau.attack.inputaware import InputAware
from sau.data.images import Images
from sau.data.sources import source
from sau.models.steganography import CODE_SIDE, Encoder, FixedCodeEncoder
from sau.optim import Training

STAMPED = 50_000  # pictures, the size of CIFAR-10's training set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=16, batch_size=128, steps=4)
    setting.add_amp(parser)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each update and each stamp costs, returns the rows."""
    images = setting.pictures(args)[0].to(args.device)
    recipe = Training(batch_size=args.batch_size, lr_scheduler="constant")
    blank = setting.network(args, images.num_classes, amp=setting.amp(args))
    free = {name: attack for name, attack in ATTACKS.items() if name not in ("prototype", "ssba")}
    # A share of poisons counts inside batches alone; SIG refuses the usual one where its class has too few pictures.
    made = {name: attack() if attack.in_batch else attack(pratio=0.0) for name, attack in free.items()}
    ready = {name: attack.fit_trigger(images, blank, recipe) for name, attack in made.items()}
    makers: dict[str, Callable[[], Work]] = {}
    for name, attack in ready.items():
        makers[name] = lambda attack=attack: _updates(attack, args, images, recipe)
    if isinstance(ready.get("inputaware"), InputAware):
        makers["inputaware, masks"] = lambda: _updates(ready["inputaware"], args, images, recipe, masks=True)
    seen = args.steps * args.batch_size
    forwards = {
        name: passes(make(), blank, _batches(ready["badnet"], args, images)[0][0]) for name, make in makers.items()
    }
    seconds = interleaved(makers, args)
    rows = []
    for name in makers:
        ratios = sorted(a / b for a, b in zip(seconds[name], seconds["badnet"], strict=True))
        middle = args.repeats // 2
        ours, reference = sorted(seconds[name])[middle] / seen, sorted(seconds["badnet"])[middle] / seen
        rows.append({
            "name": f"update: {name}", "ratio": ratios[middle], "ours": ours, "reference": reference,
            "unit": "s a picture", "low": ratios[0], "high": ratios[-1], "passes_per_image": forwards[name] / seen,
        })  # fmt: skip
        print(f"{name:20}{forwards[name] / seen:8.2f} passes/picture")
    fixed = [attack for attack in ready.values() if not attack.in_batch]
    if all(side % CODE_SIDE == 0 for side in images.pixels.shape[2:]):
        encoder = FixedCodeEncoder(Encoder(1, images.pixels.shape[1], True), torch.ones(1)).to(args.device).eval()
        fixed.append(ATTACKS["ssba"]().with_trigger(encoder))  # not trained, which costs the same
    return rows + [_stamping(attack, args, images) for attack in fixed]


def _batches(attack: Attack, args: argparse.Namespace, images: Images) -> list[tuple[Tensor, ...]]:
    augment = None if attack.augments_in_compose else source(args.dataset).augment
    return list(islice(images.batches(args.batch_size, seed=0, augment=augment, drop_last=True), args.steps))


def _updates(
    attack: Attack, args: argparse.Namespace, images: Images, recipe: Training, masks: bool = False
) -> Callable[[], None]:
    """`steps` updates as `fit` makes them, augmentation included, on clean pictures: stamping is measured by itself."""
    model: nn.Module = setting.network(args, images.num_classes, amp=setting.amp(args)).train()
    if masks and isinstance(attack, InputAware):
        state, step, compose = attack.prepare_masks(model, args.steps), attack.mask_step, attack.compose_masks
    else:
        state, step, compose = attack.prepare(model, recipe, args.steps), attack.step, attack.compose
    state.update(images=images, augment=source(args.dataset).augment)

    def work() -> None:
        for x, y, *_ in _batches(attack, args, images):
            step(state, *compose(state, x, y))

    return work


def _stamping(attack: Attack, args: argparse.Namespace, images: Images) -> dict[str, Any]:
    some = images[torch.arange(min(len(images), 5000), device=images.labels.device)]
    seconds = interleaved({"stamp": lambda: lambda: attack.stamp_images(some, test=False)}, args)["stamp"]
    each = sorted(seconds)[len(seconds) // 2] / len(some)
    low, high = min(seconds) / len(some), max(seconds) / len(some)
    ten = 10 / STAMPED  # the ratio is of ten seconds for 50,000 pictures
    return {
        "name": f"stamp: {attack.name}", "ratio": ten / each, "ours": STAMPED * each, "reference": 10.0,
        "unit": "s for 50,000", "low": ten / high, "high": ten / low,
    }  # fmt: skip
