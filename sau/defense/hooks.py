"""Finding layers in any network, and looking at what passes through them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

from sau.errors import ConfigError
from sau.types import Pixels

Layer = TypeVar("Layer", bound=nn.Module)


@contextmanager
def forward_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Inside, each layer calls its hook (layer, inputs, output) after its forward pass."""
    handles = [layer.register_forward_hook(hook) for layer, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def classifier(model: nn.Module, x: Pixels, method: str, instead: str = "ft or sau") -> nn.Linear:
    """The linear layer that runs last on `x`; ConfigError if it does not make the logits or `method` cannot set it."""
    ran: list[nn.Linear] = []
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with torch.no_grad(), forward_hooks((layer, lambda layer, *_: ran.append(layer)) for layer in linear):
        classes = model(x).shape[1]
    if not ran or ran[-1].out_features != classes:
        raise ConfigError(f"no Linear layer makes the network's {classes} logits, as {method} needs; try {instead}")
    return require_plain_weight(ran[-1], method)


def require_plain_weight(layer: Layer, method: str) -> Layer:
    """`layer`; ConfigError if its weight is computed from other parameters, so that `method` cannot set it."""
    if hasattr(layer, "weight") and "weight" not in layer._parameters:  # spectral_norm computes it in each pass
        raise ConfigError(
            f"a weight that {method} sets is computed from others (parametrizations, spectral or weight norm); call "
            "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.remove_spectral_norm first"
        )
    return layer


def resolve_layer(model: nn.Module, name: str, advice: str) -> str:
    """The full name in `model` of the layer `name` of the user's own network, to which wrappers add prefixes.

    Of several layers whose names end in `name` the outermost is meant. ConfigError with `advice` if there is none, or
    more than one.
    """
    layers = dict(model.named_modules(remove_duplicate=False))
    ends = [full for full in layers if f".{full}".endswith(f".{name}")]
    depth = min((full.count(".") for full in ends), default=0)
    found = {layers[full] for full in ends if full.count(".") == depth}
    if len(found) != 1 or not name:
        raise ConfigError(f"the network has {'several layers' if found else 'no layer'} named {name!r}; {advice}")
    return next(full for full, module in model.named_modules() if module in found)
