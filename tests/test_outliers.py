"""What CLP, BNP and EP share: the rule by examples worked by hand, the oracle's search, and the claim, with RNP."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_pruning import gone
from torch import nn
from toys import pair, planted, quiet, same_weights, tiny_net

from sau.defense import BNP, CLP, EP, RNP, Defense, pruning
from sau.evaluate import Proportion, Score, score
from sau.loop import Session
from sau.models import Normalized


@pytest.mark.parametrize(
    ("scores", "u", "expected"),
    [
        ([0.0, 0, 0, 0, 5], 1.78, [4]),  # mean 1, deviation sqrt(20 / 4): the last lies 4 / 2.236 = 1.789 above
        ([0.0, 0, 0, 0, 5], 1.79, []),
        ([-5.0, 0, 0, 0, 0], 1.78, []),
        ([-5.0, 0, 0, 0, 0], 0.0, [1, 2, 3, 4]),
        # A layer keeps its lowest score, also where the mean of equal ones is rounded below them, or there is but one.
        *(([0.1] * n, 0.0, []) for n in (3, 7)),
        ([2.0], 0.0, []),
        ([1e-9, 1.0], 0.0, [1]),
    ],
)
def test_channels_u_deviations_above_their_layer_are_outliers(scores, u, expected):
    found = CLP().outliers({"a": torch.tensor(scores, dtype=torch.float64)}, u).pruned
    assert [i for flags in found.values() for i in flags.nonzero().flatten().tolist()] == expected


@dataclass(frozen=True, kw_only=True)
class First(pruning.ChannelOutlierPruning):
    """Channel i of the tiny network's batch norm scores -i: with u 1 the first two go, 4.5 / 3.03 and 3.5 / 3.03."""

    name: ClassVar[str] = "first"

    def scores(self, model, batches):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert not any(getattr(module, "amp", False) for module in model.modules())
        (name,) = pruning.batch_norms(model, "first")
        return {name: -torch.arange(10.0)}


def test_the_shift_goes_too_with_zero_shift():
    """And the precision comes back."""
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    for zero_shift in (True, False):
        model = First(u=1.0, zero_shift=zero_shift).purify(Normalized(net, amp=True), pair(), session=quiet())
        fixed = model.net
        assert model.amp is True and fixed.features[1].weight.tolist() == [0, 0] + [1] * 8
        assert fixed.features[1].bias.tolist() == [float(not zero_shift)] * 2 + [1] * 8


def test_the_oracle_tries_u_from_the_highest_to_the_lowest():
    """1.0 (two channels) has the lowest ASR among those that keep the accuracy; 0.0 costs too much."""
    measured = []

    def judge(network: nn.Module) -> Score:
        measured.append(gone(network))
        acc, asr = {0: (90, 99), 2: (89, 1), 3: (85, 5), 5: (10, 0)}[measured[-1]]
        return Score(Proportion(acc, 100), Proportion(asr, 100))

    defense = First(select="oracle", u_min=0.0, u_max=1.5, u_num=4)
    fixed = defense.purify(tiny_net(), pair(), session=Session(judge=judge, say=lambda line: None))
    assert measured == [0, 2, 3, 5] and gone(fixed) == 2


@pytest.mark.parametrize("cls", [CLP, BNP, EP])
def test_nothing_but_scales_and_shifts_of_pruned_channels_changes(cls):
    """And no hook stays behind."""
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    fixed = cls(u=0.5, batch_size=10).purify(net, pair(), session=quiet())
    zero = fixed.features[1].weight == 0
    assert zero.any() and torch.equal(zero, fixed.features[1].bias == 0)
    with torch.no_grad():
        fixed.features[1].weight[zero], fixed.features[1].bias[zero] = 1, 1
    assert same_weights(fixed, net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fixed.modules())


# The claim: the one channel that answers to the trigger goes, and no other


@pytest.mark.parametrize(
    "defense",
    [
        CLP(),
        BNP(augment=False),
        EP(augment=False),
        RNP(batch_size=200, unlearning_lr=0.005, recovering_lr=5.0, pruning_number=None, augment=False),
    ],
    ids=lambda defense: defense.name,
)
def test_the_planted_channel_goes_and_no_other(defense: Defense):
    net, poisoned, clean, triggered = planted(share=0.2 if defense.data_use == "poisoned" else 0.05)
    before = score(net, clean, triggered)
    given = (poisoned, net(poisoned).argmax(1)) if defense.data_use == "poisoned" else clean
    fixed = defense.purify(net, given, session=quiet())
    after = score(fixed, clean, triggered)
    assert (fixed[1].weight == 0).nonzero().flatten().tolist() == [5]
    assert before.asr.percent > 95 and before.acc.percent > 95
    assert after.asr.percent < 5 and after.acc.percent > 95
    assert after.racc.percent > before.racc.percent + 50
