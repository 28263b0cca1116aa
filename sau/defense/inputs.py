"""The clean images that a caller gives to a defense: checked, in [0, 1], on the device, batch by batch."""

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.images import OVERSHOOT, Augment, Batches, Images, in_range, to_float
from sau.errors import DataError
from sau.types import Batched, Loader
from sau.util import epoch_generator, seeded

EMPTY = "the clean set is empty; give at least one labelled image"


def clean_batches(
    data: Images | Loader | tuple[Tensor, Tensor], size: int, device: torch.device, statistics: "Statistics", seed: int
) -> Batched:
    """Batches of (pixels in [0, 1], labels) from `Images`, a pair of tensors or a loader. DataError for what is none,
    and, when a loader is walked through, for batches that are not (see `checked`)."""
    if isinstance(data, Images):
        data = (data.pixels, data.labels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pixels, labels = checked(data[0], data[1], statistics)
        statistics.check([_range(pixels)] if pixels.is_floating_point() else [])
        return Batches(pixels.to(device), (labels.to(device),), size, seed)
    kind, length = type(data).__name__, -1
    if not isinstance(data, Tensor) and hasattr(data, "__iter__") and not hasattr(data, "__next__"):
        try:
            length = len(data)  # type: ignore[arg-type]
        except TypeError:  # a DataLoader over an endless stream has a `__len__` that raises
            pass
    if length < 0:
        raise DataError(f"clean data of type {kind}; give a DataLoader with a length, or a pair of tensors")
    if length == 0:
        raise DataError(EMPTY)
    return _Loader(data, device, statistics, seed)


class Statistics:
    """`mean` and `std` that the images were normalised with, a number for each channel; None where they were not."""

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.mean, self.std = mean, std

    def undo(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] from images as the caller has them."""
        if self.mean is None or self.std is None:
            return in_range(x)
        if len(self.mean) not in (1, x.shape[1]):
            raise DataError(
                f"mean and std have {len(self.mean)} values, images {x.shape[1]} channels; give one for each"
            )
        return in_range(x * x.new_tensor(self.std).view(1, -1, 1, 1) + x.new_tensor(self.mean).view(1, -1, 1, 1))

    def check(self, ranges: list[tuple[Tensor, Tensor]]) -> None:
        """DataError if no image can have been normalised, by the smallest and largest value of each channel.

        Values of mean 0 and deviation 1 do not all lie within [-0.4, 1.4], for their variance would be 0.4 * 1.4 at
        most. Where they do, although black would lie below, the images were in [0, 1] and `undo` changed them.
        """
        if self.mean is None or self.std is None or not ranges:
            return
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        low = float(min(((low - mean) / std).min() for low, _ in ranges))
        high = float(max(((high - mean) / std).max() for _, high in ranges))
        if -OVERSHOOT < low <= high < 1 + OVERSHOOT and bool((mean > OVERSHOOT * std).all()):
            got = f"mean and std are given, but the pixels range over [{low:.3g}, {high:.3g}]"
            raise DataError(
                f"{got}, so they are not normalised; leave mean and std out, or, if the network expects normalised "
                "images, give Normalized(model, mean, std) in place of model, mean and std"
            )


def _range(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.amin((0, 2, 3)).float().cpu(), x.amax((0, 2, 3)).float().cpu()


def checked(x: Any, y: Any, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """Pixels as uint8 or as float in [0, 1] (normalisation undone) and labels as int64; DataError if they cannot be."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise DataError(f"a batch of ({type(x).__name__}, {type(y).__name__}); allowed is a pair of tensors")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        advice = "; try x.permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[3] in (1, 3) else ""
        raise DataError(f"pixels of shape {tuple(x.shape)}, allowed is [B, C, H, W] with C 1 or 3{advice}")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point() or y.is_complex():
        raise DataError(f"labels of shape {tuple(y.shape)} and type {y.dtype}; allowed are {len(x)} whole numbers")
    if len(x) == 0:
        raise DataError(EMPTY)
    x, y = (part.clone() if part.is_inference() else part for part in (x, y))  # no gradient goes through these
    if x.dtype == torch.uint8:
        return x, y.long()
    if not x.is_floating_point():
        raise DataError(f"pixels of type {x.dtype}; allowed are uint8 0..255 or floats in [0, 1]")
    return statistics.undo(x.detach()), y.long()


class _Loader:
    """A user's loader with every batch checked and moved; its own augmentation and order stay in force."""

    def __init__(self, loader: Any, device: torch.device, statistics: Statistics, seed: int) -> None:
        self.loader, self.device, self.statistics, self.seed = loader, device, statistics, seed
        self.augment: Augment | None = None
        self.epoch, self.size = 0, None  # the loader's own

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, size, ranges = epoch_generator(self.seed, self.epoch), None, []
        for count, batch in enumerate(self.loader, 1):
            if isinstance(batch, Mapping) or not isinstance(batch, tuple | list) or len(batch) < 2:
                keys = f" ({', '.join(map(str, batch))})" if isinstance(batch, Mapping) else ""
                raise DataError(f"a batch is {type(batch).__name__}{keys}; allowed is (images, labels)")
            x, y = checked(batch[0], batch[1], self.statistics)
            size = size or x.shape[1:]
            if count > len(self):
                raise DataError(f"the loader gives more batches than {len(self)}, its length; give one that knows it")
            if x.shape[1:] != size:
                got = f"batch {count} has images {list(x.shape[1:])}, the first one {list(size)}"
                raise DataError(f"{got}; allowed are images of one size")
            if x.is_floating_point():
                ranges.append(_range(x))
            x, y = x.to(self.device), y.to(self.device)
            yield to_float(self.augment(x, generator) if self.augment else x), y
        if size is None:
            raise DataError("the loader gives no batch, or none again; give one that can be walked through anew")
        self.statistics.check(ranges)


def image_count(batches: Any) -> tuple[int, int | None]:
    """How many clean images there are, as far as a loader says, and how many batches it makes of them (None: ours)."""
    if isinstance(batches, Batches):
        return len(batches.pixels), None
    loader = batches.loader
    size = getattr(loader, "batch_size", None)
    source = getattr(loader, "sampler", None) if size else getattr(loader, "dataset", None)
    counts = [len(source)] if isinstance(source, Sized) else []
    counts += [len(loader) * size] if size else []
    return min(counts, default=len(loader)), len(loader)


class CachedBatches(nn.Module):
    """One pass through `batches`, repeated in the same batches. Checkpoints hold it, so that a resumed run has the same
    images, whoever drew their order and augmentation."""

    x: Tensor
    y: Tensor

    def __init__(self, batches: Batched) -> None:
        super().__init__()
        pairs = [(x, y) for x, y, *_ in batches]
        self.sizes = [len(y) for _, y in pairs]
        self.register_buffer("x", torch.cat([x for x, _ in pairs]))
        self.register_buffer("y", torch.cat([y for _, y in pairs]))

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self.x.split(self.sizes), self.y.split(self.sizes), strict=True)


