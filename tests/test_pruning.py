"""What the pruning defenses share: the hold-out, the choice of a level, batch norms, resuming."""

import copy
from typing import Any

import pytest
import torch
from defense_rows import ROWS
from torch import nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import FP, SAUSAM, pruning, sau_sam
from sau.errors import ConfigError, TrainingError
from sau.evaluate import Proportion, Score
from sau.loop import Limit, RunContext


def test_the_last_images_of_each_class_are_held_back():
    """Of 10, 4 and 1 images a fifth is 2, 1 (at least) and none (a class keeps one to learn from). Where no class has a
    second one, all choose."""
    y = torch.tensor([0] * 10 + [1] * 4 + [2])
    x = torch.arange(15.0)
    (kept, kept_y), (held, held_y) = pruning.hold_out(x, y, 0.2)
    assert held.tolist() == [8, 9, 13] and held_y.tolist() == [0, 0, 1]
    assert sorted(kept.tolist() + held.tolist()) == list(range(15)) and len(kept_y) == 12
    assert pruning.hold_out(x, y, 0.1)[1][0].tolist() == [9, 13]  # a tenth of four is none, but for that
    assert [part.tolist() for part, _ in pruning.hold_out(x[:3], torch.arange(3), 0.2)] == [[0, 1, 2]] * 2


# The choice of a level: the network scores (ACC, ASR) in percent with so many channels pruned


def level(n: int) -> pruning.PruningLevel:
    other = torch.zeros(6, dtype=torch.bool)
    return pruning.PruningLevel(f"{n} channels", {"features.1": torch.arange(10) < n, "features.3": other})


def gone(network: nn.Module) -> int:
    """How many channels of a tiny network are pruned."""
    return next(int((p == 0).sum()) for name, p in network.named_parameters() if name.endswith("features.1.weight"))


USUAL = {0: (80, 90), 1: (79, 0), 3: (72, 90), 5: (71, 0), 10: (80, 0)}


@pytest.mark.parametrize(("scores", "select", "expected"), [
    # A tenth of 80 % are 8 points: 72 is allowed, 71 is not, and what comes after it does not count.
    (USUAL, "defender", 3),
    ({0: (80, 90), 1: (71, 0), 3: (80, 0), 5: (80, 0)}, "defender", 0),
    # The lowest ASR of all that are allowed; none where nothing lowers it.
    (USUAL, "oracle", 1),
    ({0: (80, 90), 1: (79, 20), 3: (60, 0), 5: (75, 30)}, "oracle", 1),
    ({0: (80, 90), 1: (79, 90), 3: (79, 95), 5: (79, 90)}, "oracle", 0),
    (USUAL, "blind oracle", 3),
    # A level that empties a layer is never taken.
    ({n: (80, 90) for n in USUAL}, "defender", 5),
])  # fmt: skip
def test_the_level_that_is_chosen(scores, select, expected, monkeypatch):
    """By how many channels go of a tiny network; the blind oracle does not look at the ASR."""
    net, lines = tiny_net(), list[str]()

    def judge(network: nn.Module, **images: Any) -> Score:
        acc, asr = scores[gone(network)]
        return Score(Proportion(acc, 100), None if images else Proportion(asr, 100))

    held = (torch.zeros(4, 3, 16, 16), torch.arange(4)) if select == "defender" else None
    monkeypatch.setattr(pruning, "score", judge)
    session, levels = RunContext(say=lines.append, judge=judge), [level(n) for n in (1, 3, 5, 10)]
    taken = pruning.choose(net, levels, held, 0.1, session, by_asr=select == "oracle")
    assert len(lines) == 1 and lines[0].startswith("warning") == (taken is None)
    assert gone(net) == (taken.count if taken else 0) == expected


