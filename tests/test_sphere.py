"""D3 and FST: distances and pulls along the sphere against closed forms, their steps and starts, their layers."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Stopping
from torch import nn
from toys import Shaped, pair, quiet, refuses, same_weights, tiny_net

from sau.defense import D3, FST
from sau.defense.d3 import hinge
from sau.defense.fst import FixedNormWeight
from sau.errors import ConfigError
from sau.loop import Limit
from sau.models.normalized import classifier, resolve_layer


def at_angle(angle: float, radius: float = 3.0) -> tuple[FixedNormWeight, torch.Tensor, torch.Tensor]:
    """A sphere whose W lies at an angle from W0, and the directions of W and of the way round from W0."""
    torch.manual_seed(0)
    first, second = torch.linalg.qr(torch.randn(12, 2, dtype=torch.float64)).Q.T.reshape(2, 3, 4)
    sphere = FixedNormWeight(nn.Parameter(radius * first))
    here, along = math.cos(angle) * first + math.sin(angle) * second, math.cos(angle) * second - math.sin(angle) * first
    with torch.no_grad():
        sphere.weight.copy_(radius * here)
    return sphere, here, along


@pytest.mark.parametrize("radius", [0.5, 3.0])
@pytest.mark.parametrize("degrees", [0, 10, 60, 90, 150, 179, 180])
def test_pulls_along_the_sphere(degrees, radius):
    """Along the way round, away from W0: that of the distance is the cosine of half the angle, whatever the radius is;
    that of the overlap is the radius times the sine of the angle, so it vanishes at W0 and at -W0."""
    angle = math.radians(degrees)
    sphere, here, along = at_angle(angle, radius)
    pulls = [(-sphere.overlap(), radius * math.sin(angle))]
    pulls += [(sphere.distance(), math.cos(angle / 2))] if degrees else []  # which has no gradient at W0
    for height, wanted in pulls:
        (pull,) = torch.autograd.grad(height, sphere.weight)
        assert torch.allclose(pull - (pull * here).sum() * here, wanted * along, rtol=1e-9, atol=1e-12)
    assert sphere.distance().item() == pytest.approx(2 * radius * math.sin(angle / 2))
    assert sphere.overlap().item() == pytest.approx(radius**2 - sphere.distance().item() ** 2 / 2)


def test_projecting_keeps_the_direction_and_restores_the_length():
    sphere, here, _ = at_angle(1.0)
    for factor in (1e-3, 0.7, 1e3):
        sphere.weight.data.copy_(factor * here)
        sphere.project()
        assert torch.allclose(sphere.weight, 3.0 * here, rtol=1e-12)
    sphere.weight.data.zero_()
    sphere.project()
    assert (sphere.weight == 0).all()


def test_the_hinge_by_hand():
    """Losses of log 2, log 4 and log 1.01, from two equal logits, four of them, and one far ahead; 0.5 are free."""
    z = torch.tensor([[0.0, 0.0, -99, -99], [1, 1, 1, 1], [math.log(100), 0, -99, -99]], dtype=torch.float64)
    z.requires_grad_()
    found = hinge(z, torch.tensor([0, 2, 0]), 0.5)
    assert found.item() == pytest.approx((math.log(2) - 0.5 + math.log(4) - 0.5) / 3)
    (gradient,) = torch.autograd.grad(found, z)
    assert gradient[0].tolist() == pytest.approx([-1 / 6, 1 / 6, 0, 0], abs=1e-12) and (gradient[2] == 0).all()


@pytest.mark.parametrize(("penalty", "divisor"), [(0.5, 1), (1.0, 1), (10.0, 11)])
def test_a_step_within_the_budget_is_the_distances_alone(penalty, divisor):
    """W <- sphere(W + lr (W - W0) / |W - W0|), the rest of the network stays; above 1 lambda + 1 divides."""
    net, (x, y) = tiny_net().double(), pair(8, torch.float64)
    method = D3(penalty=penalty, eps=100.0, lr=0.1, start="random", lr_scheduler="constant")
    origin = net.linear.weight.detach().clone()
    state = method.prepare(net, [(x, y)])
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    away = (before["linear.weight"] - origin) / (before["linear.weight"] - origin).norm()
    moved = before["linear.weight"] + 0.1 / divisor * away
    report = method.step(state, x, y)
    after = dict(net.named_parameters())
    assert torch.allclose(after["linear.weight"], moved * origin.norm() / moved.norm(), rtol=1e-12)
    assert all(torch.equal(after[name], before[name]) for name in before if name != "linear.weight")
    assert report["excess"] == 0 and report["loss"] == -report["distance"] < 0


@pytest.mark.parametrize("penalty", [0.5, 10.0])
def test_the_clean_loss_counts_as_often_as_its_penalty(penalty):
    """From W0 the distance has no gradient: the bias moves by lr * lambda * grad of the hinge, over lambda + 1."""
    net, (x, y) = tiny_net().double(), pair(8, torch.float64)
    other = tiny_net().double().train()
    (gradient,) = torch.autograd.grad(hinge(other(x), y, 0.1), [other.linear.bias])
    method = D3(penalty=penalty, lr=0.1, start="near", lr_scheduler="constant")
    method.step(method.prepare(net, [(x, y)]), x, y)
    factor = penalty / (penalty + 1 if penalty > 1 else 1)
    assert torch.allclose(net.linear.bias, other.linear.bias - 0.1 * factor * gradient, rtol=1e-9)


def test_the_starts():
    origin, bias = (tensor.detach().clone() for tensor in (tiny_net().linear.weight, tiny_net().linear.bias))
    found = {}
    for start in ("random", "near", "middle", "far", "noise"):
        net = tiny_net()
        torch.manual_seed(0)
        D3(start=start).prepare(net, [pair()])
        found[start] = net.linear.weight.detach()
        assert torch.equal(net.linear.bias, bias)
    torch.manual_seed(0)
    wanted = {"near": origin, "middle": 0 * origin, "far": -origin}
    wanted["noise"] = origin + origin.std() * torch.randn(origin.shape)
    assert all(torch.equal(found[start], weight) for start, weight in wanted.items())
    assert found["random"].norm().item() == pytest.approx(origin.norm().item())
    assert abs((found["random"] * origin).sum() / origin.norm() ** 2) < 0.7


def test_the_layer_nearest_to_the_top_is_meant():
    blocks = nn.ModuleDict({"conv": nn.Identity(), "a": nn.ModuleDict({"conv": nn.Identity()})})
    assert resolve_layer(nn.ModuleList([blocks]), "conv", "") == "0.conv"
    assert resolve_layer(blocks, "a.conv", "") == "a.conv"
    with pytest.raises(ConfigError, match="several"):
        resolve_layer(nn.ModuleDict({"a": blocks["a"], "b": nn.ModuleDict({"conv": nn.Identity()})}), "conv", "")


def test_a_layer_may_be_named_where_there_is_no_linear_one():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert not same_weights(D3(layers=("0",), epochs=1).purify(net, pair(), session=quiet()), net)


class Spare(nn.Module):
    """A network with a linear layer after its classifier that does not run, or that runs and makes no logits."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.net, self.used, self.spare = tiny_net(), used, nn.Linear(6, 3)

    def forward(self, x):
        z = self.net(x)
        return z + 0 * self.spare(z.new_ones(len(z), 6)).sum() if self.used else z


