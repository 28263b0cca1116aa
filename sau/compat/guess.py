"""Which of the networks that `build` makes a state dict belongs to."""

from dataclasses import dataclass
from functools import partial

from torch import nn

from sau.compat.weights import SeveralError, Weights
from sau.errors import RecordError
from sau.models import MODELS, has_width, layout
from sau.models.zoo import torchvision_names, torchvision_plain

_FIRST = ("resnet", "vgg", "densenet", "mobilenet", "wide", "googlenet", "vit", "efficientnet")  # most used


_LEAST = 16  # tensors of the smallest, alexnet


@dataclass(frozen=True)
class Guess:
    """A network that a file's tensors fit by every name and shape.

    Args:
        name: of the network, as `build` takes it.
        width: of a network of `MODELS`, else None.
        classes: its logits.
        prefix: where its tensors lie in the file.
    """

    name: str
    width: int | None
    classes: int
    prefix: str


def guess(found: Weights) -> Guess | None:
    """The network whose names and shapes are in `found`, or None.

    Tried are preactresnet18 of any width and torchvision's classifiers, save regnet, which cannot be laid out without
    the memory for its weights. A network that `build` puts behind an enlargement is found under the prefix `1.`.
    SeveralError if it is there more than once.
    """
    if len(found.tensors) < _LEAST:
        return None
    names = [*MODELS, *sorted(torchvision_names(), key=lambda name: (not name.startswith(_FIRST), name))]
    for name in names:
        if name.startswith("regnet"):
            continue
        try:
            own = layout(partial(unwrapped, name, 10, 64 if has_width(name) else None))
            prefix = found.under(own)
            last = found.tensors[prefix + list(own)[-1]]
            first = found.tensors[prefix + next(iter(own))]
            if 0 in (first.ndim, last.ndim):
                continue
            width = len(first) if has_width(name) else None
            if width is not None and not 0 < width <= 1024:
                continue
            found.fitting(layout(partial(unwrapped, name, len(last), width)))
        except SeveralError:
            raise
        except RecordError:
            continue
        return Guess(name, width, len(last), prefix)
    return None


def unwrapped(name: str, classes: int, width: int | None) -> nn.Module:
    """The network by its name, as its authors wrote it; ConfigError for a name that is unknown."""
    return MODELS[name](classes, width) if has_width(name) else torchvision_plain(name, classes)
