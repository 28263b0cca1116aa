"""Images on their way into a network: as floats in [0, 1], batch by batch, augmented.

Pixels stay uint8 on the device; batches become float one at a time. Order and augmentation are drawn on the CPU.
"""

import copy
import math
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate

from sau.config import check, param
from sau.errors import DataError, require
from sau.types import Batched, Bytes, Pixels

SLACK = 1e-3  # a quarter of a grey level: rounding, as of pixels that were normalised and brought back
OVERSHOOT = 0.4  # bicubic resizing and noise leave [0, 1] by less; normalised images, even of MNIST (-0.42), by more
VALUES_AT_ONCE = 2**22  # pixels of the batches that are augmented together: each kernel launch costs time on a GPU
SMALLEST_BATCH = 32  # that a defense makes unless the user asks for fewer
EMPTY = "the clean set is empty; give at least one labelled image (drop_last leaves out a batch that is not full)"
RngState = dict[str, Any]  # of torch's global generators
# Mean and deviation that were undone: a number for each channel, or one for all; None: the images are in [0, 1].
Statistics = tuple[Sequence[float], Sequence[float]] | tuple[None, None]


def generator(seed: int) -> torch.Generator:
    """A new generator on the CPU."""
    return torch.Generator().manual_seed(seed)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The generator of an epoch's order and augmentation, on the CPU: the same numbers on every device."""
    check_seed(seed)
    return generator((int(seed) * 1_000_003 + epoch) % 2**63)


def check_seed(seed: Any, end: int = 2**63) -> None:
    """ConfigError unless the seed is a whole number from 0 to below `end`."""
    require("seed", seed, isinstance(seed, Integral) and 0 <= int(seed) < end, f"a whole number from 0 to {end - 1}")


def get_rng_state() -> RngState:
    """The state of torch's global generators."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: RngState) -> None:
    """Restore the state; a run may resume with more or fewer CUDA devices."""
    torch.set_rng_state(state["cpu"])
    for device, cuda in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(cuda, device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators inside the block and restore their state after it."""
    check_seed(seed)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # without `devices` it warns of many
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():  # where there is none, it would keep each seed with a stack trace
            torch.cuda.manual_seed_all(seed)
        yield


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]; float pixels pass unchanged."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def in_range(x: Tensor, advice: str = "give the mean=... and std=... of normalised images") -> Tensor:
    """Float pixels in [0, 1]: what lies outside by rounding is clamped, what lies further outside is a DataError."""
    low, high = float(x.min()), float(x.max())
    if not (low >= -SLACK and high <= 1 + SLACK):  # nor is NaN
        found = f"pixels range over [{low:.3g}, {high:.3g}], allowed is [0, 1]"
        raise DataError(f"{found}: divide bytes by 255, or {advice}")
    return x if low >= 0 and high <= 1 else x.clamp(0, 1)


