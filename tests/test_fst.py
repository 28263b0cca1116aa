"""FST: its pull and its steps against closed forms, and how its classifier starts."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from checkpoints import Stopping
from torch import nn
from toys import at_angle, pair, same_weights, tiny_net, toy_images

from sau.defense import D3, FST
from sau.loop import Limit, Session


@pytest.mark.parametrize("degrees", [0, 10, 60, 90, 150, 180])
def test_the_pull_along_the_sphere_is_the_radius_times_the_sine_of_the_angle(degrees):
    """Away from W0, unlike the distance's: it vanishes at W0 and at -W0 and grows with the radius."""
    angle, radius = math.radians(degrees), 2.5
    sphere, here, along = at_angle(angle, radius)
    (pull,) = torch.autograd.grad(-sphere.overlap(), sphere.weight)
    tangential = pull - (pull * here).sum() * here
    assert torch.allclose(tangential, radius * math.sin(angle) * along, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_a_step_is_the_papers_in_double_precision(alpha):
    """W <- sphere(W - lr (grad CE + alpha W0)); the bias only follows CE."""
    net, images = tiny_net().double(), toy_images(8)
    x, y = images.pixels.double() / 255, images.labels
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
    session = Session(checkpoint=Stopping(3), say=lambda text: None, save_every=-1.0)
    with pytest.raises(KeyboardInterrupt):
        method.purify(tiny_net(), data, session=session)
    late = method.purify(tiny_net(), data, session=replace(session, limit=Limit(time.monotonic() - 1)))
    assert not same_weights(late, tiny_net())
