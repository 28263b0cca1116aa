"""What CLP, BNP and EP share: the rule by a hand-worked example, the sweep, what is left alone, wrong settings."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import BNP, CLP, EP, outliers, pruning
from sau.defense.outliers import Outliers
from sau.errors import ConfigError
from sau.evaluate import Score, Share
from sau.loop import Session
from sau.models import Normalized


def test_a_channel_goes_that_lies_u_deviations_above_its_layer():
    """0, 0, 0, 0, 5 have the mean 1 and the deviation sqrt(20 / 4); the last lies 4 / 2.236 = 1.789 of them above."""
    scores = {"a": torch.tensor([0.0, 0, 0, 0, 5]), "b": torch.tensor([-5.0, 0, 0, 0, 0])}
    found = outliers.level(scores, 1.78)
    assert found.pruned["a"].tolist() == [False] * 4 + [True] and not found.pruned["b"].any() and found.name == "u 1.78"
    assert outliers.level(scores, 1.79).count == 0
    assert outliers.level(scores, 0.0).pruned["b"].tolist() == [False] + [True] * 4


def test_a_layer_keeps_its_least_suspicious_channel():
    """Also where all scores are equal and their mean is rounded below them, and where there is one channel."""
    for scores in ([0.1] * 3, [0.1] * 7, [2.0], [1e-9, 1.0]):
        flags = outliers.level({"a": torch.tensor(scores, dtype=torch.float64)}, 0.0).pruned["a"]
        assert flags.tolist() == [False] * (len(scores) - 1) + [scores[-1] == 1]


@dataclass(frozen=True, kw_only=True)
class First(Outliers):
    """Channel i of the tiny network's batch norm scores -i."""

    name: ClassVar[str] = "first"

    def scores(self, model, batches):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert not any(getattr(module, "amp", False) for module in model.modules())
        (name,) = pruning.batch_norms(model, "first")
        return {name: -torch.arange(10.0)}


@pytest.mark.parametrize(("defense", "looks"), [(EP(), True), (BNP(), True), (CLP(), False)])
def test_who_looks_at_pictures_refuses_by_them(defense, looks, monkeypatch):
    """CLP looks at none, so that nobody can tell it that too much would go."""
    seen = []
    monkeypatch.setattr(pruning, "prune_checked", lambda model, level, prune, pictures, session: seen.append(pictures))
    x, y = pair(20)
    defense.purify(tiny_net(), (x, y), session=quiet())
    assert (seen[0] is not None) == looks and (not looks or len(seen[0][0]) > 0)


def test_the_shift_goes_too_unless_it_is_asked_to_stay():
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    for zero_shift in (True, False):
        fixed = First(u=1.0, zero_shift=zero_shift).purify(net, pair(), session=quiet())
        assert fixed.features[1].weight.tolist() == [0, 0] + [1] * 8  # 4.5 / 3.03 and 3.5 / 3.03 above the mean
        assert fixed.features[1].bias.tolist() == [float(not zero_shift)] * 2 + [1] * 8


def test_the_precision_comes_back():
    model = Normalized(tiny_net(), amp=True)
    assert First().purify(model, pair(), session=quiet()).amp is True and model.amp is True


def test_the_oracle_tries_u_from_the_highest_to_the_lowest():
    """1.0 (two channels) has the lowest ASR among those that keep the accuracy; 0.0 costs too much."""
    said, measured = [], []

    def judge(network: nn.Module) -> Score:
        gone = int((network.get_parameter("net.features.1.weight") == 0).sum())
        measured.append(gone)
        return Score(Share({0: 90, 2: 89, 3: 85, 5: 10}[gone], 100), Share({0: 99, 2: 1, 3: 5, 5: 0}[gone], 100))

    session = Session(judge=judge, say=said.append)
    defense = First(select="oracle", u_min=0.0, u_max=1.5, u_num=4)
    fixed = defense.purify(tiny_net(), pair(), session=session)
    assert measured == [0, 2, 3, 5] and (fixed.features[1].weight == 0).sum() == 2
    assert "u 1)" in said[-1] and "test ACC" in said[-1]


@pytest.mark.parametrize("cls", [CLP, BNP, EP])
def test_a_network_without_what_is_pruned_is_refused(cls, one_line):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError) as refusal:
        cls().purify(plain, pair(), session=quiet())
    assert "BatchNorm2d" in one_line(refusal.value) and cls.name in str(refusal.value)


@pytest.mark.parametrize("cls", [CLP, BNP, EP])
def test_nothing_but_scales_and_shifts_of_pruned_channels_changes(cls):
    """And no hook stays behind."""
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    fixed = cls(u=0.5, batch_size=10).purify(net, pair(), session=quiet())
    gone = fixed.features[1].weight == 0
    assert gone.any() and torch.equal(gone, fixed.features[1].bias == 0)
    with torch.no_grad():
        fixed.features[1].weight[gone], fixed.features[1].bias[gone] = 1, 1
    assert same_weights(fixed, net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fixed.modules())
