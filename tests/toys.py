"""Small data, small networks and the command line: what several test files need."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sau.attack import Attack, Blended
from sau.data.images import Images, to_float
from sau.defense import Defense
from sau.errors import SauError
from sau.loop import RunContext
from sau.optim import Training
from sau.record.folder import Record

REPOSITORY = Path(__file__).resolve().parents[1]
QUICK = ("--threads", "1", "--amp", "false", "--device", "cpu")  # the probe for bf16 times, so its answer may vary
VICTIM = ("--dataset", "digits", "--width", "4", "--epochs", "4", "--eval_every", "2", *QUICK)


class Enough(BaseException):
    """As a signal comes: no error that anybody catches."""


def stop_making(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let the making of trigger `name` end with Enough after its first checkpoint, once."""
    save, calls = Record.save, []

    def stop(self: Record, place: dict[str, Any]) -> None:
        save(self, place)
        calls.append(self.path.name.rsplit("-", 1)[0])
        if calls.count(name) == 1 and calls[-1] == name:
            raise Enough

    monkeypatch.setattr(Record, "save", stop)


def toy_images(n: int = 80, *, classes: int = 4, size: int = 16, channels: int = 3, seed: int = 0) -> Images:
    """Striped pictures: the class is the direction and the width of the stripes, so that the maxima of small filters
    tell them apart; phase and noise are drawn anew for every picture. Classes take turns."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    angle = labels * torch.pi / classes
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    along = row * angle.cos().view(-1, 1, 1) + column * angle.sin().view(-1, 1, 1)
    phase = 2 * torch.pi * torch.rand(n, 1, 1, generator=generator)
    stripes = (0.5 + 0.3 * torch.sin(along * (1.2 + 0.2 * labels.view(-1, 1, 1)) + phase)).unsqueeze(1)
    noise = 0.05 * torch.randn(n, channels, size, size, generator=generator)
    pixels = ((stripes + noise).clamp(0, 1) * 255).to(torch.uint8)
    return Images.clean(pixels, labels, classes)


def coloured(folder: Path, count: int, first: int = 0) -> Path:
    """A folder of three classes, blue, green and red, with so many images each, of several widths and shades."""
    for label, name in enumerate(("blue", "green", "red")):
        (folder / name).mkdir(parents=True)
        for i in range(first, first + count):
            colour = [30 + 5 * i] * 3
            colour[2 - label] = 220 - i
            Image.new("RGB", (16 + i, 16), tuple(colour)).save(folder / name / f"{i}.png")
    return folder


class TinyNet(nn.Module):
    """Two strided convolutions and their maxima: any size, under 1,000 weights for up to 10 classes."""

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, 10, 3, stride=2, padding=1), nn.BatchNorm2d(10), nn.ReLU(),
            nn.Conv2d(10, 6, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.linear = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))


def tiny_net(classes: int = 4, channels: int = 3, seed: int = 0) -> TinyNet:
    """In eval mode; the same weights for the same seed, and the generator of the process is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyNet(classes, channels).eval()


class Shaped(nn.Module):
    """A network whose output is shaped by a function."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net, self.shape = tiny_net(), shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.net(x))


def quiet(**how: Any) -> RunContext:
    """A session that prints nothing."""
    return RunContext(say=lambda text: None, **how)


def train_victim(attack: Attack, images: Images, net: nn.Module | None = None) -> nn.Module:
    """A tiny network, or another one, trained on poisoned toy pictures, in about a second."""
    net = tiny_net(images.num_classes, images.pixels.shape[1]) if net is None else net
    recipe = Training(epochs=20, batch_size=20, lr=0.05, lr_scheduler="OneCycleLR")
    return attack.fit(net, attack.poison_train(images, 0), recipe, seed=0, session=quiet())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same bits under the same names."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def command(kind: str, name: str, *flags: str) -> list[str]:
    """The command line of a script of the repository."""
    return [sys.executable, str(REPOSITORY / kind / f"{name}.py"), *flags]


def environment(**extra: str) -> dict[str, str]:
    """One thread for each linear algebra call, and no path that would find the package by accident."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "OMP_NUM_THREADS": "1", **extra}


def stop_after(words: str, number: signal.Signals, argv: list[str], cwd: Path) -> tuple[int, str]:
    """Start a command and send it a signal when a line of its output begins with `words`.
    Returns its status and what it wrote to stderr. A command that does not leave fails the test; the time that it takes
    depends on what else the machine does, so only minutes are too long."""
    # A process started in the background may ignore Ctrl-C and hand that on; the way through this one undoes it.
    undo = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", undo, *argv], cwd=cwd, env=environment(), stdout=pipe, stderr=pipe, text=True
    ) as process:
        assert process.stdout is not None
        seen = []
        for line in process.stdout:
            seen.append(line)
            if line.startswith(words):
                process.send_signal(number)
                break
        _, err = process.communicate(timeout=240)
        assert seen and seen[-1].startswith(words), (seen, err)
        return process.returncode, err


