"""FT-SAM and SAU-SAM: perturbations and steps against literal ones in double precision, what is left as it was."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from released_sau import ReleasedSAU
from torch import nn
from toys import batch, pair, quiet, same_weights, smooth_net, tiny_net

from sau.attack import BadNet
from sau.data.batches import count_batches
from sau.defense import FTSAM, SAUSAM
from sau.defense.ft_sam import perturbed, smoothed_loss
from sau.models import PreActResNet18
from sau.optim import Training


def doubles(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_the_perturbations_by_hand():
    """|w| g = (3, 4, 12) over two tensors has the norm 13; w^2 g = (3, -8, 36); rho / 13 = 1/2. Without |w|, (3, -4)
    has the norm 5; no gradient, no perturbation."""
    weights, gradients = doubles([1.0, -2.0], [3.0]), doubles([3.0, -2.0], [4.0])
    e = FTSAM(rho=6.5).perturbation(weights, gradients)
    assert torch.allclose(torch.cat(e), torch.tensor([1.5, -4.0, 18.0], dtype=torch.float64), rtol=1e-12)
    plain = FTSAM(rho=10.0, adaptive=False).perturbation(doubles([7.0], [1.0]), doubles([3.0], [-4.0]))
    assert torch.cat(plain).tolist() == pytest.approx([6.0, -8.0])
    assert FTSAM().perturbation(doubles([1.0]), doubles([0.0]))[0].item() == 0


def test_smoothing_leaves_the_label_exactly_its_share():
    """4 classes, 0.3: the label has 0.7, the others 0.1 each."""
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    wanted = torch.full((5, 4), 0.1, dtype=torch.float64).scatter(1, y[:, None], 0.7)
    assert smoothed_loss(z, y, 0.3).item() == pytest.approx(-(wanted * z.log_softmax(1)).sum(1).mean().item())
    assert smoothed_loss(z, y, 0.0).item() == pytest.approx(F.cross_entropy(z, y).item())
    assert torch.isfinite(smoothed_loss(z[:, :2], y % 2, 0.5))


def test_weights_are_undone_to_the_bit_whatever_happens():
    weights = [torch.randn(100) * 10.0**i for i in range(-3, 3)]
    before = [weight.clone() for weight in weights]
    with pytest.raises(KeyError), perturbed(nn.Identity(), weights, [torch.randn(100) for _ in weights]):
        assert not any(torch.equal(now, then) for now, then in zip(weights, before, strict=True))
        raise KeyError
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


def test_statistics_are_kept_and_those_of_the_batch_used():
    norm, x = nn.BatchNorm2d(3).train(), torch.randn(4, 3, 5, 5) + 2
    wanted, kept = nn.BatchNorm2d(3)(x), {name: value.clone() for name, value in norm.state_dict().items()}
    with perturbed(norm, [], []):
        assert torch.equal(norm(x), wanted)
    assert all(torch.equal(value, kept[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert norm.num_batches_tracked == 1 and not torch.equal(norm.running_mean, kept["running_mean"])


@pytest.mark.parametrize("adaptive, alpha, share", [*product((True, False), (0.0, 0.3), (0.1,)), (False, 0.0, 0.0)])
def test_a_step_is_the_papers_in_double_precision(adaptive, alpha, share):
    """w - lr * (gradient at w + e), by functional calls; statistics of one batch. Last, of a resilient attack."""
    net, (x, y) = tiny_net().double().train(), pair(8, torch.float64)
    how, attack = {"lr": 0.1, "sgd_momentum": 0.0, "wd": 0.0, "lr_scheduler": "constant"}, BadNet(resilient_rho=0.7)
    method = FTSAM(rho=0.7, adaptive=adaptive, alpha=alpha, **how) if share else attack
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    soft = torch.full((8, 4), share / 3, dtype=torch.float64).scatter(1, y[:, None], 1 - share)

    def gradient(at: dict[str, torch.Tensor]) -> torch.Tensor:
        at = {name: weight.clone().requires_grad_() for name, weight in at.items()}
        copied = {name: value.clone() for name, value in buffers.items()}
        z = torch.func.functional_call(net, (at, copied), (x,))
        loss = -(soft * z.log_softmax(1)).sum(1).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(at.values()))])

    w, g = torch.cat([weight.flatten() for weight in weights.values()]), gradient(weights)
    size = w.abs() if adaptive else torch.ones_like(w)
    e = 0.7 * size**2 * g / (size * g).norm()
    parts = (w + e).split([weight.numel() for weight in weights.values()])
    there = gradient({name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)})
    across = g - (g @ there) / (there @ there) * there
    wanted = w - 0.1 * (there - alpha * across)
    once = tiny_net().double().train()
    once(x)
    method.step(method.prepare(net, range(1)) if share else attack.prepare(net, Training(**how), 1), x, y)
    found = torch.cat([weight.detach().flatten() for weight in net.parameters()])
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12) and not torch.allclose(found, w - 0.1 * g, atol=1e-4)
    assert all(torch.equal(value, dict(once.named_buffers())[name]) for name, value in net.named_buffers())


def test_a_weight_that_the_loss_does_not_know_stays():
    net = tiny_net()
    net.register_parameter("spare", nn.Parameter(torch.ones(3)))
    fixed = FTSAM(epochs=1, lr=0.01, wd=0.0).purify(net, pair(), session=quiet())
    assert fixed.spare.tolist() == [1, 1, 1] and not same_weights(fixed, net)


EPS, RATE, STEPS, RHO, SMOOTHING, LR = 0.3, 0.1, 2, 0.6, 0.2, 0.1


def attacked() -> tuple[nn.Module, nn.Module]:
    """The network to purify, some way from the attacked one."""
    reference = smooth_net()
    net = copy.deepcopy(reference)
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return net, reference


@pytest.mark.parametrize(("true", "distill"), [(0.0, 1.0), (0.0, 0.0), (0.5, 0.7)])
def test_a_step_is_the_formulas_in_double_precision(true, distill):
    (net, reference), (x, y) = attacked(), batch(12, 5)
    twin = copy.deepcopy(net)
    method = SAUSAM(
        eps=EPS, adv_lr=RATE, adv_steps=STEPS, pgd_init="zero", rho=RHO, label_smoothing=SMOOTHING, lr=LR, wd=0.0,
        weight_true=true, weight_shared=1.5, distill=distill, patches=0.0, sgd_momentum=0.0, lr_scheduler="constant",
    )  # fmt: skip
    search = ReleasedSAU(twin, reference, trigger_norm=EPS, adv_lr=RATE, adv_steps=STEPS, pgd_init="zero")
    found = x + search.perturb(x, y)
    s, kept = reference(found).argmax(1), reference(x).argmax(1)
    others = torch.full((12, 3), SMOOTHING / 2, dtype=torch.float64)
    soft = (1 - distill) * others.scatter(1, y[:, None], 1 - SMOOTHING) + distill * reference(x).softmax(1).detach()

    def loss() -> torch.Tensor:
        z, z_adv = twin(x), twin(found)
        p = z_adv.softmax(1)
        total = -(soft * z.log_softmax(1)).sum() / 12
        for i in range(12):
            if s[i] != y[i] and s[i] != kept[i]:
                total = total - 1.5 * (1 + 1e-6 - p[i, s[i]]).log() / 12
                total = total + true * F.cross_entropy(z_adv[i : i + 1], y[i : i + 1]) / 12
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
    report = method.step({**method.prepare(net, range(1)), "_reference": reference, "_sam": FTSAM(rho=RHO)}, x, y)
    assert 0 < report["shared"] < 12
    for after, w, g in zip(net.parameters(), before, there, strict=True):
        assert torch.allclose(after, w - LR * g, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), first.buffers(), strict=True))


def test_the_search_starts_at_random_inside_the_ball():
    (net, _), (x, y), found, method = attacked(), batch(12, 5), [], SAUSAM(eps=EPS, patches=0.0)
    state = method.prepare(net, range(1))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(method.search(state, x, y)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert ((found[0] - x).abs() <= EPS + 1e-12).all()


def test_smaller_networks_have_a_smaller_rho_and_few_images_as_many_updates():
    method = SAUSAM(patches=0.0)
    for model, rho in ((PreActResNet18(width=16), 2.0), (PreActResNet18(width=32), 2.0), (nn.Linear(69, 100), 0.2)):
        assert method.prepare(model, range(1))["_sam"].rho == pytest.approx(rho)
    few, *own = (method.adapted(net, 100) for net in (PreActResNet18(width=16), tiny_net(), nn.Linear(9, 9)))
    assert few.epochs * count_batches(100, few.batch_size) == pytest.approx(20 * 20, rel=0.05)
    found = [(one.distill, one.rho, one.weight_shared, one.adv_steps, one.patches) for one in (few, *own)]
    assert found == [(0.25, 2.0, 1.0, 5, 0.5), (0.5, 0.5, 1.0, 5, 0.5), (0.0, 2.0, 0.5, 5, 0.5)] and few.lr == 0.01
    assert own[0].lr == pytest.approx(method.prepare(tiny_net(), range(1))["_sam"].rho / 100, rel=0.05)
    assert method.adapted(PreActResNet18(width=16), 2500) == method and SAUSAM().patches == 0.3


def test_the_cost_is_counted_in_forward_passes(script):
    """Fine-tuning has one and a backward pass of nearly two: the images need no gradient."""
    assert "| ft | 3.0 | 100 | 29" in script("tables.py", "cost", "ft")[1]
