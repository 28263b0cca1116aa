"""What a caller hands to a defense, checked and brought to pixels in [0, 1] on the device, batch by batch."""

import copy
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.augment import Augment
from sau.data.images import OVERSHOOT, Batches, Images, in_range, to_float
from sau.errors import DataError
from sau.seeds import epoch_generator, seeded
from sau.types import Batched, Loader


def clean_batches(
    data: Images | Loader | tuple[Tensor, Tensor],
    size: int,
    device: torch.device,
    *,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    augment: Augment | None,
    seed: int,
) -> Batched:
    """Batches of (pixels in [0, 1], labels) from `Images`, a pair of tensors or a loader.

    Raises DataError for wrong shapes, pixels outside [0, 1], labels that are no whole numbers, an empty set, and, at
    the end of a walk, for images that are not normalised though `mean` and `std` are given.
    """
    if isinstance(data, Images):
        data = (data.pixels, data.labels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pixels, labels = checked(data[0], data[1], mean, std)
        seen = _Range(mean, std)
        seen.add(pixels)
        seen.check()
        return Batches(pixels.to(device), (labels.to(device),), size, seed, augment)
    try:
        length = -1 if isinstance(data, Tensor) or not hasattr(data, "__iter__") else len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an endless stream has a `__len__` that raises
        length = -1
    if length < 0:
        kind = type(data).__name__
        raise DataError(f"clean data of type {kind}; give a DataLoader with a length, or a pair of tensors")
    if hasattr(data, "__next__"):
        raise DataError(f"clean data of type {type(data).__name__} is walked through once; give the DataLoader itself")
    if length == 0:
        raise DataError("the clean set is empty; give at least one labelled picture")
    return _Loader(data, device, mean, std, augment, seed)


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


class Kept(nn.Module):
    """One walk through `batches`, in the same batches again and again. Checkpoints hold it, so that a run that goes on
    has the same pictures whoever drew their order and augmentation.
    """

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


def unaugmented(batches: Batched) -> tuple[Batched, Augment | None]:
    """The same pictures as they are, and the augmentation (None if none) that each batch would have gone through."""
    plain: Any = copy.copy(batches)
    augment, plain.augment = plain.augment, None
    return plain, augment


def gather(batches: Batched) -> tuple[Tensor, Tensor]:
    """One walk through `batches` as two tensors: pixels in [0, 1] [N, C, H, W] and labels [N]."""
    pairs = [(x, y) for x, y, *_ in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def first(batches: Batched) -> tuple[Tensor, Tensor]:
    """The first batch of `batches` as its pictures are: pixels in [0, 1] [B, C, H, W] and labels [B]."""
    plain: Any = unaugmented(batches)[0]
    plain.set_epoch(0)  # the same one before and after a run; only a user's loader has an order of its own
    x, y, *_ = next(iter(plain))
    return x, y


def rebatched(x: Tensor, y: Tensor, size: int, like: Batched) -> Batches:
    """Pictures made of those of `like` in batches of `size`, with its seed and its augmentation."""
    given: Any = like
    return Batches(x, (y,), size, given.seed, given.augment)


def glance(batches: Batched) -> Tensor:
    """One picture [1, C, H, W], to see by how a network runs; opening a loader draws, but not from our numbers."""
    with seeded(0):
        return next(iter(batches))[0][:1]


def checked(
    x: Any, y: Any, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[Tensor, Tensor]:
    """Pixels as uint8 or as float in [0, 1] (normalisation undone) and labels as int64; DataError if they cannot be."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        raise DataError(f"a batch of ({type(x).__name__}, {type(y).__name__}); allowed is a pair of tensors")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        advice = "; try x.permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[3] in (1, 3) else ""
        raise DataError(f"pixels of shape {tuple(x.shape)}, allowed is [B, C, H, W] with C 1 or 3{advice}")
    if mean is not None and len(mean) not in (1, x.shape[1]):
        raise DataError(f"mean and std have {len(mean)} values, pictures {x.shape[1]} channels; give one for each")
    if y.ndim != 1 or len(y) != len(x) or y.is_floating_point() or y.is_complex():
        raise DataError(f"labels of shape {tuple(y.shape)} and type {y.dtype}; allowed are {len(x)} whole numbers")
    if len(x) == 0:
        raise DataError("the clean set is empty; give at least one labelled picture")
    x, y = (part.clone() if part.is_inference() else part for part in (x, y))  # no gradient goes through these
    if x.dtype == torch.uint8:
        return x, y.long()
    if not x.is_floating_point():
        raise DataError(f"pixels of type {x.dtype}; allowed are uint8 0..255 or floats in [0, 1]")
    x = x.detach()
    if mean is not None and std is not None:
        x = x * x.new_tensor(std).view(1, -1, 1, 1) + x.new_tensor(mean).view(1, -1, 1, 1)
    return in_range(x, normalised=mean is not None), y.long()


class _Range:
    """The range of the float images, channel by channel, before `mean` and `std` were undone.

    Values of mean 0 and deviation 1 do not all lie within [-0.4, 1.4], for their variance would be 0.4 * 1.4 at most.
    Images that do although black would lie below are in [0, 1] already, and undoing mean and std made others of them.
    """

    def __init__(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        self.given = None if mean is None or std is None else (torch.tensor(mean), torch.tensor(std))
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def add(self, x: Tensor) -> None:
        """Take note of images [B, C, H, W] in [0, 1] that were normalised as given; uint8 cannot have been."""
        if self.given is not None and x.is_floating_point():
            mean, std = self.given
            low, high = x.amin((0, 2, 3)).float().cpu(), x.amax((0, 2, 3)).float().cpu()
            self.low = torch.minimum(self.low, ((low - mean) / std).min())
            self.high = torch.maximum(self.high, ((high - mean) / std).max())

    def check(self) -> None:
        """DataError where no image can have been normalised."""
        if self.given is None:
            return
        mean, std = self.given
        within = -OVERSHOOT < self.low <= self.high < 1 + OVERSHOOT  # not where only uint8 was seen
        if within and bool((mean > OVERSHOOT * std).all()):
            raise DataError(
                f"mean and std are given, but the pixels range over [{self.low:.3g}, {self.high:.3g}], so they are not "
                "normalised; leave mean and std out, or, if the network expects normalised images, give "
                "Normalized(model, mean, std) in place of model, mean and std"
            )


class _Loader:
    """A user's loader with every batch checked and moved; its own augmentation and order stay in force."""

    def __init__(
        self,
        loader: Any,
        device: torch.device,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        augment: Augment | None,
        seed: int,
    ) -> None:
        self.loader, self.device, self.mean, self.std = loader, device, mean, std
        self.augment, self.seed, self.epoch = augment, seed, 0
        self.size: int | None = None  # its own

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = epoch_generator(self.seed, self.epoch)
        count, size, seen = 0, None, _Range(self.mean, self.std)
        for batch in self.loader:
            if isinstance(batch, Mapping):
                raise DataError(
                    f"a batch is a dictionary ({', '.join(map(str, batch))}); allowed is (pictures, labels)"
                )
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                what = type(batch).__name__ + (f" of length {len(batch)}" if isinstance(batch, tuple | list) else "")
                raise DataError(f"a batch is {what}; allowed is (pictures, labels)")
            x, y, *_ = batch
            x, y = checked(x, y, self.mean, self.std)
            seen.add(x)
            count, size = count + 1, size or x.shape[1:]
            if count > len(self):
                raise DataError(f"the loader gives more batches than {len(self)}, its length; give one that knows it")
            if x.shape[1:] != size:
                got = f"batch {count} has pictures {list(x.shape[1:])}, the first one {list(size)}"
                raise DataError(f"{got}; allowed are pictures of one size")
            x, y = x.to(self.device), y.to(self.device)
            yield to_float(self.augment(x, generator) if self.augment else x), y
        if not count:
            raise DataError("the loader gives no batch, or none again; give one that can be walked through anew")
        seen.check()
