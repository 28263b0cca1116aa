"""What the pruning defenses share: the hold-out, the choice of a level, batch norms, resuming."""

from functools import partial
from typing import Any

import pytest
import torch
from checkpoints import resumed
from defense_rows import ROWS
from torch import Tensor, nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import ANP, FP, RNP, anp, pruning
from sau.errors import ConfigError, TrainingError
from sau.evaluate import Proportion, Score
from sau.loop import Limit, Session


def test_the_last_images_of_each_class_are_held_back():
    """Of 10, 4 and 1 images a fifth is 2, 1 (at least) and none (a class keeps one to learn from)."""
    y = torch.tensor([0] * 10 + [1] * 4 + [2])
    x = torch.arange(15.0)
    (kept, kept_y), (held, held_y) = pruning.hold_out(x, y, 0.2, quiet())
    assert held.tolist() == [8, 9, 13] and held_y.tolist() == [0, 0, 1]
    assert sorted(kept.tolist() + held.tolist()) == list(range(15)) and len(kept_y) == 12
    assert pruning.hold_out(x, y, 0.1, quiet())[1][0].tolist() == [9, 13]  # a tenth of four is none, but for that


def test_where_no_class_has_a_second_image_all_choose_with_a_warning():
    x, y, lines = torch.arange(3.0), torch.tensor([0, 1, 2]), []
    (kept, _), (held, _) = pruning.hold_out(x, y, 0.2, Session(say=lines.append))
    assert kept.tolist() == held.tolist() == [0, 1, 2]
    assert len(lines) == 1 and lines[0].startswith("warning: ")


# The choice of a level: the network scores (ACC, ASR) in percent with so many channels pruned


def level(n: int) -> pruning.PruningLevel:
    other = torch.zeros(2, dtype=torch.bool)
    return pruning.PruningLevel(f"{n} channels", {"features.1": torch.arange(10) < n, "other": other})


def gone(network: nn.Module) -> int:
    """How many channels of a tiny network are pruned."""
    return next(int((p == 0).sum()) for name, p in network.named_parameters() if name.endswith("features.1.weight"))


def prune_tiny(net: nn.Module, chosen: pruning.PruningLevel) -> None:
    pruning.zero_channels(net.get_submodule("features.1"), chosen.pruned["features.1"], shift=False)


Scores = dict[int, tuple[int, int]]
USUAL: Scores = {0: (80, 90), 1: (79, 0), 3: (72, 90), 5: (71, 0), 10: (80, 0)}


def outcome(scores: Scores, select: str, *, tolerance: float = 0.1, y: tuple[int, ...] = (0, 1, 2, 3)) -> int:
    """How many channels go of a tiny network; `select` may also be the oracle that does not look at the ASR."""
    net, lines = tiny_net(), list[str]()

    def judge(network: nn.Module, **images: Any) -> Score:
        acc, asr = scores[gone(network)]
        return Score(Proportion(acc, 100), None if images else Proportion(asr, 100))

    held = (torch.zeros(len(y), 3, 16, 16), torch.tensor(y)) if select == "defender" else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "score", judge)
        session, levels = Session(say=lines.append, judge=judge), [level(n) for n in (1, 3, 5, 10)]
        prune = partial(prune_tiny, net)
        taken = pruning.choose(net, levels, prune, held, tolerance, session, by_asr=select == "oracle")
    assert len(lines) == 1 and lines[0].startswith("warning") == (taken is None)
    assert gone(net) == (taken.count if taken else 0)
    return gone(net)


