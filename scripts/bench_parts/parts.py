"""The parts of the benchmark: updates, evaluation, data and whole runs."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from bench_parts import released
from bench_parts.measure import Makers, Work, compare, interleaved, row, versions
from bench_parts.setting import Setting, as_released, copied, endless, first
from released_sau import ReleasedSAU
from torch import Tensor

from sau.attack import BadNet
from sau.data.images import Images, to_float
from sau.defense import SAU
from sau.evaluate import score
from sau.graphs import MicroBatchedStep
from sau.loop import RunContext
from sau.models import Normalized
from sau.optim import Training

ATTACK, QUIET = BadNet(), RunContext(say=lambda text: None)
RECIPE = Training(lr_scheduler="constant")
EVERY = 10  # epochs between two evaluations of a command
Rows = list[dict[str, Any]]


def train(s: Setting) -> Rows:
    """An update of the victim's training; a tenth of the images have BadNets' patch."""
    images, _ = s.load()
    poisoned = first(ATTACK.poison_train(images, seed=0), s.steps * s.batch_size)
    model, on_device = s.network(images.num_classes), poisoned.to(s.device)
    with tempfile.TemporaryDirectory() as folder:
        batches = s.loader(poisoned, Path(folder), train=True)
        reference = partial(_released_training, s, model, batches, 1)
        makers = versions(partial(_training, s, model, on_device), reference)
        return compare(f"training step, width {s.width}", makers, model, to_float(on_device.pixels[:1]),
                       len(poisoned), s, "s/step", s.steps)  # fmt: skip


def _training(s: Setting, model: Normalized, images: Images, amp: bool) -> Work:
    """An epoch as `Attack.fit` makes it."""
    state = ATTACK.prepare(copied(model, amp=amp).train(), RECIPE, s.steps)
    step = MicroBatchedStep(ATTACK, ATTACK.step, state, QUIET)
    batches = images.batches(s.batch_size, seed=0, augment=s.source.augment, drop_last=True)

    def work() -> None:
        for x, y, *_ in batches:
            step(x, y)

    if s.device.type == "cuda":
        work()  # captures the graph
    return work


def _released_training(
    s: Setting, model: Normalized, batches: released.Batches, epochs: int, tests: Callable[[], Any] = list
) -> Work:
    """Epochs in the released order, each with an evaluation on the sets that `tests` makes."""
    net, sets = as_released(model.net), tests()
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def work() -> None:
        for _ in range(epochs):
            released.train_epoch(net, sgd, batches, s.device)
            released.evaluate(net, sets, s.device)

    return work


def sau(s: Setting) -> Rows:
    """An update of SAU, after a moment of training with a backdoor and a moment of purification."""
    images = s.load()[0].to(s.device)
    h_b = _backdoored(s, images)
    stream = endless(images, s.batch_size, seed=1)
    h = copy.deepcopy(h_b)
    warm_up = _sau_updates(h, h_b, list(islice(stream, s.purify_updates)), amp=False, lr=1e-3, copy_model=False)
    warm_up()
    h.zero_grad(set_to_none=True)
    batches = list(islice(stream, s.steps))
    makers = versions(partial(_sau_updates, h, h_b, batches), partial(_released_sau_updates, h, h_b, batches))
    title, count = f"SAU update, width {s.width}", s.steps * s.batch_size
    return compare(title, makers, h, batches[0][0], count, s, "s/update", s.steps)


def _backdoored(s: Setting, images: Images) -> Normalized:
    """A network after updates on batches of which a fifth is triggered; prints its ACC and ASR."""
    model, attack = s.network(images.num_classes), BadNet(pratio=0.2)
    # a rate that ends at 0 lets the statistics of batch norm settle within few updates
    state = attack.prepare(model.train(), Training(epochs=1, lr=0.1, lr_scheduler="OneCycleLR"), s.train_updates)
    for x, y in islice(endless(attack.poison_train(images, seed=0), s.batch_size, seed=0), s.train_updates):
        attack.step(state, x, y)
    sample = first(images, min(256, len(images)))
    print(f"network: {score(model.eval(), sample, attack.poison_test(sample))}")
    return model


def _sau_updates(
    h: Normalized, h_b: Normalized, batches: list[tuple[Tensor, Tensor]], *, amp: bool, lr: float = 1e-4,
    copy_model: bool = True,
) -> Work:  # fmt: skip
    method = SAU(lr=lr)
    state = method.prepare(copied(h, amp=amp) if copy_model else h, batches)
    state["_reference"] = copied(h_b, amp=amp).eval().requires_grad_(False)
    step = MicroBatchedStep(method, method.step, state, QUIET)
    if batches and batches[0][0].is_cuda and copy_model:
        step(*batches[0])  # captures the graph
    return lambda: [step(x, y) for x, y in batches]


def _released_sau_updates(h: Normalized, h_b: Normalized, batches: list[tuple[Tensor, Tensor]]) -> Work:
    twin = ReleasedSAU(as_released(h), as_released(h_b))
    return lambda: [twin.step(x, y) for x, y in batches]


def evaluation(s: Setting) -> Rows:
    """ACC, ASR and R-ACC, against three passes over PIL images."""
    test = first(s.load()[1], s.images)
    triggered, model = ATTACK.poison_test(test), s.network(test.num_classes).eval()
    clean, bad = test.to(s.device), triggered.to(s.device)

    def ours(amp: bool) -> Work:
        net = copied(model, amp=amp)
        return lambda: score(net, clean, bad)

    with tempfile.TemporaryDirectory() as folder:
        sets, net = s.tests(test, triggered, Path(folder)), as_released(model.net)
        makers = versions(ours, lambda: lambda: released.evaluate(net, sets, s.device))
        count = len(test) + len(triggered)
        return compare(f"evaluation, width {s.width}", makers, model, to_float(clean.pixels[:1]), count, s, "s")


def data(s: Setting) -> Rows:
    """Batches of augmented training images, against PIL; and a training step in bf16, of which they are a part."""
    images, _ = s.load()
    poisoned = first(ATTACK.poison_train(images, seed=0), s.steps * s.batch_size)
    model, on_device = s.network(images.num_classes), poisoned.to(s.device)
    batches = on_device.batches(s.batch_size, seed=0, augment=s.source.augment, drop_last=True)
    with tempfile.TemporaryDirectory() as folder:
        loader = s.loader(poisoned, Path(folder), train=True)
        makers: Makers = {
            "ours": lambda: lambda: [None for _ in batches],
            "released": lambda: lambda: [(x.to(s.device), y.to(s.device)) for x, y in loader],
            "step": partial(_training, s, model, on_device, amp=True),
        }
        seconds = interleaved(makers, s.repeats, s.device)
    return [
        row("augmented images", seconds["ours"], seconds["released"], "s/image", len(poisoned)),
        row("augmentation beside a whole step in bf16", seconds["ours"], seconds["step"], "s/step", s.steps),
    ]


def runs(s: Setting) -> Rows:
    """Whole runs with their evaluations: an attack, and SAU on the network that it left.

    In CIFAR-10's proportions: to 50 training images 10 test images and 2.5 clean ones for the defender. Ours evaluates
    every ten epochs and in the last one, as the commands do, the released order after every epoch.
    """
    images, test = s.load()
    images, test, clean = first(images, s.images), first(test, s.images // 5), first(images, s.images // 20)
    poisoned, triggered = ATTACK.poison_train(images, seed=0), ATTACK.poison_test(test)
    model = s.network(images.num_classes)
    attacked = copied(model, amp=True)
    on_device = [part.to(s.device) for part in (poisoned, clean, test, triggered)]
    _attack(s, attacked, on_device)()
    rows: Rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        batches = s.loader(poisoned, folder / "train", train=True)
        tests = partial(s.tests, test, triggered, folder)
        makers: dict[str, tuple[Callable[..., Work], Callable[[], Work]]] = {
            "attack": (
                lambda amp: _attack(s, copied(model, amp=amp), on_device),
                partial(_released_training, s, model, batches, s.epochs, tests),
            ),
            "SAU": (
                lambda amp: _sau(s, copied(attacked, amp=amp), on_device),
                partial(_released_sau, s, attacked, s.loader(clean, folder / "clean", train=False, normalise=False),
                        partial(tests, normalise=False)),
            ),
        }  # fmt: skip
        for title, (ours, reference) in makers.items():
            seconds = interleaved(versions(ours, reference), s.repeats, s.device, warm_up=False)
            named = f"{title}, whole run, width {s.width}"
            rows += [row(f"{named}, {name}", seconds[name], seconds["released"], "s") for name in ("bf16", "fp32")]
    return rows


def _attack(s: Setting, model: Normalized, on_device: list[Images]) -> Work:
    poisoned, _, test, triggered = on_device
    recipe = Training(epochs=s.epochs, batch_size=s.batch_size, lr=0.1, lr_scheduler="OneCycleLR")
    session = _session(s.epochs, test, triggered)
    return lambda: ATTACK.fit(model, poisoned, recipe, augment=s.source.augment, session=session)


def _sau(s: Setting, model: Normalized, on_device: list[Images]) -> Work:
    _, clean, test, triggered = on_device

    def work() -> None:
        score(model, test, triggered)
        session = _session(s.rounds, test, triggered)
        SAU(epochs=s.rounds, lr=1e-3).purify(model, clean, session=session, settings="as_given")

    return work


def _released_sau(s: Setting, attacked: Normalized, batches: released.Batches, tests: Callable[[], Any]) -> Work:
    h, h_b = as_released(attacked), as_released(attacked)
    twin, sets = ReleasedSAU(h, h_b, lr=1e-3), tests()

    def work() -> None:
        for _ in range(s.rounds):
            for x, y in batches:
                twin.step(x.to(s.device), y.to(s.device))
            released.evaluate(h, sets, s.device)

    return work


def _session(epochs: int, test: Images, triggered: Images) -> RunContext:
    def on_epoch(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        if epoch % EVERY == 0 or epoch == epochs:
            score(state["model"], test, triggered)
        return {}

    return RunContext(say=lambda text: None, on_epoch=on_epoch)
