"""Finding the layers that a method needs in a network that it does not know."""

from torch import nn

from sau.errors import ConfigError


def classifier(model: nn.Module, method: str) -> nn.Linear:
    """The last linear layer of `model` in module order; ConfigError if it has none for `method` to move."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise ConfigError(f"the network has no linear layer (Linear), whose weights {method} moves; try ft or sau")
    return found[-1]


def full_name(model: nn.Module, name: str, advice: str) -> str:
    """The name within `model` of the layer that the user calls `name`: as it stands in the user's own network.

    Wrappers put prefixes before it; of several layers whose names end in `name` the one with the fewest is meant.
    Raises ConfigError with `advice` if there is none, or none that stands out.
    """
    ends = [known for known, _ in model.named_modules() if f".{known}".endswith(f".{name}")]
    least = min((known.count(".") for known in ends), default=0)
    nearest = [known for known in ends if known.count(".") == least]
    if len(nearest) != 1 or not name:
        what = "no layer" if not nearest else "several layers"
        raise ConfigError(f"the network has {what} named {name!r}; {advice}")
    return nearest[0]
