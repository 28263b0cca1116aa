"""NPD: the polarizer's place and start, the search, the losses by hand, what stays frozen, what is recorded."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import NPD
from sau.defense.npd import held_losses, insert_polarizer, restore_polarizer
from sau.models import Normalized, build

SMALL = {"epochs": 2, "warm_epochs": 2, "batch_size": 8, "target_layer_name": "features.3"}


def test_a_new_polarizer_is_the_identity_but_for_its_batch_norm():
    """In eval mode the fresh norm divides by sqrt(1 + 1e-5); in train mode channels get the mean 0."""
    net, (x, _) = tiny_net(), pair()
    before, features = net(x), net.features[:3](x)
    inside = insert_polarizer(net, "features.3")
    assert torch.equal(inside.get_submodule("polarizer")(features), features)
    assert torch.allclose(net(x), before, rtol=1e-4, atol=1e-4) and not net.training
    assert torch.allclose(inside.train()[:2](features).mean((0, 2, 3)), torch.zeros(10), atol=1e-5)
    assert inside.get_parameter("polarizer.weight").shape == (10, 10, 1, 1) and inside.polarizer.bias is None


def test_it_stands_before_the_second_convolution_of_the_last_block():
    net = build("preactresnet18", 10, width=4, mean=(0.5,) * 3, std=(0.5,) * 3).eval()
    keys = set(net.net.state_dict())
    state = NPD().prepare(net, range(1))
    new = set(net.net.state_dict()) - keys
    assert state["_norm"] is net.net.layer4[1].conv1.norm and net.net.layer4[1].conv1.layer.in_channels == 32
    assert keys - set(net.net.state_dict()) == {"layer4.1.conv1.weight"}
    names = ["polarizer.weight", "layer.weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    assert new == {f"layer4.1.conv1.{name}" for name in [*names, "norm.num_batches_tracked"]}
    assert sum(weight.numel() for weight in state["descent"].parameters) == 32 * 32 + 2 * 32


def linear_net(*rows: list[float]) -> nn.Module:
    """Logits that are linear in the pixels of 1x2x2 pictures."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, len(rows), bias=False))
    net[1].weight.data = torch.tensor(rows)
    return net


def test_the_search_goes_towards_the_runner_up_by_sign_steps():
    """Class 0 wins by the first pixel, class 1 is after it through the second: the first falls, the second rises."""
    net = linear_net([2.0, 0, 0, 0], [0, 1.9, 0, 0], [0, 0, 0.1, 0])
    x = torch.full((1, 1, 2, 2), 0.5)
    assert net(x).topk(2).indices.tolist() == [[0, 1]]
    delta = NPD(adv_steps=1).search(net, x, torch.tensor([1]))
    assert torch.allclose(delta.flatten(), torch.tensor([-0.1, 0.1, -0.1, 0.0]))


def test_the_search_stays_in_the_ball_and_in_the_pixels():
    x = torch.rand(6, 3, 16, 16)
    target = tiny_net()(x).topk(2).indices[:, 1]
    free = NPD(norm="Reg", adv_steps=2).search(tiny_net(), x, target)
    small = NPD(eps=0.5, adv_steps=2).search(tiny_net(), x, target)
    assert (free.flatten(1).norm(dim=1) > 1).all() and (small.flatten(1).norm(dim=1) <= 0.5 + 1e-5).all()
    for delta in (free, small):
        assert (x + delta).min() >= 0 and (x + delta).max() <= 1 and not delta.requires_grad


@pytest.mark.parametrize(("there", "steps"), [(3, 2), (4, 1)])
def test_the_search_stops_once_more_than_sixty_percent_are_there(there, steps):
    """Of 5 images, 3 are not enough and 4 are. `there` of them reach class 1 with the first step."""
    net = linear_net([1.0, 0, 0, 0], [0, 1.0, 0, 0])
    x = torch.full((5, 1, 2, 2), 0.5)
    x[:there, 0, 0, 0] += 0.15  # a step of 0.1 up and down makes up for this
    x[there:, 0, 0, 0] += 0.45
    delta = NPD(adv_steps=2).search(net, x, torch.ones(5, dtype=torch.long))
    assert delta[0, 0, 0, 1].item() == pytest.approx(0.1 * steps)


