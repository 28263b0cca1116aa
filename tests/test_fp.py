"""FP: which units are idle, how many go, and that they stay away; by hand-made networks, and its claim on a toy."""

import pytest
import torch
from checkpoints import resumed
from torch import Tensor, nn
from toys import own_answers, pair, quiet, tiny_net

from sau.defense import FP, pruning
from sau.defense.fp import activations, unit_layers
from sau.evaluate import Proportion, Score
from sau.models import PreActResNet18, unwrapped

SHUFFLED = torch.tensor([3, 8, 1, 9, 0, 7, 2, 5, 6, 4])  # place of the pixels in the image of `ten_units`


def ten_units() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Ten pixels are the inputs of a linear layer; pixel j is j / 10, but for the seventh, which is 0.6 or 0.8 and
    tells the two classes apart. So the order of activation is that of the pixels, and only the seventh matters."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(10, 2))
    y = torch.arange(20) % 2
    x = (torch.arange(10) / 10).repeat(20, 1)
    x[:, 7] = 0.6 + 0.2 * y
    with torch.no_grad():
        net[1].weight.fill_(1.0)
        net[1].weight[0, (SHUFFLED == 7).nonzero()] = 0.0
        net[1].bias.copy_(torch.tensor([0.7, 0.0]))
    return net, (x[:, SHUFFLED].view(20, 1, 1, 10), y)


def gone(net: nn.Module) -> list[int]:
    """The pixels whose columns are zero, by their order of activation."""
    return sorted(SHUFFLED[(net[1].weight == 0).all(0)].tolist())


STEPS = {1e-12: 7, 0.01: 7, 0.2: 6, 0.25: 6, 0.4: 4, 1.0: 0}


@pytest.mark.parametrize(("how", "expected"), [
    *(({"once_prune_ratio": step}, gone) for step, gone in STEPS.items()),
    ({"acc_ratio": 0.6}, 9),  # a tolerance that allows all leaves one unit
])  # fmt: skip
def test_the_last_step_within_the_tolerance_is_the_one_applied(how, expected):
    """Without the seventh pixel the accuracy falls from 100 to 50 %: steps of 1, 2, 3 (ceil of 2.5), 4 and 10 units
    stop before it. The public code goes one step further and, in each, one unit less far. The order is that of plain
    images even where tuning augments: a crop would shift the pixels."""
    net, data = ten_units()
    fixed = FP(epochs=0, augment=True, **how).purify(net, data, session=quiet())
    assert gone(fixed) == list(range(expected))
    kept = (fixed[1].weight != 0).any(0)
    assert torch.equal(fixed[1].weight[:, kept], net[1].weight[:, kept]) and torch.equal(fixed[1].bias, net[1].bias)


def test_the_oracle_stops_by_the_test_accuracy_and_is_blind_to_asr():
    net, data = ten_units()

    def judge(network: nn.Module) -> Score:
        n = len(gone(network.get_submodule("net")))
        return Score(Proportion(90 if n <= 2 else 80, 100), Proportion(5 if n == 1 else 90, 100), Proportion(0, 100))

    session = quiet(judge=judge)
    fixed = FP(epochs=0, augment=False, select="oracle").purify(net, data, session=session)
    assert gone(fixed) == [0, 1]


def test_activations_are_signed_means():
    """A convolution by -1 and by 2 of the mean pixel; a linear layer sees these means."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([-1.0, 2.0]).view(2, 1, 1, 1))
    x = torch.rand(700, 1, 2, 2, dtype=torch.float64)  # more than a block of `predict`
    mean = float(x.mean())
    for layer in (net[0], net[3]):
        assert activations(net, layer, x).tolist() == pytest.approx([-mean, 2 * mean], abs=1e-6)


def names(net: nn.Module, unit: str, side: int = 32) -> list[str]:
    known = {module: name for name, module in net.named_modules()}
    return [known[layer] for layer in unit_layers(net.eval(), torch.rand(1, 3, side, side), unit)]


def test_the_last_layers_of_networks():
    small = PreActResNet18(width=4)
    assert names(small, "linear_input") == ["linear"] and names(small, "last_conv") == ["layer4.1.conv2"]
    resnet = unwrapped("resnet18", 10)
    assert names(resnet, "linear_input") == ["fc"] and names(resnet, "last_conv") == ["layer4.1.bn2"]
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    chain = nn.Sequential(*layers, nn.Flatten())
    assert names(chain, "last_conv", 8) == ["3", "4"] and names(chain[:2], "last_conv", 8) == ["0", "1"]
    assert all(not module._forward_hooks for module in chain.modules())


def test_a_pruned_channel_is_zero_behind_its_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    with torch.no_grad():
        net[1].bias.fill_(0.5)
    x = torch.rand(2, 3, 8, 8)
    before, pruned = net(x), torch.tensor([True, False, True, False])
    pruning.PruningLevel("half", {"1": pruned}).prune(net)
    assert names(net, "last_conv", 8)[0] == "1" and (net(x)[:, pruned] == 0).all()
    assert torch.equal(net(x)[:, ~pruned], before[:, ~pruned])


@pytest.mark.parametrize("unit", ["linear_input", "last_conv"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_pruned_units_stay_pruned_and_the_others_learn(unit, optimizer):
    """Also with momentum, which goes on pushing where a weight was zeroed."""
    net, settings = tiny_net(), {"batch_size": 8, "lr": 0.05, "unit": unit, "client_optimizer": optimizer}
    methods, images = [FP(epochs=n, acc_ratio=0.9, **settings) for n in (0, 3)], own_answers(net, pair()[0])
    pruned, tuned = (method.purify(net, images, session=quiet()) for method in methods)
    weights = "linear.weight" if unit == "linear_input" else "features.3.weight"
    before, after = pruned.get_parameter(weights), tuned.get_parameter(weights)
    assert torch.equal(before == 0, after == 0) and (before == 0).any() and not torch.equal(before, after)
    assert tuned.state_dict().keys() == net.state_dict().keys()
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in tuned.modules())


def test_a_resumed_run_does_not_prune_again():
    defense, lines = FP(epochs=2, batch_size=8, lr=0.05, acc_ratio=0.9), list[str]()
    for _, said in resumed(defense, tiny_net(), pair()):
        lines += said
    assert lines and not any("pruned" in line for line in lines)
