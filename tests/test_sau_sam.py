"""SAU-SAM: its step against a literal one in double precision, its rule for rho, and what it leaves."""

import copy

import pytest
import torch
import torch.nn.functional as F
from released_sau import ReleasedSAU
from torch import nn
from toys import batch, smooth_net

from sau.defense import FTSAM, SAUSAM
from sau.models import PreActResNet18

EPS, RATE, STEPS, RHO, SMOOTHING, LR = 0.3, 0.1, 2, 0.6, 0.2, 0.1


def attacked() -> tuple[nn.Module, nn.Module]:
    """The network to purify, some way from the attacked one."""
    reference = smooth_net()
    net = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return net, reference


@pytest.mark.parametrize("weight_true", [0.0, 0.5])
def test_a_step_is_the_formulas_in_double_precision(weight_true):
    (net, reference), (x, y) = attacked(), batch(12, 5)
    twin = copy.deepcopy(net)
    method = SAUSAM(
        eps=EPS, adv_lr=RATE, adv_steps=STEPS, pgd_init="zero", rho=RHO, label_smoothing=SMOOTHING, lr=LR,
        weight_true=weight_true, weight_shared=1.5, sgd_momentum=0.0, wd=0.0, lr_scheduler="constant",
    )  # fmt: skip

    search = ReleasedSAU(twin, reference, trigger_norm=EPS, adv_lr=RATE, adv_steps=STEPS, pgd_init="zero")
    found = x + search.perturb(x, y)
    s, kept = reference(found).argmax(1), reference(x).argmax(1)
    others = torch.full((12, 3), SMOOTHING / 2, dtype=torch.float64)
    soft = others.scatter(1, y[:, None], 1 - SMOOTHING)

    def loss() -> torch.Tensor:
        z, z_adv = twin(x), twin(found)
        p = z_adv.softmax(1)
        total = -(soft * z.log_softmax(1)).sum() / 12
        for i in range(12):
            if s[i] != y[i] and s[i] != kept[i]:
                total = total - 1.5 * (1 + 1e-6 - p[i, s[i]]).log() / 12
                total = total + weight_true * F.cross_entropy(z_adv[i : i + 1], y[i : i + 1]) / 12
        return total

    twin.train()
    first = copy.deepcopy(twin)
    first(x)  # running statistics are those of the clean images, once
    weights = list(twin.parameters())
    before = [weight.detach().clone() for weight in weights]
    here = torch.autograd.grad(loss(), weights)
    norm = torch.cat([(w.abs() * g).flatten() for w, g in zip(before, here, strict=True)]).norm()
    with torch.no_grad():
        for weight, w, g in zip(weights, before, here, strict=True):
            weight.copy_(w + RHO * w**2 * g / norm)
    there = torch.autograd.grad(loss(), weights)
    assert not torch.allclose(here[0], there[0], rtol=0.01)

    state = {**method.prepare(net, range(1)), "_reference": reference, "_sam": FTSAM(rho=RHO)}
    report = method.step(state, x, y)
    assert 0 < report["shared"] < 12
    for after, w, g in zip(net.parameters(), before, there, strict=True):
        assert torch.allclose(after, w - LR * g, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), first.buffers(), strict=True))


def test_the_search_starts_at_random_inside_the_ball():
    (net, reference), (x, y) = attacked(), batch(12, 5)
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(SAUSAM(eps=EPS).search(net, reference, x, y)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert ((found[0] - x).abs() <= EPS + 1e-12).all()


def test_smaller_networks_have_a_smaller_rho_and_few_images_as_many_updates():
    """In proportion to the root of the number of weights."""
    method = SAUSAM()
    for model, rho in ((PreActResNet18(width=16), 2.0), (PreActResNet18(width=32), 2.0), (nn.Linear(69, 100), 0.2)):
        assert method.prepare(model, range(1))["_sam"].rho == pytest.approx(rho)
    few = method.adapted(PreActResNet18(width=16), 100)
    assert few.epochs * -(-100 // few.batch_size) == pytest.approx(20 * 20, rel=0.05)
    assert method.adapted(PreActResNet18(width=16), 2500) == method
