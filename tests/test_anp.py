"""ANP: its perturbation and its gradient by hand, what it leaves alone, its levels, its claim on a toy."""

import copy
from functools import cache, partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import pair, quiet, tiny_net, toy_images, train_victim

from sau.attack import Blended
from sau.data.images import Batches, Images
from sau.defense import ANP, pruning
from sau.evaluate import score


class Deep(nn.Sequential):
    """Two convolutions with batch norms of 24 channels each."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs in (3, 24):
            layers += [nn.Conv2d(inputs, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(24, 4))


def test_the_perturbation_climbs_by_eps_over_steps_from_where_it_starts():
    """A linear loss g.n has the gradient g everywhere: every step adds eps / steps * sign(g), and nothing is cut off,
    so entries that start at the end of [-eps, eps] leave it, at most to 2 eps; an entry without gradient stays.
    -(n - 0.3)^2 rises towards 0.3: from 0 two steps of 0.2 go to 0.2 and 0.4; from 0.2 the second turns back."""
    g = torch.tensor([[1.0, -2.0, 0.5], [-3.0, 0.0, 0.1]], dtype=torch.float64)
    first = torch.tensor([[0.4, -0.4, -0.4], [0.4, 0.3, 0.1]], dtype=torch.float64)
    by_hand = torch.tensor([[0.8, -0.8, 0.0], [0.0, 0.3, 0.5]], dtype=torch.float64)
    for steps, turned in ((4, None), (2, [[0.4, 0.2]]), (1, [[0.4, 0.6]])):
        ascend = ANP(anp_eps=0.4, anp_steps=steps).ascend
        torch.testing.assert_close(ascend(lambda noise: (g * noise).sum(), first), by_hand, rtol=0, atol=1e-15)
        if turned:
            start = torch.tensor([[0.0, 0.2]], dtype=torch.float64)
            found = ascend(lambda noise: -(noise - 0.3).square().sum(), start)
            torch.testing.assert_close(found, torch.tensor(turned, dtype=torch.float64))


def doubled() -> tuple[Deep, Tensor, Tensor]:
    torch.manual_seed(0)
    net = Deep().double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return net, *pair(8, torch.float64)


def test_masks_and_perturbations_scale_the_batch_norms():
    """The logits are those of a copy whose weights are w * (m + xi) and b * (1 + zeta)."""
    net, x, _ = doubled()
    norms = pruning.batch_norms(net, "anp")
    mask, noise = torch.rand(48, dtype=torch.float64), 0.4 * torch.randn(2, 48, dtype=torch.float64)
    for xi, zeta, given in ((noise[0], noise[1], noise), (torch.zeros(48), torch.zeros(48), 0.0)):
        other = copy.deepcopy(net)
        for k, norm in enumerate(m for m in other.modules() if isinstance(m, nn.BatchNorm2d)):
            part = slice(24 * k, 24 * k + 24)
            norm.weight.data *= mask[part] + xi[part]
            norm.bias.data *= 1 + zeta[part]
        for training in (False, True):
            found = pruning.masked_logits(net.train(training), norms, x, mask, given)
            torch.testing.assert_close(found, other.train(training)(x))


def test_an_iteration_is_the_papers():
    """One update by hand: masks from 1, momentum without effect in the first step, clamped to [0, 1]."""
    net, x, y = doubled()
    network = partial(pruning.masked_logits, net.train(), pruning.batch_norms(net, "anp"))
    rows: list[dict[str, float]] = []
    session = quiet(on_epoch=lambda epoch, losses, state: rows.append(losses))
    defense, batches = ANP(lr=20.0, anp_eps=0.4, anp_alpha=0.2, nb_iter=1, batch_size=8), Batches(x, (y,), 8)
    torch.manual_seed(3)
    masks = torch.cat(list(defense.learn(net, (x, y), batches, session).values()))
    torch.manual_seed(3)
    drawn = torch.randint(8, (8,))
    x, y = x[drawn], y[drawn]
    first = torch.empty(2, 48).uniform_(-0.4, 0.4).double()
    noise = first.clone().requires_grad_()
    (up,) = torch.autograd.grad(F.cross_entropy(network(x, torch.ones(48), noise), y), noise)
    noise = first + 0.4 * up.sign()
    mask = torch.ones(48, dtype=torch.float64, requires_grad=True)
    loss = 0.2 * F.cross_entropy(network(x, mask), y) + 0.8 * F.cross_entropy(network(x, mask, noise), y)
    (down,) = torch.autograd.grad(loss, mask)
    torch.testing.assert_close(masks, (1 - 20.0 * down).clamp(0, 1))
    assert rows[0]["loss"] == pytest.approx(loss.item()) and rows[0]["perturbed_loss"] > rows[0]["clean_loss"]
    assert rows[0]["mask"] == pytest.approx(masks.mean().item())
    assert masks.min() == 0 and masks.max() == 1 and ((masks > 0) & (masks < 1)).any()


@pytest.mark.parametrize(("settings", "learned", "chosen_by"), [
    ({}, 16, 4), ({"held_back": 0.4}, 12, 8), ({"select": "oracle"}, 20, None), ({"pruning_number": 0.5}, 20, None),
])  # fmt: skip
def test_the_masks_are_learned_from_other_images_than_those_that_choose(monkeypatch, settings, learned, chosen_by):
    """Only where the defender searches, and those that choose are not augmented."""
    x, y = pair(20)
    used: list[Tensor] = []

    def learn(self, model, clean, batches, session):
        assert batches.augment is not None
        used.append(clean[0])
        return {"net.features.1": torch.ones(10)}

    monkeypatch.setattr(ANP, "learn", learn)
    monkeypatch.setattr(pruning, "choose", lambda model, levels, held, *rest: used.append(held and held[0]))
    ANP(**settings).purify(tiny_net(), (x, y), session=quiet(judge=lambda network: None))
    assert len(used[0]) == learned
    if chosen_by:
        assert len(used[1]) == chosen_by
        assert {*torch.cat(used).flatten(1).sum(1).tolist()} == {*x.flatten(1).sum(1).tolist()}


MASKS = {"a": torch.tensor([0.1, 0.9, 0.5]), "b": torch.tensor([0.5, 0.0])}


@pytest.mark.parametrize(("by", "value", "expected"), [
    ("threshold", 0.5, [[0, 2], [0, 1]]),  # up to and including
    ("threshold", 0.0, [[], [1]]),
    ("number", 0.0, [[], []]),
    ("number", 2.0, [[0], [1]]),
    ("number", 3.0, [[0, 2], [1]]),  # of equal masks the first
])  # fmt: skip
def test_levels_by_threshold_and_by_number(by, value, expected):
    found = ANP(pruning_by=by, pruning_number=0.0).level(MASKS, value).pruned
    assert [flags.nonzero().flatten().tolist() for flags in found.values()] == expected


def test_a_number_prunes_scales_and_leaves_everything_else():
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    fixed = ANP(nb_iter=2, batch_size=4, pruning_by="number", pruning_number=4.0).purify(net, pair(), session=quiet())
    assert (fixed.features[1].weight == 0).sum() == 4 and (fixed.features[1].bias == 1).all()
    changed = [name for name, value in fixed.state_dict().items() if not torch.equal(value, net.state_dict()[name])]
    assert changed == ["features.1.weight"]


@cache
def backdoored() -> tuple[nn.Module, Images, Images]:
    """A network with batch norms and Blended's backdoor, the test set, the triggered test set."""
    attack, test = Blended(), toy_images(200, seed=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = train_victim(attack, toy_images(400, seed=1), net=Deep())
    return net, test, attack.poison_test(test)


@pytest.mark.parametrize("select", ["defender", "oracle"])
def test_pruning_removes_the_backdoor_and_keeps_the_accuracy(select):
    net, test, triggered = backdoored()
    before = score(net, test, triggered)
    session = quiet(judge=lambda network: score(network, test, triggered))
    defense = ANP(nb_iter=60, batch_size=64, lr=0.2, select=select, augment=False)
    after = score(defense.purify(net, toy_images(200, seed=3), session=session), test, triggered)
    assert before.asr.percent > 95 and before.acc.percent > 95
    assert after.asr.percent < 15 and after.acc.percent >= before.acc.percent - 10 and after.racc.percent > 85
