"""The networks by name, each taking pixels in [0, 1]."""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sau.errors import ConfigError
from sau.models.normalized import Normalized as Normalized
from sau.models.normalized import eval_mode, to_channels_last

ENLARGED = 224  # the side that torchvision's classifiers were designed for
TIMM = "timm:"  # begins the name of a network of timm
_AUXILIARY = ("googlenet", "inception_v3")  # have further heads in training, which no attack or defense here reads


# Pre-activation ResNet-18 for small images: He et al., "Identity Mappings in Deep Residual Networks", 2016.


class PreActBlock(nn.Module):
    """BN-ReLU-conv, BN-ReLU-conv; a strided 1x1 convolution of the first activation where the shape changes.

    Parameter names and their order are those of the public benchmark, so state dicts can be exchanged.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride=1, padding=1, bias=False)
        self.reshapes = stride != 1 or inputs != outputs
        if self.reshapes:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.bn1(x), inplace=True)
        shortcut = self.shortcut(a) if self.reshapes else x
        return self.conv2(F.relu(self.bn2(self.conv1(a)), inplace=True)) + shortcut


class PreActResNet18(nn.Module):
    """Stem, four stages of two blocks, mean over the image, linear layer. No batch norm before the pooling.

    The first stage has `width` channels (64 as published), the others 2, 4 and 8 times as many.
    """

    def __init__(self, num_classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(PreActBlock(width, width, 1), PreActBlock(width, width, 1))
        self.layer2 = nn.Sequential(PreActBlock(width, 2 * width, 2), PreActBlock(2 * width, 2 * width, 1))
        self.layer3 = nn.Sequential(PreActBlock(2 * width, 4 * width, 2), PreActBlock(4 * width, 4 * width, 1))
        self.layer4 = nn.Sequential(PreActBlock(4 * width, 8 * width, 2), PreActBlock(8 * width, 8 * width, 1))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.linear(self.avgpool(x).flatten(1))


MODELS: dict[str, Callable[..., nn.Module]] = {"preactresnet18": PreActResNet18}  # those that come in widths


def unwrapped(name: str, num_classes: int, width: int | None = None) -> nn.Module:
    """A new network by name as its authors wrote it, without pretrained weights; ConfigError for an unknown name."""
    if name.startswith(TIMM):
        timm, own = library("timm"), name.removeprefix(TIMM)
        if ":" in own or not timm.is_model(own):  # a colon would name another source
            raise ConfigError(f"unknown model {name!r}: timm {timm.__version__} has no network {own!r}")
        return timm.create_model(own, num_classes=num_classes)
    if name in MODELS:
        return MODELS[name](num_classes=num_classes, **({} if width is None else {"width": width}))
    if name not in torchvision_names():
        raise ConfigError(f"unknown model {name!r}; choose {', '.join(MODELS)} or one of torchvision's, like vgg19_bn")
    from torchvision import models

    extra = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    return models.get_model(name, weights=None, num_classes=num_classes, **extra)


def build(
    name: str, num_classes: int, *, width: int | None = None, shape: Sequence[int] = (3, 32, 32),
    mean: Sequence[float], std: Sequence[float], amp: bool = False,
) -> Normalized:  # fmt: skip
    """A new network by name, in the memory layout that convolutions are fastest in.

    `name` is one of `MODELS`, whose first stage has `width` channels (None: as published), or a classifier of
    torchvision or timm, like vgg19_bn and timm:vit_tiny_patch16_224. One that does not take images of `shape` (C, H, W)
    has them enlarged to 224x224 first, and its state-dict keys begin with `1.`. mean, std and amp are those of
    `Normalized`.

    Raises ConfigError for an unknown name, for a width below 1, and for a width where the network has none.
    """
    if width is not None and (width < 1 or name not in MODELS):
        raise ConfigError(f"width is {width}, allowed is 1 and more for {', '.join(MODELS)}, none for other networks")
    net = unwrapped(name, num_classes, width)
    if name not in MODELS:
        try:
            with torch.no_grad(), eval_mode(net):
                net(torch.zeros(1, *shape))
        except (RuntimeError, AssertionError, ValueError):
            net = nn.Sequential(nn.Upsample((ENLARGED, ENLARGED), mode="bilinear", align_corners=False), net)
    return Normalized(to_channels_last(net), mean, std, amp)


def library(name: str) -> Any:
    """timm, transformers or open_clip; ConfigError where it is not installed."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise ConfigError(f"the network needs {name}; pip install -e '.[models]'") from None


def torchvision_names() -> list[str]:
    """Every classifier that the installed torchvision has."""
    from torchvision import models

    return list(models.list_models(module=models))


class _Unfilled(TorchFunctionMode):
    """Initialises no weights; on the meta device, where there are no values, that takes half of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **kwargs)


def state_dict_spec(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Names, shapes and types of the state dict of the network that `make` makes, without its values where possible.

    torchvision's RegNet reads values while it is built; it has no width, so that its name bounds its size.
    """
    try:
        with torch.device("meta"), _Unfilled():
            return make().state_dict()
    except NotImplementedError:
        return make().state_dict()