@pytest.mark.parametrize(
    ("scores", "select", "more", "expected"),
    [
        # A tenth of 80 % are 8 points: 72 is allowed, 71 is not, and what comes after it does not count.
        (USUAL, "defender", {}, 3),
        ({0: (80, 90), 1: (71, 0), 3: (80, 0), 5: (80, 0)}, "defender", {}, 0),
        # The lowest ASR of all that are allowed; none where nothing lowers it.
        (USUAL, "oracle", {}, 1),
        ({0: (80, 90), 1: (79, 20), 3: (60, 0), 5: (75, 30)}, "oracle", {}, 1),
        ({0: (80, 90), 1: (79, 90), 3: (79, 95), 5: (79, 90)}, "oracle", {}, 0),
        (USUAL, "blind oracle", {}, 3),
        # A level that empties a layer is never taken.
        ({n: (80, 90) for n in USUAL}, "defender", {}, 5),
        # Of four classes chance is 25 %, of others the share of the commonest. An accuracy of chance would not fall.
        *(({n: (acc, 90 - n) for n in USUAL}, "defender", {}, went) for acc, went in ((24, 0), (25, 0), (26, 5))),
        ({n: (24, 90 - n) for n in USUAL}, "oracle", {}, 5),
        ({0: (60, 90), 1: (55, 90), 3: (30, 90), 5: (25, 0)}, "defender", {"tolerance": 0.9}, 3),
        ({0: (60, 90), 1: (55, 90), 3: (30, 90), 5: (25, 0)}, "defender", {"tolerance": 0.9, "y": (0, 0, 1, 2)}, 1),
        ({0: (60, 90)}, "defender", {"y": (0, 0, 0, 2)}, 0),
    ],
)
def test_the_level_that_is_chosen(scores, select, more, expected):
    assert outcome(scores, select, **more) == expected


def test_equal_levels_are_measured_once():
    measured, net = [], tiny_net()

    def judge(network: nn.Module) -> Score:
        measured.append(gone(network))
        return Score(Proportion(90, 100), Proportion(90 - measured[-1], 100), Proportion(0, 100))

    levels = [level(n) for n in (0, 2, 2, 3, 3)]
    pruning.choose(net, levels, partial(prune_tiny, net), None, 0.1, Session(judge=judge, say=lambda line: None))
    assert measured == [0, 2, 3] and gone(net) == 3


@pytest.mark.parametrize("time_for", [2, 0])
def test_an_oracles_search_ends_with_the_time_of_the_run(monkeypatch, time_for):
    """With time for two of five levels, the better of these two is taken."""
    calls = iter(range(9))
    monkeypatch.setattr(Limit, "reached", lambda self: next(calls) == time_for)
    net = tiny_net()

    def judge(network: nn.Module) -> Score:
        return Score(Proportion(90, 100), Proportion(90 - gone(network), 100), Proportion(0, 100))

    session = Session(judge=judge, say=lambda line: None, limit=Limit(0.0))
    pruning.choose(net, [level(n) for n in range(1, 6)], partial(prune_tiny, net), None, 0.1, session)
    assert gone(net) == time_for and f"level {time_for + 1} of 5" in session.limit.ended


def test_a_fixed_level_that_empties_a_layer_is_refused():
    net = tiny_net()
    with pytest.raises(TrainingError, match=r"features\.1"):
        pruning.prune_fixed(net, level(10), partial(prune_tiny, net), None, quiet())
    assert same_weights(net, tiny_net())
    pruning.prune_fixed(net, level(1), partial(prune_tiny, net), None, quiet())
    assert gone(net) == 1


