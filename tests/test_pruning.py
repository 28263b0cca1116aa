"""How much to prune: held-back pictures, levels, the defender's choice and the oracle's, by hand-made networks."""

from functools import partial

import pytest
import torch
from defense_rows import ROWS
from torch import Tensor, nn
from toys import pair, quiet, same_weights, tiny_net, toy_images

from sau.data.augment import Augment
from sau.defense import ANP, FP, RNP, pruning
from sau.defense.held import Held, hold_back
from sau.defense.inputs import gather, unaugmented
from sau.errors import ConfigError, TrainingError
from sau.evaluate import Score, Share
from sau.loop import Limit, Session


def test_held_back_pictures_are_the_last_of_each_class():
    """Of 10, 4 and 1 pictures a fifth is 2, 1 (at least) and none (a class keeps one to work with)."""
    y = torch.tensor([0] * 10 + [1] * 4 + [2])
    x = torch.arange(15.0)
    (kept, kept_y), (held, held_y, apart) = hold_back(x, y, 0.2, quiet())
    assert apart
    assert held.tolist() == [8, 9, 13] and held_y.tolist() == [0, 0, 1]
    assert sorted(kept.tolist() + held.tolist()) == list(range(15)) and len(kept_y) == 12
    assert hold_back(x, y, 0.1, quiet())[1].x.tolist() == [9, 13]  # a tenth of four is none, but for that


def test_where_nothing_can_be_held_back_all_pictures_choose():
    x, y, said = torch.arange(3.0), torch.tensor([0, 1, 2]), []
    (kept, _), (held, _, apart) = hold_back(x, y, 0.2, Session(say=said.append))
    assert kept.tolist() == held.tolist() == [0, 1, 2] and not apart
    assert len(said) == 1 and said[0].startswith("warning: no class has a second picture to hold back")


@pytest.mark.parametrize(("apart", "words"), [(True, "held-back ACC"), (False, "ACC on the pictures it learns from")])
def test_the_accuracy_that_chooses_has_its_name(apart, words):
    scores = {0: (80, 90), 1: (80, 90), 3: (72, 90), 5: (60, 0)}
    assert f"{words} 80.0 -> 72.0 %" in outcome(scores, oracle=False, apart=apart)[1]
    assert f"{words} 25.0 % is no more than chance" in outcome({0: (25, 90)}, oracle=False, apart=apart)[1]


@pytest.mark.parametrize(("acc", "expected"), [(24, 0), (25, 0), (26, 5)])
def test_an_accuracy_no_better_than_chance_prunes_nothing(acc, expected):
    """It would not fall whatever went, so that all would; of four classes chance is 25 %. The oracle has its ASR."""
    scores = {0: (acc, 90), 1: (acc, 80), 3: (acc, 70), 5: (acc, 60)}
    count, said = outcome(scores, oracle=False)
    assert count == expected and ("no more than chance (25 %)" in said) == (expected == 0)
    assert outcome(scores, oracle=True)[0] == 5


def test_a_level_that_leaves_a_guess_is_not_allowed():
    """Of four classes 25 %, and where one has most of the pictures, as many as that one has."""
    scores = {0: (60, 90), 1: (55, 90), 3: (30, 90), 5: (25, 0)}
    assert outcome(scores, oracle=False, tolerance=0.9)[0] == 3
    assert outcome(scores, oracle=False, tolerance=0.9, y=(0, 0, 1, 2))[0] == 1
    assert "no more than chance (75 %)" in outcome(scores, oracle=False, y=(0, 0, 0, 2))[1]


def test_gathering_walks_once_and_keeps_the_order():
    batches = [(torch.full((2, 1, 1, 1), float(i)), torch.tensor([i, i]), "more") for i in range(3)]
    x, y = gather(batches)
    assert x.flatten().tolist() == y.tolist() == [0, 0, 1, 1, 2, 2]


