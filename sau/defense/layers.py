"""Finding the layers that a method needs in a network that it does not know."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from sau.errors import ConfigError
from sau.types import Pixels

Layer = TypeVar("Layer", bound=nn.Module)


def classifier(model: nn.Module, x: Pixels, method: str, instead: str = "ft or sau") -> nn.Linear:
    """The linear layer that runs last on `x`, for `method` to change.

    Raises ConfigError if none runs, if it does not make the logits, or if its weight is computed from others.
    """
    ran: list[nn.Linear] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), watching((layer, lambda layer, *_: ran.append(layer)) for layer in linear):
        classes = model(x).shape[1]
    if not ran or ran[-1].out_features != classes:
        raise ConfigError(
            f"no linear layer (Linear) makes the network's {classes} logits, as {method} needs; try {instead}"
        )
    return settable(ran[-1], method)


@contextmanager
def watching(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Inside, each layer calls its hook (layer, inputs, output) whenever it has run."""

    def told(hook: Callable[..., None], layer: nn.Module, inputs: Any, named: dict[str, Any], output: Any) -> None:
        hook(layer, inputs or tuple(named.values()), output)

    handles = [layer.register_forward_hook(partial(told, hook), with_kwargs=True) for layer, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def settable(layer: Layer, method: str) -> Layer:
    """`layer`; ConfigError if its weight is computed from others, so that `method` cannot set it."""
    # Also torch.nn.utils.spectral_norm computes it, before each pass; a ReLU has none.
    if hasattr(layer, "weight") and "weight" not in layer._parameters:
        raise ConfigError(
            f"a weight that {method} sets is computed from others (parametrizations, spectral or weight norm); call "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_spectral_norm first"
        )
    return layer


def full_name(model: nn.Module, name: str, advice: str) -> str:
    """The name within `model` of the layer that the user calls `name`: as it stands in the user's own network.

    Wrappers put prefixes before it; of several layers whose names end in `name` the one with the fewest is meant. A
    layer with several names is returned by the first.
    Raises ConfigError with `advice` if there is none, or none that stands out.
    """
    every = dict(model.named_modules(remove_duplicate=False))
    ends = [known for known in every if f".{known}".endswith(f".{name}")]
    least = min((known.count(".") for known in ends), default=0)
    nearest = {every[known] for known in ends if known.count(".") == least}
    if len(nearest) != 1 or not name:
        what = "no layer" if not nearest else "several layers"
        raise ConfigError(f"the network has {what} named {name!r}; {advice}")
    return next(known for known, module in model.named_modules() if module in nearest)
