"""Whole runs, small: an attack, and SAU on what it left, evaluations included, against the released order of work.

The proportions are those of CIFAR-10: 50 training pictures to 10 clean and 9 triggered test pictures, 5 % of the first
for the defender. The released order evaluates after every epoch and every round, ours as the commands do: every ten
of them and in the last one, and SAU also before. `--batch_size` is that of the attack; SAU has its own. A run that is
`--compiled` is so from scratch: what the compiler kept of others is not there for it.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_parts import pil, setting
from bench_parts.measure import Work, interleaved, row
from released_sau import ReleasedSAU
from torch._inductor.utils import fresh_cache

from sau.data.images import Images
from sau.data.sources import source
from sau.defense import SAU
from sau.evaluate import score
from sau.loop import Session
from sau.models import Normalized
from sau.optim import Training

EVERY = 10  # epochs between two evaluations of a command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this part."""
    setting.add_arguments(parser, width=16, batch_size=128)
    setting.add_workers(parser)
    setting.add_compiled(parser)
    parser.add_argument("--runs", default="attack,SAU", help="which [attack,SAU]")
    parser.add_argument("--pictures", type=int, default=5120, help="training pictures [5120]")
    parser.add_argument("--epochs", type=int, default=8, help="epochs of the attack [8]")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of SAU [10]")
    parser.add_argument("--precisions", default="bf16,fp32", help="of ours [bf16,fp32]")


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compare; returns the rows."""
    chosen = setting.among("--runs", args.runs, ("attack", "SAU"))
    precisions = setting.among("--precisions", args.precisions, ("bf16", "fp32"))
    ways: dict[str, dict[str, Any]] = {name: {"amp": name == "bf16"} for name in precisions}
    if args.compiled == "true":
        ways["bf16 compiled"] = {"amp": True, "compiled": True}
    train, test = setting.pictures(args)
    train, test = setting.first(train, args.pictures), setting.first(test, args.pictures // 5)
    clean = setting.first(train, args.pictures // 20)
    poisoned, triggered = setting.ATTACK.poison_train(train, seed=0), setting.ATTACK.poison_test(test)
    model = setting.network(args, train.num_classes)
    rows = []
    with tempfile.TemporaryDirectory() as place:
        tests = partial(_tests, args, test, triggered, Path(place))
        attacked = setting.copied(model, amp=True)
        if "SAU" in chosen:
            setting.ATTACK.fit(attacked, poisoned.to(args.device), _recipe(args), session=setting.QUIET)
        tested = {"test": test, "triggered": triggered}
        pairs: dict[str, tuple[Callable[..., Work], Callable[..., Work]]] = {
            "attack": (
                partial(_attack, model=model, poisoned=poisoned, **tested),
                partial(_released_attack, model=model, poisoned=poisoned, tests=tests, place=Path(place) / "train"),
            ),
            "SAU": (
                partial(_sau, attacked=attacked, clean=clean, **tested),
                partial(_released_sau, attacked=attacked, clean=clean, tests=tests, place=Path(place) / "clean"),
            ),
        }
        once = argparse.Namespace(**{**vars(args), "epochs": 1, "rounds": 1})
        for title in chosen:
            ours, reference = pairs[title]
            for make in _makers(once, ways, ours, reference).values():
                make()()  # warms everything up
            seconds = interleaved(_makers(args, ways, ours, reference), args)
            named = f"{title}, whole run, width {args.width}"
            rows += [row(f"{named}, {name}", seconds[name], seconds["released"], "s") for name in ways]
    return rows


def _makers(
    args: argparse.Namespace, ways: Mapping[str, Mapping[str, Any]], ours: Callable[..., Work],
    reference: Callable[..., Work],
) -> dict[str, Callable[[], Work]]:  # fmt: skip
    found = {name: partial(ours, args, **how) for name, how in ways.items()}
    return {**found, "released": partial(reference, args)}


@contextmanager
def _from_scratch() -> Iterator[None]:
    """Inside, nothing is compiled yet."""
    torch._dynamo.reset()
    with fresh_cache():
        yield


def _recipe(args: argparse.Namespace) -> Training:
    return Training(epochs=args.epochs, batch_size=args.batch_size, lr=0.1, lr_scheduler="OneCycleLR")


def _watched(epochs: int, clean: Images, stamped: Images) -> Session:
    """A run that is evaluated as often as a command's."""

    def on_epoch(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        if epoch % EVERY == 0 or epoch == epochs:
            score(state["model"], clean, stamped)
        return {}

    return Session(say=lambda text: None, on_epoch=on_epoch)


def _tests(
    args: argparse.Namespace, test: Images, triggered: Images, place: Path, normalise: bool
) -> list[pil.Batches]:
    workers, origin = setting.workers(args), source(args.dataset)
    return pil.evaluations(test, triggered, origin, place, args.batch_size, workers, args.device, normalise)


def _attack(
    args: argparse.Namespace, model: Normalized, poisoned: Images, test: Images, triggered: Images, **how: Any
) -> Work:
    victim = setting.copied(model, **how)
    images, clean, stamped = (part.to(args.device) for part in (poisoned, test, triggered))
    recipe, augment = _recipe(args), source(args.dataset).augment

    def work() -> None:
        with _from_scratch():
            setting.ATTACK.fit(victim, images, recipe, augment=augment, session=_watched(args.epochs, clean, stamped))

    return work


def _released_attack(
    args: argparse.Namespace, model: Normalized, poisoned: Images, tests: Callable[..., list[pil.Batches]], place: Path
) -> Work:
    net, sets = setting.as_released(model.net), tests(normalise=True)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    files = pil.Files(poisoned, poisoned.labels, pil.transform(source(args.dataset), True), place)
    batches = pil.loader(files, args.batch_size, train=True, workers=setting.workers(args), device=args.device)

    def work() -> None:
        for _ in range(args.epochs):
            pil.train_epoch(net, sgd, batches, args.device)
            pil.evaluate(net, sets, args.device)

    return work


def _sau(
    args: argparse.Namespace, attacked: Normalized, clean: Images, test: Images, triggered: Images, **how: Any
) -> Work:
    model = setting.copied(attacked, **how)
    given, plain, stamped = (part.to(args.device) for part in (clean, test, triggered))
    method = SAU(epochs=args.rounds, lr=1e-3)

    def work() -> None:
        with _from_scratch():
            score(model, plain, stamped)
            method.purify(model, given, session=_watched(args.rounds, plain, stamped))

    return work


def _released_sau(
    args: argparse.Namespace, attacked: Normalized, clean: Images, tests: Callable[..., list[pil.Batches]], place: Path
) -> Work:
    h, h_b = (setting.as_released(attacked) for _ in range(2))
    twin, sets = ReleasedSAU(h, h_b, lr=1e-3), tests(normalise=False)
    files = pil.Files(clean, clean.labels, pil.transform(source(args.dataset), False, False), place)
    batches = pil.loader(files, SAU.batch_size, train=False, workers=setting.workers(args), device=args.device)

    def work() -> None:
        for _ in range(args.rounds):
            for x, y in batches:
                twin.step(x.to(args.device), y.to(args.device))
            pil.evaluate(h, sets, args.device)

    return work
