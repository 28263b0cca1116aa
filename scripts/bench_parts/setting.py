"""What the parts of the benchmark run on: one setting, its images and its networks."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from bench_parts import released
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sau.config import param
from sau.data.images import Images
from sau.data.sources import Source, load, source
from sau.errors import require
from sau.models import Normalized, build


@dataclass(frozen=True)
class Setting:
    """What a part runs on; each field is a flag."""

    dataset: str = "digits"
    dataset_path: str = "./data"
    width: int = param(64, "channels of the network's first stage", ge=1)
    batch_size: int = param(128, "images an update", ge=1)
    steps: int = param(10, "updates a repetition", ge=1)
    images: int = param(500, "test images (eval), training images (runs)", ge=1)
    epochs: int = param(8, "epochs of the attack", ge=1)
    rounds: int = param(10, "rounds of SAU", ge=1)
    train_updates: int = param(60, "updates that plant the backdoor", ge=0)
    purify_updates: int = param(3, "updates of SAU before the comparison", ge=0)
    repeats: int = param(5, "repetitions", ge=1)
    workers: int = param(0, "worker processes of the released loaders; 0 loads in this process", ge=0)
    device: torch.device = torch.device("cpu")
    threads: int = 1

    @property
    def source(self) -> Source:
        return source(self.dataset)

    def load(self) -> tuple[Images, Images]:
        return load(self.dataset, self.dataset_path)

    def network(self, classes: int) -> Normalized:
        """A new network on the device, with the same weights each time."""
        torch.manual_seed(0)
        mean, std = self.source.mean, self.source.std
        return build("preactresnet18", classes, width=self.width, mean=mean, std=std).to(self.device)

    def loader(self, images: Images, folder: Path, *, train: bool, normalise: bool = True) -> DataLoader[Any]:
        """The released loader of these images."""
        files = released.Files(images, released.transform(self.source, train, normalise), folder)
        return DataLoader(
            files, self.batch_size, shuffle=train, drop_last=train, num_workers=self.workers,
            pin_memory=self.device.type == "cuda", persistent_workers=self.workers > 0,
        )  # fmt: skip

    def tests(self, test: Images, triggered: Images, folder: Path, *, normalise: bool = True) -> list[DataLoader[Any]]:
        """The three test sets of the released evaluation, the triggered images being read twice."""
        sets = test, triggered, replace(triggered, labels=triggered.true_labels)
        return [self.loader(each, folder / str(n), train=False, normalise=normalise) for n, each in enumerate(sets)]


def first(images: Images, count: int) -> Images:
    """The first `count` images, repeated if there are fewer."""
    return images[torch.arange(count) % len(images)]


def endless(images: Images, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one epoch after the other."""
    require("batch_size", size, size <= len(images), f"up to {len(images)}, the number of images")
    batches, epoch = images.batches(size, seed=seed, drop_last=True), 0
    while True:
        batches.epoch = epoch
        yield from ((x, y) for x, y, _ in batches)
        epoch += 1


def copied(model: Normalized, *, amp: bool) -> Normalized:
    """A copy in bf16 (`amp`) or fp32."""
    other = copy.deepcopy(model)
    other.amp = amp
    return other


def as_released(net: nn.Module) -> nn.Module:
    """A copy with its weights in NCHW that computes in fp32, without CUDA graphs."""
    other = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    for module in other.modules():
        if isinstance(module, Normalized):
            module.amp, module.compiled, module.graph_safe = False, False, False
    return other