def test_the_losses_by_hand():
    """Probabilities (1/8, 5/8, 2/8) and (1/4, 1/4, 1/2), answers 0 and 2, runners-up 2 and 0; all is finite where the
    attack wins."""
    p = torch.tensor([[1 / 8, 5 / 8, 2 / 8], [1 / 4, 1 / 4, 1 / 2]], dtype=torch.float64)
    adv, wrong, target = held_losses(p.log() + 3.0, torch.tensor([0, 2]), torch.tensor([2, 0]))
    assert adv.item() == pytest.approx((math.log(8) + math.log(2)) / 2)
    assert wrong.item() == pytest.approx(-(math.log(1.0001 - 5 / 8) + math.log(1.0001 - 1 / 4)) / 2)
    assert target.item() == pytest.approx(-(math.log(1.0001 - 2 / 8) + math.log(1.0001 - 1 / 4)) / 2)
    z = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    parts = held_losses(z, torch.tensor([0]), torch.tensor([1]))
    (gradient,) = torch.autograd.grad(sum(parts), z)
    assert gradient.isfinite().all() and parts[1].item() == pytest.approx(-math.log(1e-4), rel=1e-2)


def test_a_step_weighs_the_losses():
    """One update by hand in double precision, from the search to the weights of polarizer and norm."""
    weights = {"weight_clean": 0.7, "weight_adv": 0.5, "weight_wrong": 0.3, "weight_target": 0.2}
    method = NPD(**weights, lr=0.1, wd=0.0, sgd_momentum=0.0, target_layer_name="features.3")
    net, (x, y) = tiny_net().double(), pair(8, torch.float64)
    state = method.prepare(net, range(1))
    other = copy.deepcopy(net)
    report = method.step(state, x, y)
    answer, runner_up = other(x).topk(2).indices.T
    delta = method.search(other, x, runner_up)
    other.features[3].norm.train()
    both = other(torch.cat([x, x + delta]))  # the batch norm sees clean and perturbed images together
    z, z_adv = both[:8], both[8:]
    p, rows = z_adv.softmax(1), torch.arange(8)
    others = p.clone()
    others[rows, answer] = 0
    logs = 0.3 * (1.0001 - others.max(1).values).log() + 0.2 * (1.0001 - p[rows, runner_up]).log()
    loss = 0.7 * F.cross_entropy(z, y) + 0.5 * F.cross_entropy(z_adv, answer) - logs.mean()
    weights = [other.features[3].polarizer.weight, other.features[3].norm.weight, other.features[3].norm.bias]
    assert report["loss"].item() == pytest.approx(loss.item(), rel=1e-12)
    found = state["descent"].parameters
    for weight, gradient, moved in zip(weights, torch.autograd.grad(loss, weights), found, strict=True):
        assert torch.allclose(moved, weight - 0.1 * gradient, rtol=1e-9, atol=1e-12)
        assert not torch.equal(moved, weight)
    assert torch.equal(net.features[3].norm.running_mean, other.features[3].norm.running_mean)  # of both passes
    assert not any(module.training for module in net.modules())


def test_the_network_itself_stays_as_it_was():
    net = tiny_net()
    net.features[0].bias.requires_grad_(False)
    fixed = NPD(**SMALL).purify(net, pair(), session=quiet())
    kept = {name.replace("features.3.layer", "features.3"): value for name, value in fixed.state_dict().items()}
    assert all(torch.equal(kept[name], value) for name, value in net.state_dict().items())
    assert {name for name, weight in fixed.named_parameters() if not weight.requires_grad} == {"features.0.bias"}
    assert not torch.equal(fixed.features[3].polarizer.weight[:, :, 0, 0], torch.eye(10))
    assert fixed.features[3].norm.num_batches_tracked == 2 * 3 + 2 * 3  # a warm-up step and another one see it once


def test_the_result_is_saved_and_loaded_again():
    """Through the bytes of a record, into a new network of the attacked one's architecture."""
    x, y = pair()
    fixed = NPD(**SMALL).purify(Normalized(tiny_net(), (0.5,) * 3, (0.25,) * 3), (x, y), session=quiet())
    stored = load(save(fixed.get_submodule("net").state_dict()))
    again = restore_polarizer(tiny_net(seed=9), stored)
    assert same_weights(again, fixed.get_submodule("net"))
    assert torch.equal(Normalized(again.eval(), (0.5,) * 3, (0.25,) * 3)(x), fixed(x))
    assert same_weights(restore_polarizer(tiny_net(seed=9), tiny_net().state_dict()), tiny_net())  # any other one


@pytest.mark.parametrize("name", ["again", "features.3"])
def test_a_layer_may_have_two_names(name):
    net = tiny_net()
    net.again = net.features[3]
    fixed = NPD(**{**SMALL, "target_layer_name": name}).purify(net, pair(), session=quiet())
    assert fixed.again is fixed.features[3] and not isinstance(fixed.again, nn.Conv2d)
