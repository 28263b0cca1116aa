"""A data set as tensors, and random augmentation of its batches.

Pixels stay uint8 on the device; batches become float one at a time. Augmentation is drawn on the CPU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sau.config import check, param
from sau.errors import DataError, require
from sau.types import Bytes, Labels, Pixels
from sau.util import epoch_generator, generator

SLACK = 1e-3  # a quarter of a grey level: rounding, as of pixels that were normalised and brought back
OVERSHOOT = 0.4  # bicubic resizing and noise leave [0, 1] by less; normalised images, even of MNIST (-0.42), by more
VALUES_AT_ONCE = 2**22  # pixels of the batches that are augmented together: each kernel launch costs time on a GPU
CLEAN, BACKDOOR, CROSS = 0, 1, 2  # roles of an image; cross images carry a trigger and keep their label


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [0, 1]; float pixels pass unchanged."""
    return pixels.float().div_(255) if pixels.dtype == torch.uint8 else pixels


def in_range(x: Tensor) -> Tensor:
    """Float pixels in [0, 1]: what lies outside by rounding is clamped, what lies further outside is a DataError."""
    low, high = float(x.min()), float(x.max())
    if not (low >= -SLACK and high <= 1 + SLACK):  # nor is NaN
        raise DataError(
            f"pixels range over [{low:.3g}, {high:.3g}], allowed is [0, 1]: divide bytes by 255, clamp what resizing "
            "or noise left outside, and give purify the mean=... and std=... of normalised images"
        )
    return x if low >= 0 and high <= 1 else x.clamp(0, 1)


def quantise(x: Pixels) -> Bytes:
    """[0, 1] -> 0..255, clipped and truncated (not rounded), as BackdoorBench writes 8-bit images.

    The thousandth of a grey level keeps k/255*255 at k in float32, where it may fall just below.
    """
    return (x * 255 + 1e-3).clamp_(0, 255).to(torch.uint8)


def evenly_spaced(count: int, most: int) -> Tensor:
    """Up to `most` of `count` positions, evenly spaced, for data sets may be sorted by class."""
    return torch.linspace(0, count - 1, min(count, most)).long()


def to_device_async(x: Tensor, device: torch.device) -> Tensor:
    """`x`, drawn on the CPU, on `device`; CUDA copies it from pinned memory, so that nothing waits for the copy."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


@dataclass(frozen=True)
class Augment:
    """Zero-pad, crop back to size at a random place, flip left-right with probability 1/2. Bytes stay bytes."""

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


def random_rotate(x: Tensor, degrees: float, *, one_draw: bool = False) -> Tensor:
    """Rotate float images [B, C, H, W] by angles from U(-degrees, degrees), bilinearly, zeros coming in at the corners;
    with `one_draw` all by the same angle."""
    angle = (2 * torch.rand(1 if one_draw else len(x)) - 1) * math.radians(degrees)
    angle = to_device_async(angle.to(x.dtype), x.device).expand(len(x))
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    ratio = x.shape[-2] / x.shape[-1]  # coordinates run from -1 to 1 along both sides, whatever their lengths
    matrix = torch.stack([cos, -sin * ratio, zero, sin / ratio, cos, zero], 1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


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

    @classmethod
    def clean(cls, pixels: Bytes, labels: Labels, num_classes: int) -> "Images":
        """Images without poison; DataError for other shapes and types, and labels outside 0..num_classes-1."""
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
        """Batches of (pixels in [0, 1], labels, true labels); shuffled anew each epoch if `seed` is given."""
        return Batches(self.pixels, (self.labels, self.true_labels), size, seed, augment, drop_last)


_TENSORS = ("pixels", "labels", "true_labels", "role", "index")


@dataclass(eq=False)
class Batches:
    """Epochs over device-resident tensors. The order and the augmentation of epoch e follow from (seed, e) alone.

    A single image that is left over joins the last batch: batch norm in train mode cannot do with one.
    """

    pixels: Tensor
    labels: tuple[Tensor, ...]
    size: int
    seed: int | None = None
    augment: Augment | None = None
    drop_last: bool = False
    epoch: int = 0

    def __post_init__(self) -> None:
        self.drop_last = self.drop_last and len(self.pixels) >= self.size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration walks through."""
        self.epoch = epoch

    def __len__(self) -> int:
        n = len(self.pixels)
        left_out = self.drop_last or (n % self.size == 1 and n > 1)
        return n // self.size if left_out else -(-n // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        n, device = len(self.pixels), self.pixels.device
        generator = epoch_generator(self.seed or 0, self.epoch)
        order = torch.arange(n) if self.seed is None else torch.randperm(n, generator=generator, device="cpu")
        order = order.to(device)
        sizes = [self.size] * len(self)
        if sizes and not self.drop_last:
            sizes[-1] += n - sum(sizes)  # fewer, or one more that is left over
        together = max(1, VALUES_AT_ONCE // max(1, self.size * math.prod(self.pixels.shape[1:])))
        for block in (sizes[start : start + together] for start in range(0, len(sizes), together)):
            index, order = order[: sum(block)], order[sum(block) :]
            pixels = self.pixels[index]
            if self.augment is not None:
                pixels = self.augment(pixels, generator, block)
            parts = (to_float(pixels), *(labels[index] for labels in self.labels))
            # Not views: a caller may change a batch in place, also under autograd.
            yield from zip(*(part.unsafe_split_with_sizes(block) for part in parts), strict=True)


def sample(clean: Images, triggered: Images | None, count: int, seed: int = 0) -> tuple[Images, Images | None]:
    """`count` of the clean images, drawn by `seed`, and those of the triggered ones that are made from them; `index`
    of both is then the position in the sample. ConfigError for a count below 1, DataError where there are no images.
    """
    require("samples", count, count >= 1, "1 and more")
    if len(clean) == 0:
        raise DataError("there are no clean images to draw samples from; give at least one")
    kept = torch.randperm(len(clean), generator=generator(seed))[:count].sort().values.to(clean.labels.device)
    drawn = replace(clean[kept], index=torch.arange(len(kept), device=kept.device))
    if triggered is None or len(triggered) == 0:
        return drawn, None
    place = _positions(clean[kept], triggered)
    found = place >= 0
    return drawn, replace(triggered[found], index=place[found]) if found.any() else None


def paired(clean: Images, triggered: Images) -> Labels:
    """The position in `clean` of the image that each triggered one is made from, by `index`; DataError unless each has
    one, whose label is its true label."""
    place = _positions(clean, triggered)
    if not (place >= 0).all() or not torch.equal(clean.labels[place], triggered.true_labels):
        raise DataError(
            f"of {len(triggered)} triggered images some are made from others than the {len(clean)} clean ones, by "
            "their `index` and true labels; give those that they were made from"
        )
    return place


def _positions(clean: Images, triggered: Images) -> Labels:
    """The same; -1 for an image that is not in `clean`."""
    where = torch.full((1 + max(int(clean.index.max()), int(triggered.index.max())),), -1).to(clean.index)
    where[clean.index] = torch.arange(len(clean), device=where.device)
    return where[triggered.index]


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
