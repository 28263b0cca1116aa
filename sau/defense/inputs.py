"""The clean images that a caller gives to a defense: checked, in [0, 1], on the device, batch by batch."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sau.data.images import OVERSHOOT, Augment, Batches, Images, in_range, to_float
from sau.errors import DataError
from sau.types import Batched, Loader
from sau.util import epoch_generator, seeded

EMPTY = "the clean set is empty; give at least one labelled image"
Statistics = Sequence[float] | None  # a number for each channel, or one for all; None: the images are in [0, 1]


def clean_batches(
    data: Images | Loader | tuple[Tensor, Tensor], size: int, device: torch.device, mean: Statistics, std: Statistics,
    seed: int,
) -> Batched:  # fmt: skip
    """Batches of (pixels in [0, 1], labels) from `Images`, a pair of tensors or a loader. DataError for what is none,
    and, when a loader is walked through, for batches that are not (see `checked`)."""
    if isinstance(data, Images):
        data = (data.pixels, data.labels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pixels, labels = checked(data[0], data[1], mean, std)
        check_normalised([pixels], mean, std)
        return Batches(pixels.to(device), (labels.to(device),), size, seed)
    try:
        length = -1 if isinstance(data, Tensor) or hasattr(data, "__next__") else len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an endless stream has a `__len__` that raises
        length = -1
    if length < 0:
        raise DataError(f"clean data of type {type(data).__name__}; give a DataLoader with a length, or two tensors")
    if length == 0:
        raise DataError(EMPTY)
    return _Loader(data, device, mean, std, seed)


def checked(x: Any, y: Any, mean: Statistics, std: Statistics) -> tuple[Tensor, Tensor]:
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
    x, y = (part.clone() if part.is_inference() else part.detach() for part in (x, y))  # inference has no gradients
    if x.dtype == torch.uint8:
        return x, y.long()
    if not x.is_floating_point():
        raise DataError(f"pixels of type {x.dtype}; allowed are uint8 0..255 or floats in [0, 1]")
    if mean is None or std is None:
        return in_range(x), y.long()
    if len(mean) not in (1, x.shape[1]):
        raise DataError(f"mean and std have {len(mean)} values, images {x.shape[1]} channels; give one for each")
    return in_range(x * x.new_tensor(std).view(1, -1, 1, 1) + x.new_tensor(mean).view(1, -1, 1, 1)), y.long()


def check_normalised(batches: list[Tensor], mean: Statistics, std: Statistics) -> None:
    """DataError if no image was normalised, by batches [B, C, H, W] after `mean` and `std` were undone; their smallest
    and largest pixels are enough.

    Values of mean 0 and deviation 1 do not all lie within [-0.4, 1.4], for their variance would be 0.4 * 1.4 at most.
    Where they do, although black would lie below, the images were in [0, 1], and undoing changed them.
    """
    if mean is None or std is None or batches[0].dtype == torch.uint8:
        return
    m, s = torch.tensor(mean), torch.tensor(std)
    low = min(float(((x.amin((0, 2, 3)).cpu() - m) / s).min()) for x in batches)
    high = max(float(((x.amax((0, 2, 3)).cpu() - m) / s).max()) for x in batches)
    if -OVERSHOOT < low <= high < 1 + OVERSHOOT and bool((m > OVERSHOOT * s).all()):
        raise DataError(
            f"mean and std are given, but the pixels range over [{low:.3g}, {high:.3g}], so they are not normalised; "
            "leave mean and std out, or, if the network expects normalised images, give Normalized(model, mean, std)"
        )


class _Loader:
    """A user's loader with every batch checked and moved; its own augmentation and order stay in force."""

    def __init__(self, loader: Any, device: torch.device, mean: Statistics, std: Statistics, seed: int) -> None:
        self.loader, self.device, self.mean, self.std, self.seed = loader, device, mean, std, seed
        self.augment: Augment | None = None
        self.epoch, self.size = 0, None  # the loader's own

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, batch, ends = epoch_generator(self.seed, self.epoch), None, list[Tensor]()
        for batch in self.loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise DataError(f"a batch is a {type(batch).__name__}; allowed is (images, labels)")
            x, y = (part.to(self.device) for part in checked(batch[0], batch[1], self.mean, self.std))
            if self.epoch == 0 and self.mean is not None:  # once is enough
                ends.append(torch.stack([x.amin((0, 2, 3)), x.amax((0, 2, 3))])[..., None, None])
            yield to_float(self.augment(x, generator) if self.augment else x), y
        if batch is None:
            raise DataError(EMPTY)
        if ends:
            check_normalised(ends, self.mean, self.std)


def unaugmented(batches: Batched) -> Batched:
    """The same images as they are."""
    plain: Any = copy.copy(batches)
    plain.augment = None
    return plain


def first_batch(batches: Batched) -> tuple[Tensor, Tensor]:
    """A batch to see how a network runs: pixels in [0, 1] [B, C, H, W] and labels [B]."""
    with seeded(0):  # opening a loader draws, but not from our numbers
        x, y, *_ = next(iter(batches))
    return x, y


def stack_batches(batches: Batched) -> tuple[Tensor, Tensor]:
    """One pass through `batches`, not augmented, as two tensors: pixels in [0, 1] [N, C, H, W] and labels [N]."""
    pairs = [(x, y) for x, y, *_ in unaugmented(batches)]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def rebatch(x: Tensor, y: Tensor, size: int, like: Batched) -> Batches:
    """Images made of those of `like` in batches of `size`, with its seed and its augmentation."""
    given: Any = like
    return Batches(x, (y,), size, given.seed, given.augment)