def test_the_classifier_is_the_layer_that_makes_the_logits():
    x = pair()[0][:1]
    assert all(classifier(net, x, "d3") is net.net.linear for net in (Spare(used=False), Spare(used=True)))
    with refuses(ConfigError, "3 logits"):
        classifier(Shaped(lambda z: z[:, :3]), x, "d3")


@pytest.mark.parametrize(("defense", "watched"), [(D3, "excess"), (FST, "clean_loss")])
def test_a_plateau_is_one_though_the_loss_lies_below_0(defense, watched):
    """What torch compares in proportion: below 0 a loss that stays or rises would count as an improvement."""
    method = defense(epochs=40, lr=0.1, lr_scheduler="ReduceLROnPlateau")
    state = {"descent": method.descent([nn.Parameter(torch.zeros(1))], 1)}
    for _ in range(30):
        method.end_epoch(state, {"loss": -3.0, watched: 0.5})
    assert state["descent"].optimizer.param_groups[0]["lr"] < 0.1


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_a_step_is_the_papers_in_double_precision(alpha):
    """W <- sphere(W - lr (grad CE + alpha W0)); the bias only follows CE."""
    net, (x, y) = tiny_net().double(), pair(8, torch.float64)
    method, origin = FST(alpha=alpha, lr=0.1, lr_scheduler="constant"), net.linear.weight.detach().clone()
    state = method.prepare(net, [(x, y)])
    weight, bias = net.linear.weight.detach().clone(), net.linear.bias.detach().clone()
    other = tiny_net().double().train()
    other.load_state_dict(net.state_dict())
    gradients = torch.autograd.grad(F.cross_entropy(other(x), y), [other.linear.weight, other.linear.bias])
    report = method.step(state, x, y)
    moved = weight - 0.1 * (gradients[0] + alpha * origin)
    assert torch.allclose(net.linear.weight, moved * origin.norm() / moved.norm(), rtol=1e-9)
    assert torch.allclose(net.linear.bias, bias - 0.1 * gradients[1], rtol=1e-9)
    assert report["overlap"].item() == pytest.approx((weight * origin).sum().item())


@pytest.mark.parametrize("reset_bias", [True, False])
def test_the_classifier_is_drawn_anew_from_the_interval_of_its_inputs(reset_bias):
    """512 inputs: +-1/sqrt(512), so a length of about 1.8 for ten classes before the first step."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(512, 10))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net[1].weight.data *= 3
    sphere = FST(reset_bias=reset_bias).prepare(net, [(torch.rand(2, 512, 1, 1), torch.zeros(2).long())])["sphere"]
    weight, bias, bound = net[1].weight.detach(), net[1].bias.detach(), 1 / math.sqrt(512)
    assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound
    assert weight.norm().item() == pytest.approx(1.826, rel=0.05)
    assert abs((weight * sphere.origin).sum()) < 0.2 * weight.norm() * sphere.radius
    assert torch.equal(bias, before["1.bias"]) != reset_bias and bias.abs().max() <= bound
    assert sphere.radius.item() == pytest.approx(3 * before["1.weight"].norm().item())


@pytest.mark.parametrize("cls", [FST, D3])
def test_a_resumed_run_without_time_keeps_what_was_learned(cls):
    method, data = cls(epochs=2, batch_size=8), pair()
    session = quiet(checkpoint=Stopping(3), save_every=-1.0)
    with pytest.raises(KeyboardInterrupt):
        method.purify(tiny_net(), data, session=session)
    late = method.purify(tiny_net(), data, session=replace(session, limit=Limit(time.monotonic() - 1)))
    assert not same_weights(late, tiny_net())