def quantise(x: Pixels) -> Bytes:
    """[0, 1] -> 0..255, clipped and truncated (not rounded), as BackdoorBench writes 8-bit images.

    DataError for bytes. The thousandth of a grey level keeps k/255*255 at k in float32, where it may fall just below.
    """
    if not x.is_floating_point():
        raise DataError(f"pixels to be stored are {x.dtype}, allowed are floats in [0, 1]")
    return (x * 255 + 1e-3).clamp_(0, 255).to(torch.uint8)


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """`x`, drawn on the CPU, on `device`; CUDA copies it from pinned memory, so that nothing waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Augment:
    """Zero-pad, crop back to size at a random place, flip left-right with probability 1/2; in any dtype."""

    padding: int = param(4, "pixels added on every side before the crop", ge=0)
    flip: bool = param(False, "whether images are mirrored")
    one_draw: bool = param(False, "the same crop and flip for the whole batch")

    def __post_init__(self) -> None:
        check(self, " of the augmentation")

    def __call__(self, x: Tensor, generator: torch.Generator, sizes: Sequence[int] | None = None) -> Tensor:
        """The batch `x`, or the batches of `sizes` one behind the other in it, each with draws of its own."""
        h, w = x.shape[-2:]
        draws = torch.cat([self._draw(size, generator) for size in sizes or [len(x)]], 1)
        top, left, mirrored = to_device_async(draws, x.device)
        windows = F.pad(x, (self.padding,) * 4).unfold(2, h, 1).unfold(3, w, 1)  # [B, C, places, places, H, W], a view
        cropped = windows[torch.arange(len(x), device=x.device), :, top, left]
        return torch.where(mirrored.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped) if self.flip else cropped

    def _draw(self, size: int, generator: torch.Generator) -> Tensor:
        """[3, size]: top, left and whether it is mirrored, of each image of a batch."""
        draws = 1 if self.one_draw else size
        corners = torch.randint(2 * self.padding + 1, (2, draws), generator=generator, device="cpu")
        mirrored = torch.rand(1, draws, generator=generator, device="cpu") < 0.5 if self.flip else torch.zeros(1, draws)
        return torch.cat([corners, mirrored.long()]).expand(3, size)


def count_batches(images: int, size: int) -> int:
    """How many batches of `size` they make. A rest of one image, or of fewer than 10 that are also fewer than half a
    batch, joins the last one: batch norm in train mode cannot estimate a channel's deviation from so few."""
    joins = images > size and 0 < images % size < min(10, size, max(2, size / 2))
    return -(-images // size) - joins


@dataclass(eq=False)
class Batches:
    """Epochs over device-resident tensors. The order and the augmentation of epoch e follow from (seed, e) alone."""

    pixels: Tensor
    labels: tuple[Tensor, ...]
    size: int
    seed: int | None = None
    augment: Augment | None = None
    drop_last: bool = False
    epoch: int = 0  # that the next iteration walks through

    def __post_init__(self) -> None:
        self.drop_last = self.drop_last and len(self.pixels) >= self.size

    def __len__(self) -> int:
        return len(self.pixels) // self.size if self.drop_last else count_batches(len(self.pixels), self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n, device = len(self.pixels), self.pixels.device
        generator = epoch_generator(self.seed or 0, self.epoch)
        order = torch.arange(n) if self.seed is None else torch.randperm(n, generator=generator, device="cpu")
        order, sizes = order.to(device), [self.size] * len(self)
        if sizes and not self.drop_last:
            sizes[-1] += n - sum(sizes)  # fewer, or also those that are left over
        together = max(1, VALUES_AT_ONCE // max(1, self.size * math.prod(self.pixels.shape[1:])))
        for block in (sizes[start : start + together] for start in range(0, len(sizes), together)):
            index, order = order[: sum(block)], order[sum(block) :]
            pixels = self.pixels[index]
            if self.augment is not None:
                pixels = self.augment(pixels, generator, block)
            parts = (to_float(pixels), *(labels[index] for labels in self.labels))
            # Not views: a caller may change a batch in place, also under autograd.
            yield from zip(*(part.unsafe_split_with_sizes(block) for part in parts), strict=True)


def clean_batches(data: Any, size: int, device: torch.device, stats: Statistics, seed: int) -> Batched:
    """Batches of (pixels in [0, 1], labels) from a pair of tensors or a loader; DataError where `checked` refuses."""
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pixels, labels = checked(data[0], data[1], stats)
        check_normalised(float(data[0].min()), float(data[0].max()), stats)
        return Batches(pixels.to(device), (labels.to(device),), size, seed)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise DataError(f"clean data is a data set; give DataLoader(data, {SMALLEST_BATCH}, shuffle=True) of torch")
    with suppress(TypeError):  # from `len`, also that of a DataLoader over an endless stream
        if not isinstance(data, Tensor | Iterator) and len(data) >= 0:
            return _Loader(data, device, stats, seed)
    raise DataError(f"clean data of type {type(data).__name__}; give a DataLoader with a length, or two tensors")


def checked(x: Any, y: Any, stats: Statistics) -> tuple[Tensor, Tensor]:
    """Pixels as uint8 or as float in [0, 1] (normalisation undone) and labels as int64; DataError if they cannot be."""
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        got = f"a batch of ({type(x).__name__}, {type(y).__name__}); allowed is a pair of tensors"
        raise DataError(f"{got}, as a DataLoader makes of a data set")
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        advice = "; try x.permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[3] in (1, 3) else ""
        advice = "; try x.unsqueeze(1)" if x.ndim == 3 and x.shape[0] not in (1, 3) else advice
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
    mean, std = stats
    if mean is None or std is None:
        return in_range(x), y.long()
    if len(mean) not in (1, x.shape[1]):
        raise DataError(f"mean and std have {len(mean)} values, images {x.shape[1]} channels; give one for each")
    advice = "other mean and std: these are not those that the images were normalised with"
    return in_range(x * x.new_tensor(std).view(1, -1, 1, 1) + x.new_tensor(mean).view(1, -1, 1, 1), advice), y.long()


def check_normalised(low: float, high: float, stats: Statistics) -> None:
    """DataError if images that are to be normalised, with values from `low` to `high`, are not.

    Values of mean 0 and deviation 1 do not all lie within [-0.4, 1.4], for their variance would be 0.4 * 1.4 at most.
    Where they do, although black would lie below, the images were in [0, 1], and undoing changed them.
    """
    mean, std = stats
    inside = -OVERSHOOT < low <= high < 1 + OVERSHOOT
    if inside and mean and std and all(m > OVERSHOOT * s for m, s in zip(mean, std, strict=True)):
        advice = "leave mean and std out, or give Normalized(model, mean, std) if the network expects it"
        raise DataError(f"pixels range over [{low:.3g}, {high:.3g}], so they are not normalised; {advice}")


class _Loader:
    """A user's loader with every batch checked and moved; its own augmentation and order stay in force.

    Batches of one image, DataLoader's default, are joined to batches of 32. A few images that an ordinary DataLoader
    leaves over join its last batch, as in `Batches`.
    """

    def __init__(self, loader: Any, device: torch.device, stats: Statistics, seed: int) -> None:
        self.loader, self.device, self.stats, self.seed = loader, device, stats, seed
        self.augment: Augment | None = None
        self.epoch, self.size = 0, None  # the loader's own
        self.length = len(loader)
        sampler, size, collate = (getattr(loader, name, None) for name in ("sampler", "batch_size", "collate_fn"))
        single = size == 1 and isinstance(sampler, Sized) and collate is default_collate
        self.joined = SMALLEST_BATCH if single else 1  # so many of its batches make one
        if isinstance(sampler, Sized) and size and (single or not getattr(loader, "drop_last", True)):
            self.length = count_batches(len(sampler), size * self.joined)

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, batches, count = epoch_generator(self.seed, self.epoch), self._checked(), 0
        for count, first in enumerate(batches, 1):
            rest = None if count == self.length else self.joined - 1
            parts = [first, *(islice(batches, rest) if self.length < len(self.loader) else ())]
            if len(sizes := {tuple(x.shape[1:]) for x, _ in parts}) > 1:
                raise DataError(f"images of several sizes, {sorted(sizes)[:2]}; resize them to one, or give batches")
            x, y = map(torch.cat, zip(*parts, strict=True))
            yield self.augment(x, generator) if self.augment else x, y
        if not count:
            raise DataError(EMPTY)
        if count != self.length:
            raise DataError(f"the loader has a length of {self.length} batches, and gives {count}; give a true length")

    def _checked(self) -> Iterator[tuple[Tensor, Tensor]]:
        low, high = math.inf, -math.inf
        for batch in self.loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                got = f"a batch is a {type(batch).__name__}; allowed is (images, labels)"
                raise DataError(f"{got}; give a loader of such batches, or a pair of tensors")
            parts = checked(batch[0], batch[1], self.stats)
            x, y = (part.to(self.device, copy=True) for part in parts)  # a loader may fill the same tensors again
            if self.epoch == 0 and self.stats[0]:  # once is enough
                low, high = min(low, float(batch[0].min())), max(high, float(batch[0].max()))
            yield to_float(x), y
        check_normalised(low, high, self.stats)


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


def rebatch(x: Tensor, y: Tensor, like: Batched) -> Batches:
    """Images made of those of `like`, with its size of batches, seed and augmentation."""
    given: Any = like
    return Batches(x, (y,), given.size, given.seed, given.augment)