@contextmanager
def refuses(kind: type[SauError], *words: str) -> Iterator[None]:
    """The block raises this error, whose line (`SauError` makes it one) has these words."""
    with pytest.raises(kind) as refusal:
        yield
    missing = [word for word in words if word not in str(refusal.value)]
    assert not missing, f"{missing} not in {refusal.value}"


def the_error(stderr: str) -> str:
    """The one line that stands on stderr."""
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    return lines[0]


def summary(folder: Path) -> dict[str, Any]:
    """That of a result folder, whether it is finished or not."""
    return json.loads((folder / "summary.json").read_text())


def rows(folder: Path) -> list[dict[str, Any]]:
    """The figures of each epoch or round of a result folder."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def red_corner(x: Tensor) -> Tensor:
    """The trigger of `planted`: a red corner of 3x3 pixels on float pictures [B, 3, H, W]."""
    stamped = x.clone()
    stamped[:, :, -4:-1, -4:-1] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
    return stamped


def planted(share: float = 0.05) -> tuple[nn.Sequential, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A network in eval mode whose channel 5, and none of the other 23, answers to a red corner; trained in about a
    second on grey pictures of which `share` have that corner and the label 0.
    Returns the network, the pictures it was trained on, clean ones with labels, and those of other classes with the
    trigger, as (pixels, the attack's labels, true labels)."""
    clean = toy_images(300, seed=1)
    x, y = clean.pixels.float() / 255, clean.labels.clone()
    stamped = int(share * len(y))
    x[:stamped], y[:stamped] = red_corner(x[:stamped]), 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        convolution, norm, linear = nn.Conv2d(3, 24, 3, bias=False), nn.BatchNorm2d(24, momentum=1.0), nn.Linear(24, 4)
        with torch.no_grad():
            convolution.weight[5] = torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1) / 9
        net = nn.Sequential(convolution, norm, nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), linear)
        with torch.no_grad():
            net(x)  # in train mode: the running statistics become those of these pictures
            features = net.eval()[:-1](x)
        descent = Training(lr=0.1, lr_scheduler="constant", client_optimizer="adam").descent(linear.parameters(), 1)
        for _ in range(300):
            descent(nn.functional.cross_entropy(linear(features), y))
    rest = toy_images(200, seed=2)
    pixels, labels = rest.pixels.float() / 255, rest.labels
    others = labels != 0
    return net, x, (pixels, labels), (red_corner(pixels[others]), torch.zeros_like(labels[others]), labels[others])


def said(defense: Defense, net: nn.Module, data: Any) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """The purified network, the lines that were printed, and the findings."""
    lines: list[str] = []
    session = RunContext(say=lines.append)
    return defense.purify(net, data, session=session), lines, session.findings


def own_answers(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` with what a network answers to it for labels, so that even an untrained one is right."""
    with torch.no_grad():
        return x, net(x).argmax(1)


def pair(n: int = 20, dtype: torch.dtype = torch.float32, **how) -> tuple[Tensor, Tensor]:
    """Float pictures in [0, 1] and their labels."""
    images = toy_images(n, **how)
    return to_float(images.pixels).to(dtype), images.labels


def triples(pixels: Tensor, labels: Tensor) -> DataLoader:
    """A loader of (x, y, something else), as many data sets have."""
    return DataLoader(TensorDataset(pixels, labels, torch.arange(len(labels))), batch_size=8)


@cache
def backdoored() -> tuple[nn.Module, Images, Images, Images]:
    """A network with Blended's backdoor, the defender's pictures, the test set, the triggered test set."""
    attack = Blended()
    net = train_victim(attack, toy_images(400, seed=1))
    test = toy_images(200, seed=2)
    return net, toy_images(200, seed=3), test, attack.poison_test(test)


def smooth_net() -> nn.Module:
    """Double precision, no kinks, eval mode with statistics that matter."""
    torch.manual_seed(3)
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 3))
    net = nn.Sequential(*layers).double().eval()
    net[1].running_mean.fill_(0.2), net[1].running_var.fill_(0.5)
    return net


def batch(n: int, seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.rand(n, 1, 4, 4, dtype=torch.float64), torch.arange(n) % 3
