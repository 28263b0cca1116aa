"""Where a polarizer stands in a network: the one change of architecture that a defense, NPD, makes.

A polarizer, a 1x1 convolution (first the identity) and a batch norm, is put before a convolution L, which becomes
Sequential(polarizer, norm, layer = L). It cannot be folded into L: L pads with zeros after the batch norm's shift, so a
shift folded into its bias would be wrong along the border.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sau.errors import ConfigError

MARK = ".polarizer.weight"  # ends the state-dict key that only a network with a polarizer has


def insert(model: nn.Module, name: str) -> nn.Sequential:
    """Put a new polarizer, the identity in front of a fresh batch norm, before the convolution `name` of `model`."""
    layer, modules = model.get_submodule(name), list(model.modules())
    if not isinstance(layer, nn.Conv2d):
        raise ConfigError(f"{name} is a {type(layer).__name__}; a polarizer goes before a convolution (Conv2d)")
    place, width = layer.weight, layer.in_channels
    inside = nn.Sequential()
    inside.add_module("polarizer", nn.Conv2d(width, width, 1, bias=False))
    inside.add_module("norm", nn.BatchNorm2d(width))
    nn.init.dirac_(inside.get_parameter("polarizer.weight"))
    inside.to(place.device, place.dtype).add_module("layer", layer)
    inside.train(layer.training)
    for parent in modules:
        for child, module in list(parent._modules.items()):  # a layer may have several names
            if module is layer:
                setattr(parent, child, inside)
    return inside


def make_room(net: nn.Module, names: Iterable[str]) -> None:
    """Put polarizers into `net` where the state dict with these names has them and `net` a convolution."""
    layers = dict(net.named_modules())
    for name in names:
        place = name.removesuffix(MARK)
        if name.endswith(MARK) and isinstance(layers.get(place), nn.Conv2d):
            insert(net, place)


def restore(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """Load the state dict of a network that NPD purified into `net`, of the attacked network's architecture.

    A state dict without polarizers is loaded as it is. Returns `net`.
    """
    make_room(net, weights)
    net.load_state_dict(weights)
    return net
