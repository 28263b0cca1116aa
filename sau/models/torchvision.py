"""Networks of torchvision by their names, adapted to the class count and the image size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ENLARGED = 224  # the side that torchvision's classifiers were designed for
_AUXILIARY = ("googlenet", "inception_v3")  # have further heads in training, which no attack or defense here reads


class Enlarge(nn.Module):
    """Bilinear enlargement to 224x224, in front of networks that cannot take small images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=(ENLARGED, ENLARGED), mode="bilinear", align_corners=False)


def torchvision_names() -> list[str]:
    """Every classifier that the installed torchvision has."""
    from torchvision import models

    return list(models.list_models(module=models))


def torchvision_net(name: str, num_classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """A new network, without pretrained weights, that maps images [B, *shape] to logits [B, num_classes].

    It takes the images as they are where it can (as the benchmark does); otherwise they are enlarged to 224x224
    first, and its state-dict keys begin with `1.`.
    """
    net = torchvision_plain(name, num_classes)
    return net if _accepts(net, shape) else nn.Sequential(Enlarge(), net)


def torchvision_plain(name: str, num_classes: int) -> nn.Module:
    """The network itself, without anything in front."""
    from torchvision import models

    extra = {"aux_logits": False, "init_weights": True} if name in _AUXILIARY else {}
    net: nn.Module = models.get_model(name, weights=None, num_classes=num_classes, **extra)
    return net


@torch.no_grad()
def _accepts(net: nn.Module, shape: tuple[int, int, int]) -> bool:
    net.eval()
    try:
        net(torch.zeros(1, *shape))
    except (RuntimeError, AssertionError, ValueError):
        return False
    finally:
        net.train()
    return True
