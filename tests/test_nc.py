"""NC: the cost schedule and the outlier rule by hand, the inversion against one class at a time, planted patches."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import pair, quiet, said, same_weights, tiny_net, toy_images, train_victim

from sau.attack import BadNet
from sau.defense import NC
from sau.defense.nc import Patches, anomaly, unit
from sau.evaluate import score
from sau.optim import adam


@pytest.mark.parametrize(("norms", "index", "flagged"), [
    # Median 50, deviations 40, 10, 0, 10, 40 with the median 10; positive below the median.
    ([10.0, 40, 50, 60, 90], [40 / 14.826, 10 / 14.826, 0, -10 / 14.826, -40 / 14.826], [0]),
    # Of an even number the mean of the middle two, 3.5; deviations 2.5, 0.5, 0.5, 2.5 with the median 1.5.
    ([1.0, 3, 4, 6], [2.5 / 2.2239, 0.5 / 2.2239, -0.5 / 2.2239, -2.5 / 2.2239], []),
    ([7.0] * 5, [0.0] * 5, []),
])  # fmt: skip
def test_the_anomaly_index_by_hand(norms, index, flagged):
    """An outlier on the small side is flagged."""
    assert anomaly(torch.tensor(norms, dtype=torch.float64)).tolist() == pytest.approx(index, rel=1e-14)
    assert NC().flagged(torch.tensor(norms)) == flagged and NC(index_threshold=2.7).flagged(torch.tensor(norms)) == []
    assert NC().flagged(torch.tensor([7.0] * 4 + [6.0])) == [4] and NC().flagged(torch.tensor([7.0] * 4 + [8.0])) == []


def passes(
    defense: NC, outcomes: list[tuple[float, float]], cost: float = 1.0
) -> tuple[list[float], list[bool], Patches]:
    """Costs and stops after passes of two updates with (success in %, norm); the mask of pass i is that of logit i."""
    patches = Patches(1, torch.zeros(1, 3, 2, 2), cost).double()
    costs, stops = [], []
    for number, (success, norm) in enumerate(outcomes):
        nn.init.constant_(patches.mask, float(number))
        patches.hits += 2 * success / 100
        patches.norms += 2 * norm
        stops.append(defense.end_pass(patches, 2, {}))
        costs.append(float(patches.cost))
    return costs, stops, patches


def test_the_cost_rises_after_successes_in_a_row_and_falls_after_failures():
    """Patience 2: two successes double it, two failures divide it by 2 ** 1.5, a change starts the count anew."""
    outcomes = [(100, 9), (98, 9), (98, 9), (0, 9), (99, 9), (97.9, 9), (0, 9), (0, 9), (50, 9)]
    low = 2**-1.5
    costs, stops, _ = passes(NC(patience=2), outcomes)
    wanted = [1, 2, 2, 2, 2, 2, 2 * low, 2 * low, 2 * low * low]
    assert costs == pytest.approx(wanted, rel=1e-7) and not any(stops)  # torch takes the factors for float32
    assert passes(NC(patience=2, cost_multiplier=4.0), outcomes[:2])[0] == [1, 4]


def test_a_cost_that_begins_at_zero_is_switched_on_by_successes_as_in_the_paper():
    """What it did before does not count as having gone both ways: the class goes on, though nothing shrinks."""
    defense = NC(patience=2, init_cost=0.0, early_stop_patience=1)
    outcomes = [(0, 9), (0, 9), (99, 9), (99, 9), (99, 9), (99, 9), (0, 9), (0, 9), (0, 9)]
    costs, stops, _ = passes(defense, outcomes, cost=0.0)
    wanted = [0, 0, 0, 1e-3, 2e-3, 2e-3, 2e-3, 2e-3 * 2**-1.5, 2e-3 * 2**-1.5]
    assert costs == pytest.approx(wanted, rel=1e-6) and stops == [False] * 8 + [True]
    falls = [(99, 9), (99, 9), (0, 9), (0, 9), (0, 9)]  # right after it was switched on, which is no rise
    assert passes(defense, falls, cost=0.0)[1] == [False] * 5


@pytest.mark.parametrize(("outcomes", "number", "norm"), [
    # The first pass stands in, though it fails; then 8 works, 9 is larger, 5 fails, 6 works, 6 is not smaller.
    ([(50, 3), (50, 2), (99, 8), (99, 9), (97, 5), (99, 6), (99, 6)], 5.0, 6.0),
    ([(50, 3), (50, 2), (97, 1)], 0.0, math.inf),
])  # fmt: skip
def test_the_best_patch_is_the_smallest_that_works(outcomes, number, norm):
    _, _, patches = passes(NC(), outcomes)
    assert torch.equal(patches.best_mask, unit(torch.full((1, 1, 2, 2), number, dtype=torch.float64)))
    assert float(patches.best) == norm


def test_a_class_stops_when_its_cost_went_both_ways_and_its_patch_no_longer_shrinks():
    """Patience 1 moves the cost every pass. The best norm is 10 in pass 1; it does not shrink in passes 2, 3 and 4, for
    9.95 is above 0.99 * 10, so the third of them stops. With 9.8 in pass 3, and 8 in pass 5, it is passes 6 to 8."""
    outcomes = [(99, 10), (0, 5), (99, 11), (99, 9.95), (99, 8), (0, 7), (0, 7), (0, 7)]
    defense = NC(patience=1, early_stop_patience=3)
    assert passes(defense, outcomes)[1] == [False] * 3 + [True] + [True] * 4
    assert passes(replace(defense, early_stop_patience=4), outcomes)[1] == [False] * 8
    outcomes[2] = (99, 9.8)
    assert passes(defense, outcomes)[1] == [False] * 7 + [True]
    assert passes(replace(defense, early_stop=False), outcomes)[1] == [False] * 8
    assert passes(defense, [(99, 10)] * 9)[1] == [False] * 9  # the cost never fell
    assert passes(defense, [(0, 10)] * 9)[1] == [False] * 9  # nothing ever worked


@pytest.mark.parametrize("group", [1, 3, 10])
def test_the_gradient_of_an_update_is_that_of_the_formula(monkeypatch, group):
    """In float64, each class by itself; Adam would not see a wrong scale. A class that has stopped has none."""
    net, (x, y) = tiny_net().double().requires_grad_(False), pair(8, torch.float64)
    patches = Patches(4, pair(1)[0], 0.01).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        patches.mask += torch.randn(patches.mask.shape, generator=generator, dtype=torch.float64)
        patches.pattern += torch.randn(patches.pattern.shape, generator=generator, dtype=torch.float64)
    patches.cost.copy_(torch.tensor([0.01, 0.01, 0.05, 0.01], dtype=torch.float64))
    patches.open[1] = False
    both = (patches.mask, patches.pattern)
    before = tuple(logits.detach().clone() for logits in both)
    state = {"patches": patches, "descent": adam(0.1).descent(both, 1)}
    monkeypatch.setattr("sau.defense.nc.GROUP", group)
    report = NC().invert_step(net, state, x, y)
    seen = [logits.grad for logits in both]
    entropies = []
    for c, cost in ((0, 0.01), (2, 0.05), (3, 0.01)):
        u, w = (logits[c].requires_grad_() for logits in before)
        m, p = u.tanh() / (2 + 1e-7) + 0.5, w.tanh() / (2 + 1e-7) + 0.5
        entropy = F.cross_entropy(net((1 - m) * x + m * p), torch.full((8,), c))
        wanted = torch.autograd.grad(entropy + cost * m.abs().sum(), (u, w))
        for found, theirs in zip(seen, wanted, strict=True):
            torch.testing.assert_close(found[c], theirs, rtol=1e-10, atol=1e-14)
        entropies.append(float(entropy.detach()))
    assert not seen[0][1].any() and not seen[1][1].any()
    assert float(report["loss"]) == pytest.approx(sum(entropies) / 3, rel=1e-12)


class Planted(nn.Module):
    """A linear network of eight classes on 8x8 images: small orthogonal weights of all pixels, which ask for a large
    patch; a planted class has large weights of four pixels."""

    def __init__(self, planted: tuple[int, ...]) -> None:
        super().__init__()
        walsh = torch.ones(1, 1)
        for _ in range(6):
            walsh = torch.cat([torch.cat([walsh, walsh], 1), torch.cat([walsh, -walsh], 1)])
        weight = 0.1 * walsh[11:19]
        for c in planted:
            weight[c] = 0
            weight[c, 8 * c : 8 * c + 4] = 3.0
        self.linear = nn.Linear(64, 8)
        self.linear.load_state_dict({"weight": weight, "bias": torch.zeros(8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1) - 0.5)


def grey() -> tuple[Tensor, Tensor]:
    torch.manual_seed(7)
    return (0.5 + 0.05 * torch.randn(40, 1, 8, 8)).clamp(0, 1), torch.arange(40) % 8


@pytest.mark.parametrize(("planted", "how"), [
    ((3,), {"nc_epoch": 60, "init_cost": 0.05}), ((1, 5), {"init_cost": 0.1, "mask_lr": 0.3}),
    ((), {"nc_epoch": 60, "epochs": 2}),  # without an outlier the network stays as it is
])  # fmt: skip
def test_every_planted_class_is_flagged(planted, how):
    defense = NC(**{"nc_epoch": 40, "init_cost": 0.05, "batch_size": 20, "epochs": 0, **how})
    fixed, lines, findings = said(defense, Planted(planted), grey())
    classes = ", ".join(map(str, planted)) or "none"
    assert any(line.startswith(f"flagged classes: {classes}") and "largest anomaly" in line for line in lines)
    assert same_weights(fixed, Planted(planted)) and not any("round" in line for line in lines)
    found = json.loads(json.dumps(findings, allow_nan=False))
    assert found["flagged"] == list(planted) and len(found["mask_norm"]) == 8
    assert found["anomaly_index"] == pytest.approx(anomaly(torch.tensor(found["mask_norm"])).tolist(), abs=1e-2)


def test_with_a_flagged_class_the_network_is_fine_tuned():
    defense = NC(nc_epoch=60, batch_size=20, epochs=2, init_cost=0.05, index_threshold=0.0)
    fixed, lines, _ = said(defense, Planted(()), grey())
    assert not same_weights(fixed, Planted(())) and any(line.startswith("round 2/2") for line in lines)


def test_the_pictures_of_the_fine_tuning_by_hand():
    """Ten images, two flagged classes: eight clean, the last two stamped twice, all with their true labels."""
    x, y = pair(10)
    defense, patches = NC(batch_size=50), Patches(8, x[:1], 0.01)
    generator = torch.Generator().manual_seed(1)
    sizes = torch.tensor([0.5, 0.01, 0.52, 0.48, 0.51, 0.02, 0.49, 0.5])
    patches.best_mask = sizes.view(8, 1, 1, 1) * torch.rand(8, 1, 16, 16, generator=generator)
    patches.best_pattern = torch.rand(8, 3, 16, 16, generator=generator)
    assert defense.flagged(patches.sizes) == [1, 5]
    pixels, labels = defense.stamped(x, y, patches)
    assert torch.equal(pixels[:8], x[:8]) and labels.tolist() == [*y.tolist(), *y[8:].tolist()]
    for place, c in ((8, 1), (10, 5)):
        m, p = patches.best_mask[c], patches.best_pattern[c]
        torch.testing.assert_close(pixels[place : place + 2], (1 - m) * x[8:] + m * p)
    few = replace(defense, unlearning_ratio=0.01).stamped(x, y, patches)[1]
    assert few.tolist() == [*y.tolist(), *y[9:].tolist()]  # one image at least


def test_it_finds_the_patch_of_badnets_and_unlearns_it():
    attack, clean, test = BadNet(attack_target=2), toy_images(200, seed=3), toy_images(200, seed=2)
    net, triggered = train_victim(attack, toy_images(400, seed=1)), attack.poison_test(test)
    before = score(net, test, triggered)
    fixed, lines, _ = said(NC(nc_epoch=40, epochs=10, batch_size=50, augment=False), net, clean)
    after = score(fixed, test, triggered)
    assert any(line.startswith("flagged classes: 2; ") for line in lines)
    assert before.asr.percent > 90 and after.asr.percent < 10
    assert after.racc.percent > 80 and after.acc.percent >= before.acc.percent - 5


def test_the_inversion_sees_pictures_without_augmentation_unless_asked():
    def norms(**how: bool) -> list[float]:
        rows: list[Any] = []
        session = quiet(on_epoch=lambda epoch, losses, state: rows.append(losses))
        NC(nc_epoch=1, epochs=0, batch_size=8, **how).purify(tiny_net(), pair(), session=session)
        return [row["loss"] for row in rows]

    plain = norms(augment=False)
    assert norms(augment=True) == plain and norms(augment=True, augment_inversion=True) != plain
    assert norms(augment=False, augment_inversion=True) == plain  # nothing to crop by


def test_a_share_of_each_batch_is_inverted(monkeypatch):
    monkeypatch.setattr("sau.defense.nc.GROUP", 2)
    sizes, (x, y) = [], pair(11)
    net = tiny_net()
    net.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    defense = NC(inversion_share=0.3, nc_epoch=1)
    defense.invert(net, [(x[:8], y[:8]), (x[8:], y[8:])], Patches(4, x[:1], 0.01), quiet())
    assert sizes == [6, 6, 2, 2]  # three of eight and one of three images, for two classes at a time