def test_pictures_can_be_had_without_the_augmentation_of_their_batches():
    batches = toy_images(8).batches(4, seed=1, augment=Augment())
    plain, augment = unaugmented(batches)
    assert augment is batches.augment is not None
    pixels, labels = gather(plain)
    assert torch.equal(pixels, gather(toy_images(8).batches(4, seed=1))[0])
    assert torch.equal(labels, gather(batches)[1]) and not torch.equal(pixels, gather(batches)[0])


def test_silencing_leaves_the_shift_unless_asked():
    norm = nn.BatchNorm2d(3)
    nn.init.ones_(norm.bias)
    pruning.silence(norm, torch.tensor([True, False, False]), shift=False)
    assert norm.weight.tolist() == [0, 1, 1] and norm.bias.tolist() == [1, 1, 1]
    pruning.silence(norm, torch.tensor([False, False, True]), shift=True)
    assert norm.weight.tolist() == [0, 1, 0] and norm.bias.tolist() == [1, 1, 0]


def test_a_network_without_batch_norm_is_refused(one_line):
    with pytest.raises(ConfigError) as refusal:
        pruning.batch_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), "anp")
    assert "BatchNorm2d" in one_line(refusal.value) and "anp" in str(refusal.value)
    assert list(pruning.batch_norms(tiny_net(), "anp")) == ["features.1"]
    assert list(pruning.batch_norms(tiny_net(), "clp", running=True)) == ["features.1"]
    batchwise = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    assert list(pruning.batch_norms(batchwise, "anp")) == ["0"]
    with pytest.raises(ConfigError) as refusal:
        pruning.batch_norms(batchwise, "clp", running=True)
    assert "running" in one_line(refusal.value)


PRUNING = {name: ROWS[name].defense for name in ("anp", "rnp", "clp", "bnp", "ep")}
LAST = FP(unit="last_conv", epochs=1, batch_size=8, acc_ratio=0.99)
each_pruning = pytest.mark.parametrize("defense", [*PRUNING.values(), LAST], ids=[*PRUNING, "fp"])


@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("training", [False, True])
@each_pruning
def test_batch_norms_of_several_devices_are_pruned_like_any(defense, training):
    given = [pruning_net(), nn.SyncBatchNorm.convert_sync_batchnorm(pruning_net())]
    fixed = [defense.purify(net.train(training), pair(), session=quiet()) for net in given]
    assert type(fixed[1].get_submodule("1")) is nn.SyncBatchNorm
    assert same_weights(*fixed) and not same_weights(fixed[0], given[0])