def stack_batches(batches: Batched) -> tuple[Tensor, Tensor]:
    """One pass through `batches` as two tensors: pixels in [0, 1] [N, C, H, W] and labels [N]."""
    pairs = [(x, y) for x, y, *_ in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def unaugmented(batches: Batched) -> tuple[Batched, Augment | None]:
    """The same images as they are, and the augmentation (None if none) that each batch would have gone through."""
    plain: Any = copy.copy(batches)
    augment, plain.augment = plain.augment, None
    return plain, augment


def first_batch(batches: Batched) -> tuple[Tensor, Tensor]:
    """The first batch of the first epoch, not augmented: pixels in [0, 1] [B, C, H, W] and labels [B]."""
    plain: Any = unaugmented(batches)[0]
    plain.set_epoch(0)  # the same one before and after a run; only a user's loader has an order of its own
    x, y, *_ = next(iter(plain))
    return x, y


def rebatch(x: Tensor, y: Tensor, size: int, like: Batched) -> Batches:
    """Images made of those of `like` in batches of `size`, with its seed and its augmentation."""
    given: Any = like
    return Batches(x, (y,), size, given.seed, given.augment)


def peek(batches: Batched) -> Tensor:
    """One image [1, C, H, W], to see how a network runs; opening a loader draws, but not from our numbers."""
    with seeded(0):
        return next(iter(batches))[0][:1]
