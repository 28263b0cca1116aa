"""BNP: the divergence by hand, the statistics against one pass over everything."""

import pytest
import torch
from torch import nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import BNP


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten()).eval()


def test_statistics_are_those_of_all_images_in_the_network_as_it_is():
    """Whatever the batches; a batch norm normalises by its running statistics, not by those of the batch."""
    net, (x, y) = two_layers(), pair(20)
    net[1].running_mean += 0.3
    net[4].running_var *= 2.5
    found = BNP().scores(net, [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])])
    for name, inputs in (("1", net[0](x)), ("4", net[:4](x))):
        norm, values = net.get_submodule(name), inputs.double().detach()
        var = values.var((0, 2, 3), unbiased=False) + norm.eps
        mean, running_var = values.mean((0, 2, 3)), norm.running_var.double() + norm.eps
        apart = (mean - norm.running_mean.double()) ** 2
        wanted = (running_var / var).log() / 2 + (var + apart) / (2 * running_var) - 0.5
        torch.testing.assert_close(found[name], wanted)
    assert found.keys() == {"1", "4"}


def test_a_dead_channel_has_a_finite_score():
    """Its variance is 0 in both; and it is like itself."""
    net = two_layers()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
        net[1].running_var[2] = 0
        scores = BNP().scores(net, [pair(8)])["1"]
    assert scores.isfinite().all() and scores[2] == pytest.approx(0)


def test_the_running_statistics_decide_and_stay():
    net = tiny_net()
    net.features[1].running_mean[4] += 5
    before = {name: value.clone() for name, value in net.features[1].named_buffers()}
    fixed = BNP(u=2.5).purify(net, pair(), session=quiet())
    assert (fixed.features[1].weight == 0).nonzero().flatten().tolist() == [4]
    assert all(torch.equal(value, before[name]) for name, value in fixed.features[1].named_buffers())


def test_augmentation_is_a_switch():
    fixed = [BNP(u=0.0, augment=on).purify(tiny_net(), pair(8), session=quiet()) for on in (False, True)]
    assert not same_weights(*fixed)
