"""What the parts are run on: pictures, networks, and the flags that say so."""

import argparse
import copy

import torch
from torch import nn

from sau.attack import BadNet
from sau.data.images import Images
from sau.data.sources import load, source
from sau.models import Normalized, build

ATTACK = BadNet()


def add_arguments(parser: argparse.ArgumentParser, width: int, batch_size: int, steps: int) -> None:
    """The flags that most parts have, with their defaults."""
    parser.add_argument("--dataset", default="digits", choices=("digits", "cifar10"), help="pictures [digits]")
    parser.add_argument("--dataset_path", default="./data", help="folder that holds the data sets [./data]")
    parser.add_argument("--width", type=int, default=width, help=f"channels of the first stage [{width}]")
    parser.add_argument("--batch_size", type=int, default=batch_size, help=f"pictures an update [{batch_size}]")
    parser.add_argument("--steps", type=int, default=steps, help=f"updates a repetition [{steps}]")
    parser.add_argument("--workers", type=int, default=-1, help="processes of the released loaders [4 on CUDA, else 0]")


def add_compiled(parser: argparse.ArgumentParser) -> None:
    """The flag of parts that can also compile our networks."""
    parser.add_argument("--compiled", default="", help="modes of torch.compile with commas: default,reduce-overhead")


def workers(args: argparse.Namespace) -> int:
    """Loader processes; without CUDA they would only take cores from the network."""
    return args.workers if args.workers >= 0 else 4 if args.device.type == "cuda" else 0


def pictures(args: argparse.Namespace) -> tuple[Images, Images]:
    """Train and test pictures, on the CPU."""
    return load(args.dataset, args.dataset_path)


def first(images: Images, count: int) -> Images:
    """The first `count` of them, over again where there are fewer."""
    return images[torch.arange(count) % len(images)]


def network(args: argparse.Namespace, classes: int, width: int | None = None) -> Normalized:
    """A new network on the device, the same weights each time."""
    torch.manual_seed(0)
    about = source(args.dataset)
    net = build("preactresnet18", classes, width=width or args.width, mean=about.mean, std=about.std)
    return net.to(args.device)


def copied(model: Normalized, *, amp: bool, compiled: str | None = None) -> Normalized:
    """A copy in a precision, and in a mode of torch.compile."""
    other = copy.deepcopy(model)
    other.amp, other.compiled = amp, compiled
    return other


def modes(args: argparse.Namespace) -> list[str]:
    """The modes of torch.compile that are asked for."""
    return [mode for mode in args.compiled.split(",") if mode]


def as_released(net: nn.Module) -> nn.Module:
    """A copy with its weights in NCHW."""
    return copy.deepcopy(net).to(memory_format=torch.contiguous_format)
