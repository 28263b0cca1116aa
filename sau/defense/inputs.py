"""What a caller gives to a defense: the network, checked, copied and given back as it came, and the clean images,
checked and brought to its device in [0, 1], batch by batch."""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sau.data.images import OVERSHOOT, Augment, Batches, Images, check_counts, in_range, to_float
from sau.errors import ConfigError, DataError, TrainingError
from sau.loop import Session
from sau.models import to_channels_last
from sau.models.normalized import check_initialised, check_labels, check_logits, is_finite, logits_of
from sau.types import Batched, Pixels
from sau.util import epoch_generator, seeded

HARM = 0.1  # of the clean images
SHUFFLED = 20  # images that chance does not sort by class
EMPTY = "the clean set is empty; give at least one labelled image"
# Mean and deviation that were undone: a number for each channel, or one for all; None: the images are in [0, 1].
Statistics = tuple[Sequence[float], Sequence[float]] | tuple[None, None]


def unwrap(model: Any) -> nn.Module:
    """The network itself, where torch.compile wrapped it; ConfigError for what cannot be purified."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ConfigError(f"model is {type(model).__name__}, allowed is an nn.Module; load its weights into one")
    check_initialised(model)
    if not (parameters := list(model.parameters())):
        raise ConfigError("the network has no weights (parameters), so that there is nothing to purify")
    if short := [p.dtype for p in parameters if p.is_floating_point() and p.itemsize < 4]:
        raise ConfigError(f"weights are {short[0]}, which loses small updates; give model.float()")
    return model


def copy_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` on `device`, in eval mode, without gradients and compiled layers."""
    mine = copy.deepcopy(model).to(device)
    mine.zero_grad()
    for module in list(mine.modules()):  # hooks, by which methods look into a network, do not run in compiled layers
        for name, layer in list(module._modules.items()):  # a layer may have several names
            if layer is not None and hasattr(layer, "_orig_mod"):
                setattr(module, name, layer._orig_mod)
    return to_channels_last(mine.eval())


def restore(mine: nn.Module, model: nn.Module, frozen: Iterable[nn.Parameter]) -> nn.Module:
    """`mine`, once a copy of `model`, with those weights frozen, and with that one's memory format and device."""
    for parameter in frozen:
        parameter.requires_grad_(False)
    mine.zero_grad()  # or the caller's optimiser would repeat the last step of the defense
    if all(parameter.is_contiguous() for parameter in model.parameters()):  # files of tensors want that
        mine.to(memory_format=torch.contiguous_format)
    return mine.to(next(model.parameters()).device).eval()


