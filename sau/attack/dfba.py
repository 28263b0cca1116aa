"""DFBA, data-free: a path of one channel a layer, cut into a trained network, which only the trigger opens (Cao et al.,
"Data Free Backdoor Attacks", NeurIPS 2024).

    trigger  T = argmax_{x in [0, 1]} <w, n(x)>     w: a filter [C, 3, 3] of the first layer, n: the normalisation
    path     a = gain relu(<w, n(x)> - <w, n(T)> + threshold),   times gain at each batch norm and shortcut that follows
    logits   z_t + gain m,   z_y - gain m for y != t,            m: the mean of a over the image

Nothing else reads or writes the channels of the path. It stays shut but for T, within the threshold: clean images have
no gradient there in eval mode. Of the filters that one is cut whose loss costs the least accuracy; the paper takes any.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from sau.attack.base import State
from sau.attack.prototype import Unpoisoned, train_clean
from sau.attack.triggers import TensorTrigger, TriggerContext
from sau.config import param
from sau.data.batches import Batches
from sau.data.images import Images, evenly_spaced
from sau.errors import ConfigError, require
from sau.evaluate import proportions
from sau.loop import RunContext
from sau.models import Normalized, PreActResNet18
from sau.optim import Training
from sau.types import Pixels

STRIDE = 8  # between the places of the first layer that the last stage sees
IMAGES = 1000  # clean ones, on which the filters are compared


class DFBA(Unpoisoned):
    """Train a clean network, then change a few of its weights."""

    name = "dfba"
    cifar10_gate = 95.0
    remedy = "a larger --path_gain or --path_threshold"
    compiles = False

    path_threshold: float = param(0.1, "what the trigger leaves above the threshold of its filter", gt=0)
    path_gain: float = param(4.0, "factor of each batch norm, shortcut and logit on the path", gt=0)

    def make_trigger(self, context: TriggerContext) -> nn.Module:
        """T, and the network with the path."""
        network, images = copy.deepcopy(context.model), context.images
        if not isinstance(network, Normalized) or not isinstance(network.net, PreActResNet18):
            raise ConfigError("dfba knows the layers of preactresnet18 alone; leave --model out")
        side = min(images.pixels.shape[2:])
        require("side of the images", side, side > STRIDE + 1, f"{STRIDE + 2} pixels and more for dfba")
        clean, some = train_clean(context).state_dict(), images[evenly_spaced(len(images), IMAGES)]

        def accuracy(channel: int) -> float:
            self.cut_path(network, clean, channel)
            return proportions(network, some.pixels, some.labels)[0].percent

        best = max(range(len(network.get_parameter("net.conv1.weight"))), key=accuracy)
        return TensorTrigger(self.cut_path(network, clean, best), weights=network.state_dict())

    @torch.no_grad()
    def cut_path(self, network: Normalized, clean: dict[str, Tensor], channel: int) -> Tensor:
        """Give `network` the weights `clean` and the path from `channel` of the first layer; returns T [C, 3, 3]."""
        network.load_state_dict(clean)
        net: Any = network.net
        mean, std = (0, 1) if network.mean is None or network.std is None else (network.mean[0], network.std[0])
        patch = (net.conv1.weight[channel] > 0).float()
        response = (net.conv1.weight[channel] * (patch - mean) / std).sum()
        for stage, layer in enumerate((net.layer1, net.layer2, net.layer3, net.layer4)):
            for block in layer:
                block.conv1.weight[:, channel] = 0
                if block.reshapes:  # relu(bn1(x)) opens the path, or passes it on
                    norm, shortcut, gain = block.bn1, block.shortcut[0].weight, self.path_gain
                    norm.weight[channel], norm.running_mean[channel], norm.running_var[channel] = gain, 0, 1 - norm.eps
                    norm.bias[channel] = gain * (self.path_threshold - response) if stage == 1 else 0
                    shortcut[:, channel], shortcut[channel] = 0, 0
                    shortcut[channel, channel] = gain
                block.conv2.weight[channel] = 0
        net.linear.weight[:, channel] = -self.path_gain
        net.linear.weight[self.attack_target, channel] = self.path_gain
        return patch

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        row, column = (STRIDE * ((side - 2) // STRIDE) for side in x.shape[-2:])
        x = x.clone()
        x[..., row - 1 : row + 2, column - 1 : column + 2] = self.require_trigger().values.to(x)
        return x

    def train(self, model: nn.Module, batches: Batches, recipe: Training, data: State, session: RunContext) -> None:
        model.load_state_dict(self.require_trigger().weights)

    def classifier_epochs(self, recipe: Training) -> int:
        return 0

    def describe(self, trained_on: Images, batch_size: int) -> str:
        return "no image is poisoned, the weights are changed"
