"""CLP: Lipschitz constants against numpy, which convolution feeds a batch norm by hand lists."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import pair, quiet, tiny_net

from sau.defense import CLP, clp, pruning
from sau.models import build, unwrapped

PLAIN = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize("groups", [1, 2])
def test_lipschitz_constants_are_those_of_numpy(groups):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, groups=groups).double(), nn.BatchNorm2d(6, eps=0.1).double()
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.1, 2)
    found = clp.lipschitz(conv, norm)
    for c in range(6):
        matrix = conv.weight[c].detach().numpy().reshape(4 // groups, 9)
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        gain = abs(norm.weight[c].item()) / np.sqrt(norm.running_var[c].item() + 0.1)
        assert found[c].item() == pytest.approx(largest * gain, rel=1e-12)


def names(model: nn.Module, pairing: str = "traced") -> dict[str, str]:
    """The pairs as names, without the prefix of the wrapper."""
    norms = pruning.batch_norms(model, "clp")
    x = torch.zeros(1, 3, 32, 32)
    pairs = clp.traced(model.eval(), norms, x) if pairing == "traced" else clp.ordered(model, norms)
    known = {module: name.removeprefix("net.") for name, module in model.named_modules()}
    return {name.removeprefix("net."): known[conv] for name, conv in pairs.items()}


@pytest.mark.parametrize("amp", [False, True])
def test_pairs_of_preactresnet18(amp):
    """The second batch norm of each block, and the first one of all, which the stem feeds; the other seven follow a
    residual sum."""
    model = build("preactresnet18", 10, width=4, amp=amp, **PLAIN)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    wanted = {"layer1.0.bn1": "conv1", **{f"{block}.bn2": f"{block}.conv1" for block in blocks}}
    assert names(model) == wanted
    by_order = names(model, "order")
    assert by_order.items() >= wanted.items() and len(by_order) == 16
    assert by_order["layer1.1.bn1"] == "layer1.0.conv2"  # whose output is summed first
    assert by_order["layer2.1.bn1"] == "layer2.0.shortcut.0"


def test_pairs_of_torchvisions_resnet18():
    """Every batch norm has a convolution in front, those of the shortcuts too."""
    norms = [name for name, module in unwrapped("resnet18", 10).named_modules() if isinstance(module, nn.BatchNorm2d)]
    wanted = {name: name.replace("bn", "conv").replace("downsample.1", "downsample.0") for name in norms}
    assert len(wanted) == 20 and names(build("resnet18", 10, **PLAIN)) == wanted


class Odd(nn.Module):
    """A batch norm behind a ReLU in place, one used behind two convolutions, one behind a sum in place, one that is
    never used, and one that is paired."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.twice, self.sum, self.unused, self.good = (nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(F.relu_(self.a(x)))
        x = self.twice(self.b(self.twice(self.c(x))))
        y = self.a(x)
        y += x
        return self.good(self.b(self.sum(y)))


def test_what_only_looks_like_a_convolutions_output_is_left_out():
    model = Odd()
    found = clp.traced(model.eval(), pruning.batch_norms(model, "clp"), torch.rand(1, 3, 8, 8))
    assert found == {"good": model.b}
    assert not any(m._forward_hooks for m in model.modules())
    other = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(4))
    assert clp.ordered(other, pruning.batch_norms(other, "clp")) == {}  # numbers of channels differ


def test_pairing_is_a_switch():
    """The batch norm behind the residual sum is pruned by order alone."""
    model = build("preactresnet18", 4, width=4, **PLAIN)
    for pairing, changed in (("traced", False), ("order", True)):
        fixed = CLP(u=0.0, pairing=pairing).purify(model, pair(8), session=quiet())
        assert bool((fixed.get_parameter("net.layer1.1.bn1.weight") == 0).any()) is changed


def test_a_channel_that_is_made_steep_is_the_one_that_goes():
    """All filters have the norm 1, but the third one has 100: it lies 9 / sqrt(10) = 2.85 deviations above the mean."""
    net = tiny_net()
    with torch.no_grad():
        filters = net.features[0].weight
        filters /= torch.linalg.matrix_norm(filters.flatten(2), ord=2).view(-1, 1, 1, 1)
        filters[3] *= 100
    fixed = CLP(u=2.8).purify(net, pair(), session=quiet())
    assert (fixed.features[1].weight == 0).nonzero().flatten().tolist() == [3]
