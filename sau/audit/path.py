"""The straight path from the attacked weights to the purified ones (Min, Qin, Zhang, Shen, Cheng, "Uncovering,
Explaining, and Mitigating the Superficial Safety of Backdoor Defense", NeurIPS 2024):

    W(s) = (1 - s) W_b + s W_p,    s from 0, the attacked network, to 1, the purified one

Where the ASR is high over most of it, a small move of the weights towards W_b brings the backdoor back.
"""

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sau.data.augment import Augment
from sau.data.images import Images

STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
BATCH = 256


def connected(attacked: nn.Module, purified: nn.Module) -> bool:
    """Whether there is a path: the same weights by name and shape, which a network with added layers has not."""
    ours, theirs = ({name: t.shape for name, t in net.state_dict().items()} for net in (attacked, purified))
    return ours == theirs


def between(attacked: nn.Module, purified: nn.Module, s: float) -> nn.Module:
    """A network in eval mode with weights and statistics of batch norm W(s); what are no fractions are `purified`'s."""
    model, start = copy.deepcopy(purified), attacked.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, s))
    return model.eval()


@torch.no_grad()
def settled(model: nn.Module, pictures: Images, augment: Augment | None = None) -> nn.Module:
    """`model`, changed: the statistics of its batch norms are the means over the batches of `pictures`, augmented."""
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # all batches count alike
        norm.train()
    for x, *_ in pictures.batches(BATCH, seed=0, augment=augment):
        model(x)
    return model.eval()