class Shifted(nn.Module):
    """Answers the class x + shift, cut to 0, modulo 4."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot((x.flatten() + self.shift).clamp_min(0).long() % 4, 4).float()


@pytest.mark.parametrize("shift", [-8.0, 1.0])  # always one class; never right
def test_a_fixed_level_that_leaves_a_network_that_guesses_is_refused(shift):
    """Where half stays right, where the network guessed before, and without images it is pruned."""
    net, x, y = Shifted(), torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8) % 4

    def prune(level: pruning.PruningLevel) -> None:
        nn.init.constant_(net.shift, shift)

    with pytest.raises(TrainingError, match="8 -> "):
        pruning.prune_fixed(net, level(1), prune, (x, y), quiet())
    assert net.shift.item() == 0
    half = torch.where(torch.arange(8) < 4, y, Shifted()(x + shift).argmax(1))
    for clean in ((x, half), (x, y + 1 - 4 * (y == 3)), None):
        pruning.prune_fixed(net, level(1), prune, clean, quiet())
        assert net.shift.item() == shift
        nn.init.zeros_(net.shift)


def test_whatever_is_tried_is_undone():
    net = tiny_net()
    with pytest.raises(KeyError), pruning.restore_weights(net):
        nn.init.zeros_(net.linear.weight)
        raise KeyError
    assert same_weights(net, tiny_net())


def test_a_sweep_reaches_its_end():
    """0.3 / 0.05 is a little less than six."""
    assert pruning.sweep(0.3, 0.05) == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]


# Batch norms


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


@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("defense", [*PRUNING.values(), LAST], ids=[*PRUNING, "fp"])
def test_sync_batch_norms_are_pruned_like_any(defense, training):
    nets = [pruning_net(), nn.SyncBatchNorm.convert_sync_batchnorm(pruning_net())]
    fixed = [defense.purify(net.train(training), pair(), session=quiet()) for net in nets]
    assert type(fixed[1].get_submodule("1")) is nn.SyncBatchNorm
    assert same_weights(*fixed) and not same_weights(fixed[0], nets[0])


@pytest.mark.usefixtures("no_chance")
@each_method
def test_batch_norms_of_other_kinds_do_no_harm(defense):
    """A SyncBatchNorm behind a linear layer, and a batch norm without shifts, which stays as it is."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(pruning_net(nn.BatchNorm1d(4)))
    fixed = defense.purify(net, pair(), session=quiet())
    assert fixed(pair()[0]).isfinite().all() and not same_weights(fixed, net)
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *pruning_net()).eval()
    net[1].bias = None
    fixed = defense.purify(net, pair(), session=quiet())
    assert torch.equal(fixed[1].weight, net[1].weight) and not same_weights(fixed, net)


@each_method
def test_a_network_without_batch_norm_is_refused(defense):
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    with pytest.raises(ConfigError, match=f"BatchNorm2d.*{defense.name}"):
        defense.purify(plain, pair(), session=quiet())


@pytest.mark.usefixtures("no_chance")
@each_method
def test_a_batch_norm_may_have_two_names(defense):
    net = tiny_net()
    net.alias = net.features[1]
    twice, once = (defense.purify(each, pair(), session=quiet()).features[1].weight for each in (net, tiny_net()))
    assert (once == 0).any() and torch.equal(once, twice)


RECOVERING: dict[str, Any] = {
    "batch_size": 8,
    "unlearning_epochs": 2,  # of which the threshold leaves one
    "clean_threshold": 1.0,
    "recovering_epochs": 2,
    "recovering_lr": 20.0,
    "acc_ratio": 0.99,
}


@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize(
    ("defense", "checkpoints"),
    [
        (ANP(nb_iter=6, batch_size=8, lr=0.5, pruning_by="number", pruning_number=4.0), 6),  # chunks of four and two
        (RNP(**RECOVERING, pruning_number=0.9), 4 + 8),
        (RNP(**RECOVERING, pruning_number=None), 3 + 6),  # a fifth of the images is held back
        (FP(epochs=2, batch_size=8, lr=0.05, acc_ratio=0.9), 8),
    ],
    ids=["anp", "rnp", "rnp-search", "fp"],
)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(monkeypatch, defense, checkpoints):
    monkeypatch.setattr(anp, "CHUNK", 4)
    net, data = tiny_net(), pair(32)
    whole = defense.purify(net, data, session=quiet())
    assert not same_weights(whole, net)
    assert [same_weights(fixed, whole) for fixed, _ in resumed(defense, net, data)] == [True] * checkpoints