def pruning_net() -> nn.Sequential:
    """In eval mode; its last convolution has a batch norm behind it, whose shifts are not zero."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 10, 3, stride=2), nn.BatchNorm2d(10), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten())
    net = nn.Sequential(*layers, nn.Linear(10, 4))
    nn.init.normal_(net.get_parameter("1.bias"))
    return net.eval()


@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("defense", PRUNING.values(), ids=PRUNING)
def test_a_batch_norm_of_several_devices_may_come_after_a_linear_layer(defense):
    """convert_sync_batchnorm makes it of a BatchNorm1d, which is left out."""
    net = pruning_net().append(nn.BatchNorm1d(4))
    fixed = defense.purify(nn.SyncBatchNorm.convert_sync_batchnorm(net), pair(), session=quiet())
    assert fixed(pair()[0]).isfinite().all() and not same_weights(fixed, net)


@pytest.mark.usefixtures("no_chance")
@pytest.mark.parametrize("defense", PRUNING.values(), ids=PRUNING)
def test_a_batch_norm_without_shifts_is_left_out(defense, one_line):
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), *pruning_net()).eval()
    net[1].bias = None
    fixed = defense.purify(net, pair(), session=quiet())
    assert torch.equal(fixed[1].weight, net[1].weight) and not same_weights(fixed, net)
    with pytest.raises(ConfigError) as refusal:
        defense.purify(nn.Sequential(*net[:2], nn.AdaptiveMaxPool2d(1), nn.Flatten()), few(), session=quiet())
    assert "no batch norm" in one_line(refusal.value)


def few() -> tuple[Tensor, Tensor]:
    """Pictures of three classes."""
    return pair(classes=3)


LEVELS = [
    pruning.Level(f"{n} channels", {"features.1": torch.arange(10) < n, "other": torch.zeros(2, dtype=torch.bool)})
    for n in (1, 3, 5, 10)
]


def outcome(
    scores: dict[int, tuple[int, int]],
    *,
    oracle: bool,
    tolerance: float = 0.1,
    by_asr: bool = True,
    apart: bool = True,
    y: tuple[int, ...] = (0, 1, 2, 3),
) -> tuple[int, str]:
    """How many channels go when the network scores (ACC, ASR) in percent with so many pruned."""
    net, said = tiny_net(), []

    def judge(network: nn.Module) -> Score:
        acc, asr = scores[int((network.get_parameter("features.1.weight") == 0).sum())]
        return Score(Share(acc, 100), Share(asr, 100), Share(0, 100))

    def prune(level: pruning.Level) -> None:
        pruning.silence(net.get_submodule("features.1"), level.pruned["features.1"], shift=False)

    session = Session(say=said.append, judge=judge)
    with pytest.MonkeyPatch.context() as patch:
        if not oracle:  # the defender's scores, too, come from the table: held-back pictures have no ASR
            patch.setattr(pruning, "score", lambda model, clean, triggered: Score(judge(model).acc))
        held = Held(torch.zeros(len(y), 3, 16, 16), torch.tensor(y), apart)
        taken = pruning.choose(net, LEVELS, prune, held, tolerance, session, oracle=oracle, by_asr=by_asr)
    count = int((net.get_parameter("features.1.weight") == 0).sum())
    assert len(said) == 1 and (taken.count if taken else 0) == count
    return count, said[0]


def test_the_defender_takes_the_hardest_level_before_the_first_that_costs_too_much():
    """A tenth of 80 % are 8 points: 72 is allowed, 71 is not, and what comes after it does not count."""
    assert outcome({0: (80, 90), 1: (79, 90), 3: (72, 90), 5: (71, 0)}, oracle=False)[0] == 3
    assert outcome({0: (80, 90), 1: (71, 0), 3: (80, 0), 5: (80, 0)}, oracle=False)[0] == 0


def test_the_oracle_takes_the_lowest_asr_of_the_allowed_levels():
    assert outcome({0: (80, 90), 1: (79, 20), 3: (60, 0), 5: (75, 30)}, oracle=True)[0] == 1
    assert outcome({0: (80, 90), 1: (79, 90), 3: (79, 95), 5: (79, 90)}, oracle=True)[0] == 0


def test_an_oracle_without_asr_goes_by_the_test_accuracy_as_the_defender_does():
    scores = {0: (80, 90), 1: (79, 0), 3: (72, 90), 5: (71, 0), 10: (80, 0)}
    count, said = outcome(scores, oracle=True, by_asr=False)
    assert count == 3 and "test ACC 80.0 -> 72.0" in said
    assert outcome(scores, oracle=True)[0] == 1


def test_a_level_that_leaves_nothing_of_a_layer_is_never_taken():
    count, said = outcome({0: (80, 90), 1: (80, 90), 3: (80, 90), 5: (80, 90), 10: (80, 0)}, oracle=False)
    assert count == 5 and "5 channels" in said and "80.0" in said


def test_a_fixed_level_that_leaves_nothing_is_refused_before_it_is_applied(one_line):
    net = tiny_net()

    def prune(level: pruning.Level) -> None:
        pruning.silence(net.get_submodule("features.1"), level.pruned["features.1"], shift=True)

    with pytest.raises(TrainingError) as refusal:
        pruning.prune_and_say(LEVELS[-1], prune, quiet())
    assert "features.1" in one_line(refusal.value) and same_weights(net, tiny_net())
    pruning.prune_and_say(LEVELS[0], prune, quiet())
    assert not same_weights(net, tiny_net())


@pytest.mark.parametrize("shift", [-8.0, 1.0])
def test_a_fixed_level_that_leaves_a_network_that_guesses_is_refused_before_it_is_applied(shift, one_line):
    """It says one class for all pictures, or is never right. Where half stays right, where the network guessed before,
    and where nobody asks, it is pruned."""
    net, x, y = Answers(4), torch.arange(8.0).view(8, 1, 1, 1), torch.arange(8) % 4
    told: list[str] = []

    def prune(level: pruning.Level) -> None:
        with torch.no_grad():
            net.shift.fill_(shift)

    session = Session(say=told.append)
    with pytest.raises(TrainingError) as refusal:
        pruning.prune_checked(net, LEVELS[0], prune, (x, y), session)
    assert "8 -> " in one_line(refusal.value) and net.shift.item() == 0 and not told
    half = torch.where(torch.arange(8) < 4, y, Answers(4)(x + shift).argmax(1))
    for seen in ((x, half), (x, y + 1 - 4 * (y == 3)), None):
        pruning.prune_checked(net, LEVELS[0], prune, seen, session)
        assert net.shift.item() == shift
        with torch.no_grad():
            net.shift.zero_()
    assert len(told) == 3


class Answers(nn.Module):
    """Answers the class x + shift, cut to 0, counted round."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.shift = classes, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(
            (x.flatten() + self.shift).clamp_min(0).long() % self.classes, self.classes
        ).float()