@pytest.mark.parametrize("time_for", [2, 0])
def test_an_oracles_search_ends_with_the_time_of_the_run(monkeypatch, time_for):
    """With time for two of five levels, the better of these two is taken."""
    calls = iter(range(9))
    monkeypatch.setattr(Limit, "reached", lambda self: next(calls) == time_for)
    net = tiny_net()

    def judge(network: nn.Module) -> Score:
        return Score(Proportion(90, 100), Proportion(90 - gone(network), 100), Proportion(0, 100))

    session = quiet(judge=judge, limit=Limit(0.0))
    pruning.choose(net, [level(n) for n in range(1, 6)], None, 0.1, session)
    assert gone(net) == time_for and f"level {time_for + 1} of 5" in session.limit.ended


def test_a_fixed_level_that_empties_a_layer_is_refused():
    net = tiny_net()
    with pytest.raises(TrainingError, match=r"features\.1"):
        pruning.prune_fixed(net, level(10), quiet())
    assert same_weights(net, tiny_net())
    pruning.prune_fixed(net, level(1), quiet())
    assert gone(net) == 1


def test_batch_norms_with_all_that_is_needed():
    assert list(pruning.batch_norms(tiny_net(), "clp", running=True)) == ["features.1"]
    batchwise = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    assert list(pruning.batch_norms(batchwise, "anp")) == ["0"]
    for net, running in ((batchwise, True), (nn.Sequential(nn.BatchNorm2d(4, affine=False)), False)):
        with pytest.raises(ConfigError, match="BatchNorm2d"):
            pruning.batch_norms(net, "clp", running=running)


PRUNING = {name: ROWS[name].defense for name in ("anp", "rnp", "clp", "bnp", "ep")}
LAST = FP(unit="last_conv", epochs=1, batch_size=8, acc_ratio=0.99)
each_method = pytest.mark.parametrize("defense", PRUNING.values(), ids=PRUNING)


def pruning_net(*more: nn.Module) -> nn.Sequential:
    """In eval mode; its last convolution has a batch norm behind it, whose shifts are not zero."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3, stride=2), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    net = nn.Sequential(*layers, nn.Linear(10, 4), *more)
    nn.init.normal_(net.get_parameter("1.bias"))
    return net.eval()


def test_channels_that_no_image_opens_are_cut_where_no_logit_changes():
    for layer, count in ((nn.Identity(), 0), (nn.ReLU(), 4)):
        (net := pruning_net())[2] = layer
        net.get_parameter("1.bias").data = torch.tensor([-9.0] * 2 + [1.0] * 8)
        cut = copy.deepcopy(net)
        assert sau_sam.prune_closed(cut, pair()[0].split(3)) == count == 2 * (cut[1].bias == 0).sum()
    for computed in (nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm):  # the weight, anew each time
        computed((cut := copy.deepcopy(net))[5])
        assert sau_sam.prune_closed(cut, pair()[0].split(3)) == 2
    fixed = SAUSAM(epochs=2, batch_size=8).purify(net, pair(), session=quiet())
    assert (fixed[1].bias == 0).nonzero().tolist() == (fixed[5].weight == 0).all(0).nonzero().tolist() == [[0], [1]]


@pytest.mark.parametrize("defense", [*PRUNING.values(), LAST], ids=[*PRUNING, "fp"])
def test_sync_batch_norms_are_pruned_like_any(defense):
    nets = [pruning_net().train(), nn.SyncBatchNorm.convert_sync_batchnorm(pruning_net())]
    fixed = [defense.purify(net, pair(), session=quiet()) for net in nets]
    assert type(fixed[1].get_submodule("1")) is nn.SyncBatchNorm
    assert same_weights(*fixed) and not same_weights(fixed[0], nets[0])


@each_method
def test_batch_norms_of_other_kinds_do_no_harm(defense):
    """A SyncBatchNorm behind a linear layer, and one without shifts, which stays as it is."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(pruning_net(nn.BatchNorm1d(4)))
    fixed = defense.purify(net, pair(), session=quiet())
    assert fixed(pair()[0]).isfinite().all() and not same_weights(fixed, net)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *pruning_net()).eval()
    net[1].bias = None
    fixed = defense.purify(net, pair(), session=quiet())
    assert torch.equal(fixed[1].weight, net[1].weight) and not same_weights(fixed, net)
