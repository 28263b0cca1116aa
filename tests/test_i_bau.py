"""i-BAU: its hypergradient against closed forms, finite differences and a literal transcription; rounds; the toy."""

import copy
import statistics
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import backdoored, batch, pair, quiet, same_weights, smooth_net, tiny_net

from sau.defense import IBAU
from sau.evaluate import score
from sau.models import Normalized
from sau.models.normalized import full_precision, to_channels_last

Double = tuple[Tensor, Tensor]


def hypergradient(defense: IBAU, net: nn.Module, outer: Double, first: Double, delta: Tensor, carriers: Tensor) -> Any:
    surrogate, *_ = defense.losses(net, outer, first, delta, carriers)
    return torch.autograd.grad(surrogate, list(net.parameters()))


@pytest.mark.parametrize("space", ["normalised", "pixel"])
def test_the_hypergradient_is_that_of_the_description_word_by_word(space):
    """Everything on the whole batch, every product by a map of its own, in the network's input."""
    net, std = smooth_net(), torch.tensor([0.25], dtype=torch.float64)
    owned = Normalized(net, (0.5,), (0.25,))
    assert owned.mean is not None and owned.std is not None
    (x, y), (x0, y0) = batch(6, 1), batch(5, 2)
    delta, carriers = torch.rand(1, 1, 4, 4, dtype=torch.float64) - 0.5, torch.tensor([1, 4])
    defense = IBAU(space=space, l2_weight=0.02, fixed_point_lr=0.15, K=5)
    found = hypergradient(defense, owned, (x, y), (x0, y0), delta, carriers)
    weights, into = list(net.parameters()), 1.0 if space == "normalised" else 1 / std
    a, a0 = (x - 0.5) / 0.25, (x0 - 0.5) / 0.25

    def l_in(d: Tensor) -> Tensor:
        return -F.cross_entropy(net(a0 + d * into), y0) + 0.02 * d.norm() ** 2

    def phi(d: Tensor) -> Tensor:
        return d - 0.15 * torch.autograd.grad(l_in(d), d, create_graph=True)[0]

    d = delta.clone().requires_grad_()
    mask = torch.zeros(6, 1, 1, 1, dtype=torch.float64)
    mask[carriers] = 1
    l_out = F.cross_entropy(net(a + mask * d * into), y)
    g_d, *g_t = torch.autograd.grad(l_out, [d, *weights])
    v = torch.zeros_like(d)
    for _ in range(5):
        v = torch.autograd.grad(phi(d), d, v)[0] + g_d
    implicit = torch.autograd.grad(phi(d), weights, v, allow_unused=True)
    assert any(part is not None and float(part.abs().max()) > 1e-6 for part in implicit)
    for ours, direct, part in zip(found, g_t, implicit, strict=True):
        torch.testing.assert_close(ours, direct if part is None else direct + part, rtol=1e-9, atol=1e-12)


def test_the_inner_pass_is_plain_descent_with_the_networks_own_labels():
    net, defense = smooth_net(), IBAU(inner_lr=2.0, l2_weight=0.1)
    batches = [batch(6, 1), batch(5, 2)]
    delta = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    for x, _ in batches:
        d = delta.clone().requires_grad_()
        (-F.cross_entropy(net(x + d), net(x).argmax(1)) + 0.1 * d.square().sum()).backward()
        delta = delta - 2.0 * d.grad
    torch.testing.assert_close(defense.inner_pass(net, batches), delta, rtol=1e-12, atol=0)
    assert float(delta.norm()) > 0.1


def test_carriers_take_turns():
    """1 % of 256 are 2, of 196 one; of fewer than 100 still one, unless nothing is asked for."""
    assert [IBAU().carriers(256, turn).tolist() for turn in (0, 1, 128)] == [[0, 1], [2, 3], [0, 1]]
    assert IBAU().carriers(196, 3).tolist() == [3] and IBAU().carriers(8, 9).tolist() == [1]
    assert IBAU(portion=0.0).carriers(256, 0).tolist() == []
    assert IBAU(portion=1.0).carriers(3, 1).tolist() == [0, 1, 2]


def test_a_round_searches_once_and_updates_once_a_batch():
    """Two rounds by hand, bit by bit; the second one has another perturbation."""
    net, data = tiny_net(), [(pair()[0][:8], pair()[1][:8]), (pair()[0][8:], pair()[1][8:])]
    defense = IBAU(epochs=2, lr=0.01, inner_lr=1.0, augment=False)
    rows: list[dict[str, float]] = []
    session = quiet(on_epoch=lambda epoch, losses, state: rows.append(losses))
    fixed = defense.purify(net, data, session=session)
    ours = to_channels_last(copy.deepcopy(net))
    optimiser = torch.optim.Adam(ours.parameters(), lr=0.01, amsgrad=True, fused=True)
    lengths = []
    for turn in range(2):
        delta = defense.inner_pass(ours, data)
        lengths.append(float(delta.norm()))
        for x, y in data:
            surrogate, *_ = defense.losses(ours, (x, y), data[0], delta, defense.carriers(len(x), turn))
            optimiser.zero_grad()
            surrogate.backward()
            optimiser.step()
    assert same_weights(fixed, ours)
    assert [row["delta"] for row in rows] == pytest.approx(lengths) and lengths[0] != lengths[1]


def test_it_computes_in_single_precision():
    """Under bf16 second derivatives lose their digits; the network's own switch comes back afterwards."""
    net, data = tiny_net(), pair()
    plain = IBAU(epochs=1, lr=0.01).purify(Normalized(net), data, session=quiet())
    fixed = IBAU(epochs=1, lr=0.01).purify(Normalized(net, amp=True), data, session=quiet())
    assert same_weights(plain, fixed) and isinstance(fixed, Normalized) and fixed.amp
    model = Normalized(net, amp=True)
    with pytest.raises(KeyError), full_precision(model):
        assert not model.amp
        raise KeyError
    assert model.amp


def test_it_removes_the_backdoor_and_keeps_the_accuracy():
    """The median of three seeds: one run's outcome hangs on how the processor rounds."""
    net, clean, test, triggered = backdoored()
    before = score(net, test, triggered)
    defense = IBAU(lr=0.01, inner_lr=1.0, portion=0.1, epochs=8, batch_size=25, augment=False)
    tuned = replace(defense, portion=0.0)  # the same updates on clean images alone

    def medians(method: IBAU) -> dict[str, float]:
        runs = (score(method.purify(net, clean, seed=seed, session=quiet()), test, triggered) for seed in range(3))
        shares = [found.shares() for found in runs]
        return {name: statistics.median(one[name].percent for one in shares) for name in ("acc", "asr", "racc")}

    assert before.asr.percent > 90 and medians(tuned)["asr"] > 20
    after = medians(defense)
    assert after["asr"] < 10 and after["racc"] > 80 and after["acc"] >= before.acc.percent - 10
