"""Networks without the layers that a defense looks for: each defense repairs them or says in a line what they lack."""

from collections import OrderedDict
from dataclasses import replace
from functools import partial

import pytest
import torch
from defense_rows import ROWS
from torch import Tensor, nn
from torchvision.models import ResNet, VisionTransformer
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers
from toys import pair, same_weights

from sau.defense import FP, NPD, Defense
from sau.errors import ConfigError
from sau.loop import Session


class Residual(nn.Module):
    """Two convolutions with group norms, and a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.GroupNorm(2, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(2, channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))


def vgg() -> nn.Module:
    """Convolutions, biases, no norm."""
    conv = partial(nn.Conv2d, kernel_size=3, padding=1)
    layers = (conv(3, 6), nn.ReLU(), nn.MaxPool2d(2), conv(6, 8), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4))


def group_norm() -> nn.Module:
    """A residual network with group norms."""
    stem = (nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU())
    return nn.Sequential(*stem, Residual(4), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def mlp() -> nn.Module:
    """No convolution, no feature map."""
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 12), nn.ReLU(), nn.Linear(12, 4))


def vit() -> nn.Module:
    """torchvision's, its last layer no longer zero."""
    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 8}
    net = VisionTransformer(image_size=16, patch_size=8, num_classes=4, **sizes)
    nn.init.normal_(net.heads.head.weight)
    return net


def mobile() -> nn.Module:
    """torchvision's MobileNetV3: hardswish, squeeze and excitation with hardsigmoid, convolutions by channel."""
    block = InvertedResidualConfig(8, 3, 16, 8, True, "HS", 2, 1, 1.0)
    return MobileNetV3([block], 16, num_classes=4)


def resnet() -> nn.Module:
    """torchvision's ResNet, a block fewer in three of its stages than the 18 layers have."""
    return ResNet(BasicBlock, [1, 1, 1, 2], num_classes=4)


def vgg_bn() -> nn.Module:
    """torchvision's layers of a VGG with batch norms, a small head behind them."""
    layers = make_layers([6, "M", 8, "M"], batch_norm=True)
    return nn.Sequential(
        OrderedDict(features=layers, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(8, 4))
    )


NETWORKS = {
    "resnet": resnet,
    "vgg with batch norms": vgg_bn,
    "vgg": vgg,
    "group norm": group_norm,
    "mlp": mlp,
    "vit": vit,
    "mobile": mobile,
}


# Why a defense refuses a network; all others repair it. npd puts its layer before a convolution that has to be named.
NO_NORM = dict.fromkeys(("vgg", "group norm", "mlp", "vit"), "no batch norm (BatchNorm2d")
UNNAMED = "no layer named 'layer4.1.conv1'; name a convolution with --target_layer_name"
REFUSED: dict[str, dict[str, str]] = {
    **dict.fromkeys(("anp", "clp", "bnp", "ep", "rnp"), NO_NORM),
    "nad": {"mlp": "no layer with feature maps [B, C, H, W]"},
    "npd": {
        **dict.fromkeys([name for name in NETWORKS if name != "resnet"], UNNAMED),
        "mlp": "no convolution (Conv2d)",
    },
    "i-bau": {"mobile": "hardsigmoid_backward is not implemented"},
}
CONVOLUTIONS = {
    "vgg with batch norms": "features.4",
    "vgg": "3",
    "group norm": "4.conv2",
    "vit": "conv_proj",
    "mobile": "features.2.0",
}  # named for npd


def purified(defense: Defense, network: str) -> None:
    """Other weights than before, or a line that says why they stay; logits as finite as before."""
    torch.manual_seed(0)
    net, lines = NETWORKS[network]().eval(), []
    fixed = defense.purify(net, pair(), session=Session(say=lines.append))
    assert fixed(pair()[0]).isfinite().all()
    assert not same_weights(fixed, net) or any("nothing is pruned" in line for line in lines)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("name", ROWS)
def test_a_defense_repairs_a_network_or_says_what_it_lacks(name, network, one_line):
    defense = ROWS[name].defense
    if isinstance(defense, NPD):
        defense = replace(defense, target_layer_name=NPD.target_layer_name)
    if network not in REFUSED.get(name, {}):
        purified(defense, network)
        return
    with pytest.raises(ConfigError) as refusal:
        purified(defense, network)
    assert REFUSED[name][network] in one_line(refusal.value)


@pytest.mark.parametrize("network", CONVOLUTIONS)
def test_npd_works_before_a_convolution_that_is_named(network):
    purified(NPD(epochs=1, warm_epochs=1, batch_size=8, target_layer_name=CONVOLUTIONS[network]), network)


@pytest.mark.parametrize("network", NETWORKS)
def test_fp_prunes_the_last_convolution_where_there_is_one(network, one_line):
    defense = FP(unit="last_conv", epochs=1, batch_size=8)
    if network != "mlp":
        purified(defense, network)
        return
    with pytest.raises(ConfigError) as refusal:
        purified(defense, network)
    assert "no Conv2d" in one_line(refusal.value) and "--unit linear_input" in str(refusal.value)
