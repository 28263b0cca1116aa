"""What the parts are run on: pictures, networks, and the flags that say so."""

import argparse
import copy
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from sau.attack import BadNet
from sau.data.images import Images, to_float
from sau.data.sources import load, source
from sau.errors import ConfigError
from sau.loop import Session
from sau.models import Normalized, build
from sau.optim import Training

ATTACK = BadNet()
QUIET = Session(say=lambda text: None)


def add_pictures(parser: argparse.ArgumentParser) -> None:
    """The flags of all parts that need no record."""
    parser.add_argument("--dataset", default="digits", choices=("digits", "cifar10"), help="pictures [digits]")
    parser.add_argument("--dataset_path", default="./data", help="folder that holds the data sets [./data]")


def add_arguments(
    parser: argparse.ArgumentParser, width: int, batch_size: int | None = None, steps: int | None = None
) -> None:
    """The flags that most parts have, with their defaults; None leaves one out where it would have no effect."""
    add_pictures(parser)
    parser.add_argument("--width", type=int, default=width, help=f"channels of the first stage [{width}]")
    if batch_size is not None:
        parser.add_argument("--batch_size", type=int, default=batch_size, help=f"pictures an update [{batch_size}]")
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps, help=f"updates a repetition [{steps}]")


def add_workers(parser: argparse.ArgumentParser) -> None:
    """The flag of parts in which the released loaders run."""
    parser.add_argument("--workers", type=int, default=-1, help="processes of the released loaders [4 on CUDA, else 0]")


def add_amp(parser: argparse.ArgumentParser) -> None:
    """The flag of parts that run in one precision; see `amp`."""
    parser.add_argument("--amp", default="true", choices=("true", "false"), help="bf16 [true]")


def add_compiled(parser: argparse.ArgumentParser) -> None:
    """The flag of parts that can also compile our networks."""
    parser.add_argument("--compiled", default="false", choices=("true", "false"), help="also by torch.compile [false]")


def among(flag: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that a flag lists with commas, each once; ConfigError for one that is not `known`."""
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"{flag} names {unknown[0]!r}; allowed are {', '.join(known)}, several with commas")
    return names


def amp(args: argparse.Namespace) -> bool:
    """Whether bf16 is asked for."""
    return args.amp == "true"


def workers(args: argparse.Namespace) -> int:
    """Loader processes; without CUDA they would only take cores from the network."""
    return args.workers if args.workers >= 0 else 4 if args.device.type == "cuda" else 0


def pictures(args: argparse.Namespace) -> tuple[Images, Images]:
    """Train and test pictures, on the CPU."""
    return load(args.dataset, args.dataset_path)


def first(images: Images, count: int) -> Images:
    """The first `count` of them, over again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def network(args: argparse.Namespace, classes: int, width: int | None = None, amp: bool = False) -> Normalized:
    """A new network on the device, the same weights each time."""
    torch.manual_seed(0)
    about = source(args.dataset)
    net = build("preactresnet18", classes, width=width or args.width, mean=about.mean, std=about.std, amp=amp)
    return net.to(args.device)


def backdoored(args: argparse.Namespace, images: Images, updates: int, size: int) -> Normalized:
    """A network after `updates` on batches of which a fifth is stamped; prints how far the backdoor got."""
    model, attack = network(args, images.num_classes), BadNet(pratio=0.2)
    # A rate that ends at 0 lets the statistics of batch norm settle within few updates.
    state = attack.prepare(model.train(), Training(epochs=1, lr=0.1, lr_scheduler="OneCycleLR"), updates)
    for x, y in islice(endless(attack.poison_train(images, seed=0), size, seed=0), updates):
        attack.step(state, x, y)
    model.eval()
    some = images[torch.arange(min(256, len(images)), device=args.device)]
    x, y = to_float(some.pixels), some.true_labels
    with torch.no_grad():
        right = (model(x).argmax(1) == y).double().mean()
        hit = (model(attack.stamp(x)).argmax(1) == attack.attack_target).double().mean()
    print(f"network: {100 * right:.0f} % of the clean pictures right, {100 * hit:.0f} % of the stamped ones on target")
    return model


def endless(images: Images, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other; ConfigError where not even one can be filled."""
    if len(images) < size:
        raise ConfigError(f"batch_size is {size}, allowed are up to {len(images)}, the pictures that there are")
    batches = images.batches(size, seed=seed, drop_last=True)
    epoch = 0
    while True:
        batches.set_epoch(epoch)
        for x, y, _ in batches:
            yield x, y
        epoch += 1


def copied(model: Normalized, *, amp: bool, compiled: bool = False, captured: bool = True) -> Normalized:
    """A copy in a precision, perhaps `compiled`, whose updates CUDA repeats where they may be `captured`."""
    other = copy.deepcopy(model)
    other.amp, other.compiled, other.graph_safe = amp, compiled, captured
    return other


def as_released(net: nn.Module) -> nn.Module:
    """A copy with its weights in NCHW that computes in fp32."""
    other = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in other.modules():
        if isinstance(module, Normalized):
            module.amp, module.compiled, module.graph_safe = False, False, False
    return other
