"""A data set as tensors, with the truth about every image."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sau.data.batches import Augment as Augment
from sau.data.batches import Batches as Batches
from sau.data.batches import generator
from sau.data.batches import quantise as quantise
from sau.data.batches import to_float as to_float
from sau.errors import DataError, require
from sau.types import Bytes, Labels

CLEAN, BACKDOOR, CROSS = 0, 1, 2  # roles of an image; cross images carry a trigger and keep their label


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to `most` of `count` positions, evenly spaced, for data sets may be sorted by class."""
    return torch.linspace(0, count - 1, min(count, most)).long()


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images.

    Args:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], what a network is trained or tested on.
        true_labels: int64 [N], what the image shows.
        role: uint8 [N], CLEAN, BACKDOOR or CROSS.
        index: int64 [N], position in the original split.
        num_classes: classes of the data set.
    """

    pixels: Bytes
    labels: Labels
    true_labels: Labels
    role: Tensor
    index: Labels
    num_classes: int

    def __repr__(self) -> str:
        poisoned, size = int((self.role != CLEAN).sum()), "x".join(map(str, self.pixels.shape[1:]))
        return f"Images({len(self.labels):,} of {size}, {self.num_classes} classes, {poisoned:,} poisoned)"

    @classmethod
    def clean(cls, pixels: Any, labels: Any, num_classes: int) -> "Images":
        """Images without poison, from tensors, arrays or lists; DataError for other shapes and types, and for labels
        outside 0..num_classes-1."""
        pixels, labels = torch.as_tensor(pixels), torch.as_tensor(labels)
        shape, n = list(pixels.shape), list(labels.shape)
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or shape[1] not in (1, 3) or n != shape[:1]:
            given = f"pixels {shape} of type {pixels.dtype} with labels {n}"
            raise DataError(f"{given}, allowed is uint8 [N, C, H, W] with C 1 or 3, and labels [N]")
        if labels.dtype == torch.bool or labels.is_floating_point():
            raise DataError(f"labels of type {labels.dtype}, allowed are whole numbers")
        labels = labels.to(pixels.device, torch.int64)
        if len(labels) and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
            got = f"{int(labels.min())}..{int(labels.max())}"
            raise DataError(f"labels range over {got}, allowed is 0..{num_classes - 1}")
        role = torch.full_like(labels, CLEAN, dtype=torch.uint8)
        return cls(pixels, labels, labels, role, torch.arange(len(labels), device=labels.device), num_classes)

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], num_classes: int) -> "Images":
        """Images from stored `tensors`; DataError if names, types, lengths or labels are wrong."""
        wanted = {name: torch.uint8 if name in ("pixels", "role") else torch.int64 for name in _TENSORS}
        if {name: tensor.dtype for name, tensor in tensors.items()} != wanted or tensors["pixels"].ndim != 4:
            raise DataError(f"stored images are {', '.join(sorted(tensors))}, wanted are {', '.join(_TENSORS)}")
        both = torch.cat([tensors["labels"], tensors["true_labels"]])
        same = {len(tensor) for tensor in tensors.values()} == {len(both) // 2} and len(both) > 0
        if not same or int(tensors["index"].min()) < 0 or not 0 <= int(both.min()) <= int(both.max()) < num_classes:
            raise DataError(f"stored images need as many indices and labels as pixels, and labels 0..{num_classes - 1}")
        return cls(**tensors, num_classes=num_classes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Images":
        return self._each(lambda name, value: value[index])

    def to(self, device: torch.device) -> "Images":
        """The same images on another device."""
        return self._each(lambda name, value: value.to(device))

    def concat(self, others: "Images") -> "Images":
        """These images and, behind them, `others`."""
        return self._each(lambda name, value: torch.cat([value, getattr(others, name)]))

    def replace_rows(self, others: "Images", rows: Tensor) -> "Images":
        """These images with `others` in place of those at `rows`."""
        return self._each(lambda name, value: value.index_copy(0, rows, getattr(others, name)))

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> "Images":
        return Images(num_classes=self.num_classes, **{name: change(name, t) for name, t in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as a record stores them."""
        return {name: getattr(self, name) for name in _TENSORS}

    def batches(
        self, size: int, *, seed: int | None = None, augment: Augment | None = None, drop_last: bool = False
    ) -> "Batches":
        """Batches of (pixels in [0, 1], labels, true labels); shuffled by `seed` and the epoch if it is given."""
        return Batches(self.pixels, (self.labels, self.true_labels), size, seed, augment, drop_last)


_TENSORS = ("pixels", "labels", "true_labels", "role", "index")


def sample(clean: Images, triggered: Images | None, count: int, seed: int = 0) -> tuple[Images, Images | None]:
    """`count` of the clean images, drawn by `seed`, and the triggered ones that are made from them; `index` of both is
    the position in the sample. ConfigError for a count below 1, DataError where there are no images and as `paired`."""
    require("samples", count, count >= 1, "1 and more")
    if len(clean) == 0:
        raise DataError("there are no clean images to draw samples from; give at least one")
    kept = torch.randperm(len(clean), generator=generator(seed))[:count].sort().values.to(clean.labels.device)
    some = clean[kept]
    drawn = replace(some, index=torch.arange(len(kept), device=kept.device))
    left = None if triggered is None else triggered[torch.isin(triggered.index, some.index)]
    return drawn, replace(left, index=paired(some, left)) if left else None


def paired(clean: Images, triggered: Images) -> Labels:
    """The position in `clean` of the image that each triggered one is made from; DataError unless each has one."""
    where = torch.full((1 + max(int(clean.index.max()), int(triggered.index.max())),), -1).to(clean.index)
    where[clean.index] = torch.arange(len(clean), device=where.device)
    place = where[triggered.index]
    if not (place >= 0).all() or not torch.equal(clean.labels[place], triggered.true_labels):
        raise DataError("the triggered images are not all made from these clean ones, by their `index` and true labels")
    return place


def last_of_each(labels: Labels, share: float) -> Tensor:
    """[N] of bool: the last `share` of each class, at least one image and never all; none of a class that has one."""
    last = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in labels.unique():
        mine = (labels == label).nonzero().flatten()
        last[mine[len(mine) - min(len(mine) - 1, max(1, round(share * len(mine)))) :]] = True
    return last


def check_counts(counts: Tensor, kind: str = "clean") -> list[str]:
    """A line that names the first classes of which a defender has no image of this `kind`, by the `counts` [K]."""
    missing = (counts == 0).nonzero().flatten().tolist()
    names = ", ".join(map(str, missing[:10]))
    return [f"the {kind} images have none of {len(missing)} of {len(counts)} classes: {names}"] if missing else []
