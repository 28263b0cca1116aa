"""What a defense costs: whole runs side by side, and i-BAU, NAD and ANP against the order of work of their public code.

Of a whole run `ours` is its seconds and `reference` those of FT: below 1 a method costs more than FT.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_parts import released, setting
from bench_parts.measure import Work, interleaved, passes, peak_mb, row

from sau.command.request import Request
from sau.data.images import Images
from sau.data.sources import clean_subset, source
from sau.defense import ANP, DEFENSES, IBAU, NAD
from sau.loop import Session
from sau.models import Normalized
from sau.optim import Training
from sau.settings.run import DefenseRun

UPDATES = 40  # that plant the backdoor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=16)
    parser.add_argument("--pictures", type=int, default=256, help="clean pictures [256]")
    parser.add_argument("--recipe", default="cpu", choices=("paper", "cpu"), help="settings of the defenses [cpu]")
    parser.add_argument("--only", default=",".join(DEFENSES), help="defenses to run whole, with commas, or none")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; prints what each costs, returns the rows."""
    names = [] if args.only == "none" else setting.among("--only", args.only, DEFENSES)
    images = setting.pictures(args)[0].to(args.device)
    clean = clean_subset(images, args.pictures / len(images), 0)
    h_b = setting.backdoored(args, images, UPDATES, 128)
    rows = [_against_released(name, args, h_b, clean) for name in ("i-bau", "nad", "anp")]
    if not names:
        return rows
    works = {name: _whole(name, args, h_b, images, clean) for name in dict.fromkeys(["ft", *names])}
    counted = {name: _counted(work, h_b, clean, args.device) for name, work in works.items()}
    seconds = interleaved({name: lambda work=work: work for name, work in works.items()}, args)
    for name, facts in counted.items():
        found = {**row(f"whole run: {name}", seconds[name], seconds["ft"], "s"), **facts}
        found["passes_per_second"] = facts["passes_per_image"] * len(clean) / found["ours"]
        print(
            f"{name:10}{facts['passes_per_image']:10.1f} passes a clean picture{found['passes_per_second']:10.1f} a "
            f"second{facts['peak_mb']:10.1f} MB at most, {len(clean)} pictures, recipe {args.recipe}"
        )
        rows.append(found)
    return rows


def _counted(work: Work, h_b: Normalized, clean: Images, device: torch.device) -> dict[str, float]:
    """Passes a clean picture, and the most memory while they were counted."""
    found = dict[str, float]()
    counting = partial(passes, work, h_b, clean.pixels[:1].float() / 255)
    peak = peak_mb(lambda: found.update(passes_per_image=counting() / len(clean)), device)
    return {**found, "peak_mb": peak}


def _whole(name: str, args: argparse.Namespace, h_b: Normalized, images: Images, clean: Images) -> Work:
    """`purify` with the settings of the recipe; NPD's layer and NC's classes as they come."""
    request = Request(name, DEFENSES[name], (DefenseRun, DEFENSES[name]), [])
    _, method = request.settle(args.recipe, args.dataset)
    given = setting.ATTACK.poison_train(images, 0)[clean.index] if method.needs == "poisoned" else clean
    augment, session = source(args.dataset).augment, Session(say=lambda text: None)

    def work() -> None:
        method.purify(h_b, given, augment=augment, session=session)

    return work


def _against_released(name: str, args: argparse.Namespace, h_b: Normalized, clean: Images) -> dict[str, Any]:
    """One unit of work (a round, a step, an iteration) in fp32 for both, from the same weights and pictures."""
    batches = [(x, y) for x, y, _ in clean.batches(64)]
    makers: dict[str, Callable[[], Work]] = {
        "i-bau": (lambda: _ours_i_bau(h_b, batches), lambda: _released_i_bau(h_b, batches)),
        "nad": (lambda: _ours_nad(h_b, batches), lambda: _released_nad(h_b, batches)),
        "anp": (lambda: _ours_anp(h_b, batches), lambda: _released_anp(h_b, batches)),
    }[name]
    ours, reference = makers
    facts = [_counted(make(), h_b, clean, args.device) for make in makers]  # this warms everything up, too
    seconds = interleaved({"ours": ours, "reference": reference}, args)
    work = row(f"released order: {name}", seconds["ours"], seconds["reference"], "s")
    work["details"] = dict(zip(("ours", "reference"), facts, strict=True))
    for side, found in work["details"].items():
        found["images_per_second"] = len(clean) / work[side]
        print(
            f"{name:6}{side:10}{found['images_per_second']:10.1f} images/s{found['passes_per_image']:8.1f} passes a "
            f"picture{found['peak_mb']:10.1f} MB at most"
        )
    return work


def _ours_i_bau(h_b: Normalized, batches: list[released.Batch]) -> Work:
    method, session = IBAU(epochs=1, batch_size=64, augment=False), Session(say=lambda text: None)
    model = copy.deepcopy(h_b)
    return lambda: method.run(model, batches, session)


def _released_i_bau(h_b: Normalized, batches: list[released.Batch]) -> Work:
    model = copy.deepcopy(h_b).eval()
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    return lambda: released.i_bau_round(model, batches, adam)


def _ours_nad(h_b: Normalized, batches: list[released.Batch]) -> Work:
    method, model, teacher = NAD(epochs=1, batch_size=64), copy.deepcopy(h_b), copy.deepcopy(h_b)
    state = {**method.prepare(model, len(batches)), "teacher": teacher.eval().requires_grad_(False)}
    state["weights"] = {"net.layer3": 500, "net.layer4": 1000}
    return lambda: [method.step(state, x, y) for x, y in batches]


def _released_nad(h_b: Normalized, batches: list[released.Batch]) -> Work:
    student, teacher = copy.deepcopy(h_b.net), copy.deepcopy(h_b.net)
    sgd = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    return lambda: [released.nad_step(student, teacher, batch, sgd) for batch in batches]


def _ours_anp(h_b: Normalized, batches: list[released.Batch]) -> Work:
    from sau.defense import pruning

    method, model = ANP(batch_size=64), copy.deepcopy(h_b).train()
    network = pruning.MaskedNorms(model, pruning.batch_norms(model, "anp"))
    sgd = Training(epochs=1, lr=0.01, lr_scheduler="constant", wd=0.0)
    quiet = Session(say=lambda line: None, bar=False)
    return lambda: network.learn(partial(method.losses, network), batches, sgd, quiet, {}, label="chunk")


def _released_anp(h_b: Normalized, batches: list[released.Batch]) -> Work:
    model = copy.deepcopy(h_b)
    norms = released.perturb(model)
    sgd = torch.optim.SGD([norm.mask for norm in norms], lr=0.01, momentum=0.9)
    return lambda: [released.anp_iteration(model, norms, batch, sgd) for batch in batches]