@pytest.mark.parametrize("method", [ANP, RNP])
def test_a_search_of_more_levels_than_anyone_waits_for_is_refused(method, one_line):
    with pytest.raises(ConfigError) as refusal:
        method(pruning_number=None, pruning_step=1e-9)
    assert "pruning_step" in one_line(refusal.value)


def test_a_level_that_prunes_what_the_one_before_did_is_not_measured_again():
    measured = []

    def judge(network: nn.Module) -> Score:
        measured.append(int((network.get_parameter("features.1.weight") == 0).sum()))
        return Score(Share(90, 100), Share(90 - measured[-1], 100), Share(0, 100))

    levels = [pruning.Level(f"step {i}", {"features.1": torch.arange(10) < n}) for i, n in enumerate((0, 2, 2, 3, 3))]
    net, said = tiny_net(), []
    prune = partial(pruning.apply, net, shift=False)
    pruning.choose(net, levels, prune, None, 0.1, Session(judge=judge, say=said.append), oracle=True)
    assert measured == [0, 2, 3] and "step 3" in said[0]


@pytest.mark.parametrize(("time_for", "taken"), [(2, 2), (0, 0)])
def test_an_oracles_search_ends_with_the_time_of_the_run(monkeypatch, time_for, taken):
    """With time for two of five levels, the better of these two is taken, and the limit knows where it ended."""
    calls = iter(range(9))
    monkeypatch.setattr(Limit, "reached", lambda self: next(calls) == time_for)
    levels = [pruning.Level(f"step {n}", {"features.1": torch.arange(10) < n}) for n in range(1, 6)]
    net, said = tiny_net(), []

    def judge(network: nn.Module) -> Score:
        gone = int((network.get_parameter("features.1.weight") == 0).sum())
        return Score(Share(90, 100), Share(90 - gone, 100), Share(0, 100))

    session = Session(judge=judge, say=said.append, limit=Limit(0.0))
    level = pruning.choose(net, levels, partial(pruning.apply, net, shift=False), None, 0.1, session, oracle=True)
    assert (level.count if level else 0) == taken == int((net.get_parameter("features.1.weight") == 0).sum())
    assert session.limit.ended == f"the search, before level {time_for + 1} of 5"
    assert said[0] == f"the time is over: ended in {session.limit.ended}"


def test_a_defender_without_pictures_is_a_mistake_of_the_program():
    with pytest.raises(TypeError):
        pruning.choose(tiny_net(), [], lambda level: None, None, 0.1, quiet(), oracle=False)


def test_whatever_is_tried_is_undone():
    net = tiny_net()
    with pytest.raises(KeyError), pruning.undone(net):
        nn.init.zeros_(net.linear.weight)
        raise KeyError
    assert same_weights(net, tiny_net())


def test_a_sweep_reaches_its_end():
    """0.3 / 0.05 is a little less than six."""
    assert pruning.sweep(0.3, 0.05) == [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