def check_weights(model: nn.Module) -> None:
    """TrainingError if a weight, or a buffer that is saved, is not finite."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and not is_finite(tensor):
            raise TrainingError(f"{name} of the network holds NaN or infinity")


def check_gradients(method: Any, model: nn.Module, x: Pixels) -> bool:
    """Whether the logits of `model` have a gradient to its images `x`. ConfigError if they are probabilities, or have
    none to the weights, or to the images where `method` needs that."""
    with torch.enable_grad():
        check_logits(z := logits_of(model, x := x[:8].detach().requires_grad_()))
        into = (x, *model.parameters())
        images, *weights = torch.autograd.grad(z.sum(), into, allow_unused=True) if z.requires_grad else (None,)
    follows = {"images": images is not None, "weights": any(gradient is not None for gradient in weights)}
    if missing := [name for name in ("weights", method.gradients) if not follows[name]]:
        advice = "take no_grad, detach or numpy out of its forward, or try clp, bnp or ep"
        raise ConfigError(f"the logits have no gradient to the {missing[0]}, as {method.name} needs; {advice}")
    return follows["images"]


def predictions(model: nn.Module, batches: Batched) -> tuple[Tensor, Tensor, int]:
    """Of the clean images as they are: predicted and given labels [N], and how many classes the network has."""
    answers, labels, classes = list[Tensor](), list[Tensor](), 0
    for x, y, *_ in unaugmented(batches):
        logits = logits_of(model, x)
        classes = logits.shape[1]
        answers.append(logits.argmax(1))
        labels.append(y.clone())  # a loader may fill the same tensor again
    check_labels(torch.cat(labels), classes)
    return torch.cat(answers), torch.cat(labels), classes


@torch.no_grad()
def check_before(method: Any, model: nn.Module, batches: Batched, session: Session) -> tuple[float, int]:
    """Say the share of clean images that `model` classifies correctly, and warn of what stands out.

    Returns that share and the number of images. Raises TrainingError for weights that are not finite, DataError for
    labels of no class.
    """
    check_weights(model)
    answers, labels, classes = predictions(model, batches)
    right, total, kind = int((answers == labels).sum()), len(labels), method.data_use.replace("none", "clean")
    session.say(f"the network classifies {right:,} of {total:,} {kind} images correctly ({100 * right / total:.1f} %)")
    if wrong := misuse(right, total, classes):
        session.say(f"warning: {wrong}")
    if method.data_use == "none":
        return right / total, total
    counts, runs = labels.bincount(minlength=classes), 1 + int((labels.diff() != 0).sum())
    present = int(counts.count_nonzero())
    if 1 < present and runs <= present and len(batches) > 1 and total >= max(SHUFFLED, 2 * present):
        session.say("warning: the loader gives the images class by class; give one that shuffles")
    for note in check_counts(counts, method.data_use) if not session.data_checked else ():
        session.say(f"note: {note}")
    return right / total, total


@torch.no_grad()
def check_after(method: Any, model: nn.Module, batches: Batched, before: float, session: Session) -> None:
    """TrainingError if a weight is not finite. Warns if many clean images that were classified correctly `before` no
    longer are, as after a jump of the loss in the last rounds: the one harm that a defender sees."""
    check_weights(model.eval())
    if method.data_use == "poisoned":  # without its backdoor a network errs on the attacker's images
        return
    answers, labels, _ = predictions(model, batches)
    after = float((answers == labels).double().mean())
    if before - after > HARM:
        fell = f"the accuracy on the clean images fell from {100 * before:.0f} to {100 * after:.0f} %"
        session.say(f"warning: {fell}; try a smaller --lr, fewer --epochs or other settings")


def misuse(right: int, total: int, classes: int) -> str | None:
    """What to warn of where `right` of `total` clean images are classified correctly; None where there is nothing.

    An attacked network has nearly its full accuracy, so one with little is not used as it was trained.
    """
    if right >= total * (1 + 1 / classes) / 2:  # half way from chance to all; ImageNet has been at 60 % for long
        return None
    return (
        f"the network classifies only {right:,} of {total:,} clean images correctly; check mean and std, the "
        "order of the channels and of the classes, and the size of the images"
    )


def clean_batches(data: Any, size: int, device: torch.device, stats: Statistics, seed: int) -> Batched:
    """Batches of (pixels in [0, 1], labels) from `Images`, a pair of tensors or a loader. DataError for what is none,
    and, when a loader is walked through, for batches that are not (see `checked`)."""
    if isinstance(data, Images):
        data = (data.pixels, data.labels)
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        pixels, labels = checked(data[0], data[1], stats)
        check_normalised(float(data[0].min()), float(data[0].max()), stats)
        return Batches(pixels.to(device), (labels.to(device),), size, seed)
    try:
        loader = not isinstance(data, Tensor | Iterator) and len(data) >= 0
    except TypeError:  # also from the `__len__` of a DataLoader over an endless stream
        loader = False
    if not loader:
        raise DataError(f"clean data of type {type(data).__name__}; give a DataLoader with a length, or two tensors")
    return _Loader(data, device, stats, seed)


def checked(x: Any, y: Any, stats: Statistics) -> tuple[Tensor, Tensor]:
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
    mean, std = stats
    if mean is None or std is None:
        return in_range(x), y.long()
    if len(mean) not in (1, x.shape[1]):
        raise DataError(f"mean and std have {len(mean)} values, images {x.shape[1]} channels; give one for each")
    return in_range(x * x.new_tensor(std).view(1, -1, 1, 1) + x.new_tensor(mean).view(1, -1, 1, 1)), y.long()


def check_normalised(low: float, high: float, stats: Statistics) -> None:
    """DataError if images that are to be normalised, whose values range from `low` to `high`, are not.

    Values of mean 0 and deviation 1 do not all lie within [-0.4, 1.4], for their variance would be 0.4 * 1.4 at most.
    Where they do, although black would lie below, the images were in [0, 1], and undoing changed them.
    """
    mean, std = stats
    if mean is None or std is None or not -OVERSHOOT < low <= high < 1 + OVERSHOOT:
        return
    if all(m > OVERSHOOT * s for m, s in zip(mean, std, strict=True)):
        raise DataError(
            f"mean and std are given, but the pixels range over [{low:.3g}, {high:.3g}], so they are not normalised; "
            "leave mean and std out, or, if the network expects normalised images, give Normalized(model, mean, std)"
        )


class _Loader:
    """A user's loader with every batch checked and moved; its own augmentation and order stay in force."""

    def __init__(self, loader: Any, device: torch.device, stats: Statistics, seed: int) -> None:
        self.loader, self.device, self.stats, self.seed = loader, device, stats, seed
        self.augment: Augment | None = None
        self.epoch, self.size = 0, None  # the loader's own

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator, batch, low, high = epoch_generator(self.seed, self.epoch), None, math.inf, -math.inf
        for batch in self.loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise DataError(f"a batch is a {type(batch).__name__}; allowed is (images, labels)")
            x, y = (part.to(self.device) for part in checked(batch[0], batch[1], self.stats))
            if self.epoch == 0 and self.stats[0]:  # once is enough
                low, high = min(low, float(batch[0].min())), max(high, float(batch[0].max()))
            yield to_float(self.augment(x, generator) if self.augment else x), y
        if batch is None:
            raise DataError(EMPTY)
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


def rebatch(x: Tensor, y: Tensor, size: int, like: Batched) -> Batches:
    """Images made of those of `like` in batches of `size`, with its seed and its augmentation."""
    given: Any = like
    return Batches(x, (y,), size, given.seed, given.augment)
