"""The released path of the data and of training, in its order of work: a PIL image at a time, poisoned ones from
PNG files, fp32 and NCHW, a look at the loss in every step, three passes an evaluation. Our own code.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision import transforms

from sau.data.images import Images
from sau.data.sources import Source

Batches = Iterable[tuple[Tensor, Tensor]]


class Files(Dataset[tuple[Tensor, int]]):
    """Images that are opened, transformed and normalised one by one when they are asked for.

    Args:
        images: those with a trigger are written to PNG files, the others stay arrays.
        transform: PIL image -> tensor.
        folder: for the files.
    """

    def __init__(self, images: Images, transform: Callable[[Image.Image], Tensor], folder: Path) -> None:
        self.arrays = images.pixels.permute(0, 2, 3, 1).cpu().numpy()
        self.labels, self.transform = images.labels.tolist(), transform
        self.files: dict[int, Path] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for place in (images.role > 0).nonzero().flatten().tolist():
            self.files[place] = folder / f"{place}.png"
            Image.fromarray(self.arrays[place]).save(self.files[place])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        image = Image.open(self.files[place]) if place in self.files else Image.fromarray(self.arrays[place])
        return self.transform(image), self.labels[place]


def transform(origin: Source, train: bool, normalise: bool = True) -> Callable[[Image.Image], Tensor]:
    """Resize; for training crop and flip; to float; normalise."""
    steps: list[Callable] = [transforms.Resize((origin.size, origin.size))]
    if train:
        steps.append(transforms.RandomCrop(origin.size, padding=origin.augment.padding))
        steps += [transforms.RandomHorizontalFlip()] if origin.augment.flip else []
    steps.append(transforms.ToTensor())
    return transforms.Compose([*steps, transforms.Normalize(origin.mean, origin.std)] if normalise else steps)


def train_epoch(net: nn.Module, sgd: torch.optim.Optimizer, batches: Batches, device: torch.device) -> float:
    """An epoch of supervised learning; every step waits for its loss and its answers."""
    net.train()
    losses, answers = [], []
    for images, labels in batches:
        x, y = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = net(x)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        sgd.step()
        sgd.zero_grad()
        losses.append(loss.item())
        answers.append(logits.detach().argmax(1).cpu())
    return sum(losses) / max(1, len(losses))


def evaluate(net: nn.Module, sets: Iterable[Batches], device: torch.device) -> list[float]:
    """The share of right answers in each set, a pass each: clean, triggered with the attack's labels, with the true."""
    net.eval()
    shares = []
    for batches in sets:
        right = seen = 0
        loss = 0.0
        with torch.no_grad():
            for images, labels in batches:
                x, y = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
                logits = net(x)
                loss += F.cross_entropy(logits, y).item()
                right += int((logits.argmax(1) == y).sum().item())
                seen += len(y)
        shares.append(right / seen)
    return shares
