"""AT: its search and its update against literal loops, what it shares with SAU, the toy."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import batch, smooth_net

from sau.defense import AT

EPS, RATE, STEPS = 0.3, 0.1, 3


def into(x: Tensor, e: Tensor, norm: str, clip: bool) -> Tensor:
    """S, value by value."""
    if norm == "L_inf":
        e = torch.where(e.abs() > EPS, EPS * e.sign(), e)
    elif norm != "Reg" and e.square().sum().sqrt() > EPS:
        e = EPS * e / e.square().sum().sqrt()
    return (x + e).clamp(0, 1) - x if clip else e


def climbed(net: nn.Module, x: Tensor, y: Tensor, first: Tensor, norm: str, clip: bool) -> Tensor:
    """Where sign ascent on CE(h(x + e), y) leads from `first`, image by picture."""
    ends = []
    for i in range(len(x)):
        e = into(x[i], first[i], norm, clip)
        for _ in range(STEPS):
            e = e.requires_grad_()
            loss = -F.log_softmax(net((x[i] + e)[None]), 1)[0, y[i]]
            (gradient,) = torch.autograd.grad(loss, e)
            e = into(x[i], e.detach() + RATE * gradient.sign(), norm, clip)
        ends.append(e)
    return torch.stack(ends)


def begun(x: Tensor, init: str) -> Tensor:
    """The places that a search may start from, before they are brought into S."""
    torch.manual_seed(7)
    if init == "random":
        return torch.empty_like(x).uniform_(-EPS, EPS)
    return torch.full_like(x, {"zero": 0.0, "max": EPS, "min": -EPS}[init])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("norm", ["L_inf", "L2", "Reg"])
@pytest.mark.parametrize("init", ["zero", "random", "max", "min"])
def test_the_search_is_sign_ascent_from_every_start(init, norm, clip):
    net, (x, y) = smooth_net(), batch(6, 1)
    defense = AT(eps=EPS, adv_lr=RATE, adv_steps=STEPS, norm=norm, pgd_init=init, clip_pixels=clip)
    first = begun(x, init)
    torch.manual_seed(7)
    assert torch.allclose(defense.search(net, x, y), climbed(net, x, y, first, norm, clip), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weights", [(0.3, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_one_update_descends_both_losses_by_their_weights(weights):
    """w <- w - lr * grad(a1 * CE(h(x), y) + a2 * CE(h(x + e), y)); batch norm's statistics stay."""
    net, (x, y) = smooth_net(), (both[:5] for both in batch(6, 1))  # not as many of each class
    other = copy.deepcopy(net)
    delta = climbed(other, x, y, begun(x, "max"), "L_inf", False)
    z, z_adv = (-F.log_softmax(other(some), 1) for some in (x, x + delta))
    clean, adversarial = (sum(rows[i, y[i]] for i in range(5)) / 5 for rows in (z, z_adv))
    loss = weights[0] * clean + weights[1] * adversarial
    gradients = torch.autograd.grad(loss, list(other.parameters()))
    settings = {"lr": 0.1, "client_optimizer": "sgd", "weight_clean": weights[0], "weight_adv": weights[1]}
    defense = AT(eps=EPS, adv_lr=RATE, adv_steps=STEPS, **settings)
    report = defense.step(defense.prepare(net.train(), range(1)), x, y)
    for after, before, gradient in zip(net.parameters(), other.parameters(), gradients, strict=True):
        assert torch.allclose(after, before - 0.1 * gradient, rtol=1e-9, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))
    fooled = (z_adv.argmin(1) != y).sum()
    assert fooled != (z_adv.argmax(1) != y).sum()
    for name, value in {"loss": loss, "clean_loss": clean, "adv_loss": adversarial, "fooled": fooled}.items():
        assert report[name].item() == pytest.approx(value.item(), rel=1e-9)
    assert 0 < report["fooled"] < 5
