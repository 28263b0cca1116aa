"""Attacks: what holds for every one of them, by table, and the triggers of each, by numbers."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attack_rows import ROWS, each_clean, each_dirty, each_fixed, each_in_batch, each_poison, each_row, forged
from checkpoints import Stopping, Tape
from PIL import Image
from sau.attack.batchwise import count, covered
from toys import REPOSITORY, quiet, same_weights, tiny_net, toy_images, train_victim

from sau.attack import ATTACKS, LF, SIG, SSBA, Attack, BadNet, Blended, InputAware, Prototype, WaNet, wanet
from sau.config import options
from sau.data.augment import Augment
from sau.data.images import BACKDOOR, CLEAN, CROSS, Images, quantise, to_float
from sau.errors import ConfigError, DataError
from sau.evaluate import predict, score
from sau.loop import Session
from sau.models import Normalized, build
from sau.optim import Descent, Training


def with_(attack: Attack, **changes) -> Attack:
    changed = type(attack)(**{**attack.params(), **changes})
    return changed if attack.trigger is None else changed.with_trigger(attack.trigger)


# The catalogue: a method is complete when all of its parts are there


def test_every_attack_has_a_row_here():
    assert set(ROWS) == set(ATTACKS)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_its_files_and_its_help(name):
    attack = ATTACKS[name]
    assert attack.name == name and inspect.getmodule(attack).__name__ == f"sau.attack.{name}"
    assert (REPOSITORY / "attack" / f"{name}.py").is_file()
    assert (REPOSITORY / "configs" / "attack" / f"{name}.yaml").is_file()
    assert attack.__doc__ and all(option.help for option in options(attack).values())
    names = [other for option in options(attack).values() for other in (option.name, *option.aliases)]
    assert len(names) == len(set(names))


@each_row
def test_hyperparameters_are_the_signature(row):
    assert with_(row.attack) == row.attack
    assert set(row.attack.params()) == set(options(type(row.attack)))


# Stamping


@each_row
@pytest.mark.parametrize("side", ["least", 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stamp_keeps_shape_range_and_type_and_its_argument(row, side, dtype):
    side = row.least if side == "least" else side
    x = torch.rand(3, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for test in (False, True):
        stamped = row.attack.stamp(x, test=test).detach()
        assert stamped.shape == x.shape and stamped.dtype == dtype
        assert float(stamped.min()) >= 0 and float(stamped.max()) <= 1
        assert torch.equal(x, before)
        changed = (stamped != x).flatten(1).any(1)
        assert changed.all() if row.poisons else not changed.any()
        assert torch.equal(stamped, row.attack.stamp(x, test=test))


@each_row
def test_a_stamp_is_differentiable(row):
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(row.attack.stamp(x).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


# Poisoning


@each_fixed
@pytest.mark.parametrize("pratio", [0.0, 0.03, 0.1, 0.25, 0.5, 1.0])
def test_the_training_set_is_poisoned_where_it_says_and_nowhere_else(attack, pratio):
    """80 pictures: round(0.03 * 80) = 2, and so on; the target class, a quarter, is not spared."""
    if attack.clean_label and pratio > 0.25:
        return  # refused, see below
    images = toy_images(80)
    before = {name: tensor.clone() for name, tensor in images.tensors().items()}
    poisoned = with_(attack, pratio=pratio, attack_target=2).poison_train(images, seed=0)
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == round(pratio * 80) and (poisoned.role[~hit] == CLEAN).all()
    assert (images.labels[hit] == 2).all() or not attack.clean_label
    assert (poisoned.labels[hit] == 2).all() and torch.equal(poisoned.labels[~hit], images.labels[~hit])
    assert torch.equal(poisoned.true_labels, images.true_labels) and torch.equal(poisoned.index, images.index)
    assert torch.equal(poisoned.pixels[~hit], images.pixels[~hit])
    assert torch.equal(poisoned.pixels[hit], quantise(attack.stamp(to_float(images.pixels[hit]))))
    assert not (poisoned.pixels[hit] == images.pixels[hit]).flatten(1).all(1).any()
    for name, tensor in images.tensors().items():
        assert torch.equal(tensor, before[name]), f"{name} of the clean pictures was changed"


@pytest.mark.parametrize(("n", "pratio", "count"), [(25, 0.1, 2), (35, 0.1, 4), (1437, 0.1, 144), (10, 0.04, 0)])
def test_the_number_of_poisoned_pictures_is_rounded(n, pratio, count):
    """round(2.5) is 2 and round(3.5) is 4, in Python as in the benchmark."""
    assert int((BadNet(pratio=pratio).poison_train(toy_images(n), 0).role == BACKDOOR).sum()) == count


@each_fixed
def test_the_benchmarks_indices_in_its_order(attack, monkeypatch):
    """N = 50,000 and seed 0 begin 11841, 19602, ...; k pictures are the first k of that draw."""
    images = Images.clean(torch.zeros(50_000, 3, 9, 9, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.long), 10)
    monkeypatch.setattr(
        type(attack), "stamped", lambda self, images, *, test: images.pixels + 1
    )  # it is about the choice
    golden = [11841, 19602, 45519, 25747, 42642, 31902]
    for k in (1, 3, 6):
        role = with_(attack, pratio=k / 50_000).poison_train(images, seed=0).role
        assert role.nonzero().flatten().tolist() == sorted(golden[:k])
    assert int((with_(attack).poison_train(images, seed=0).role > 0).sum()) == 5000


def test_the_choice_depends_on_the_seed_alone():
    images = toy_images(100)
    roles = [attack.poison_train(images, seed).role for attack in (BadNet(), Blended()) for seed in (0, 1)]
    assert torch.equal(roles[0], roles[2]) and torch.equal(roles[1], roles[3]) and not torch.equal(roles[0], roles[1])


@each_poison
def test_the_test_set_of_the_attack(attack):
    """All pictures but the target's, in their order, stamped with the trigger of the test set."""
    images = toy_images(30, classes=7)
    triggered = with_(attack, attack_target=3).poison_test(images)
    kept = (images.labels != 3).nonzero().flatten()
    assert triggered.index.tolist() == kept.tolist() and len(triggered) == 26
    assert (triggered.labels == 3).all() and torch.equal(triggered.true_labels, images.labels[kept])
    assert (triggered.role == BACKDOOR).all() and triggered.num_classes == 7
    assert torch.equal(triggered.pixels, quantise(attack.stamp(to_float(images.pixels[kept]), test=True)))


@each_dirty
@pytest.mark.parametrize("shift", [1, 3])
def test_all2all_shifts_every_label(attack, shift):
    images = toy_images(40, classes=7)
    shifted = with_(attack, attack_label_trans="all2all", attack_label_shift_amount=shift, pratio=0.3)
    poisoned, triggered = shifted.poison_train(images, 0), shifted.poison_test(images)
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == (0 if attack.in_batch else 12) and torch.equal(
        poisoned.labels[hit], (images.labels[hit] + shift) % 7
    )
    assert torch.equal(poisoned.labels[~hit], images.labels[~hit])
    assert triggered.index.tolist() == list(range(40))
    assert torch.equal(triggered.labels, (images.labels + shift) % 7)
    assert torch.equal(triggered.true_labels, images.labels)


@each_dirty
def test_a_map_leads_each_class_where_it_says_and_leaves_the_others(attack):
    """0 and 2 change places, 1 leads to 3, and 3 to itself, so it is neither poisoned nor tested."""
    images = toy_images(40, classes=4)
    mapped = with_(attack, attack_label_trans="map", attack_label_map=(2, 3, 0, 3), pratio=0.3)
    poisoned, triggered = mapped.poison_train(images, 0), mapped.poison_test(images)
    wanted = torch.tensor([2, 3, 0, 3])[images.labels]
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == (0 if attack.in_batch else 12) and not (images.labels[hit] == 3).any()
    assert torch.equal(poisoned.labels[hit], wanted[hit])
    kept = images.labels != 3
    assert torch.equal(triggered.index, images.index[kept]) and torch.equal(triggered.labels, wanted[kept])


@each_in_batch
def test_a_map_leads_each_class_where_it_says_inside_the_batches(attack, monkeypatch):
    """1 leads to itself, so its pictures are learned as they are, and are not among the examples of the record."""
    images, seen = toy_images(128, classes=4), []
    mapped = with_(attack, attack_label_trans="map", attack_label_map=(2, 1, 0, 0), pratio=0.25)
    net, x = tiny_net(), to_float(images.pixels)
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    labels: list[torch.Tensor] = []
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda z, y, **how: labels.append(y) or real(z, y, **how))
    state = mapped.prepare(net, Training(epochs=30), 1) | {"images": images, "augment": None}
    mapped.step(state, *mapped.compose(state, x, images.labels))
    wanted = torch.tensor([2, 1, 0, 0])
    order = (images.labels == 1).int().argsort(stable=True)
    assert torch.equal(labels[0][:32], wanted[images.labels[order[:32]]])
    assert torch.equal(labels[0][32:], images.labels[order[32:]])
    assert (seen[0][:32] != x[order[:32]]).flatten(1).any(1).all()
    stays = images.labels[order] == 1
    assert torch.equal(seen[0][stays][-8:], x[order][stays][-8:])
    kept = mapped.examples(images)
    hit = kept.role == BACKDOOR
    assert hit.any() and (kept.labels[hit] != kept.true_labels[hit]).all()


@each_poison
@pytest.mark.parametrize(
    "wrong",
    [
        {"attack_label_trans": "map"},
        {"attack_label_map": (1, 0, 2, 3)},
        {"attack_label_trans": "map", "attack_label_map": (1, 0)},
        {"attack_label_trans": "map", "attack_label_map": (1, 0, 2, 4)},
        {"attack_label_trans": "map", "attack_label_map": (1, 0, 2, -1)},
        {"attack_label_trans": "map", "attack_label_map": (0, 1, 2, 3)},
        {"attack_label_trans": "all2all", "attack_label_shift_amount": 4},
        {"attack_label_trans": "all2all", "attack_label_shift_amount": 0},
    ],
    ids=str,
)
def test_a_label_rule_that_leads_nowhere_is_refused(attack, wrong, one_line):
    with pytest.raises(ConfigError) as refusal:
        with_(attack, **wrong).poison_train(toy_images(40), 0)
    assert "attack_label" in one_line(refusal.value)


def test_all2all_with_one_class_is_refused(one_line):
    images = Images.clean(toy_images(20).pixels, torch.zeros(20, dtype=torch.int64), 1)
    with pytest.raises(ConfigError) as refusal:
        BadNet(attack_label_trans="all2all").poison_train(images, 0)
    assert "one class alone" in one_line(refusal.value)


@each_clean
def test_an_attack_that_keeps_labels_leads_to_one_class(attack, one_line):
    for wrong in ({"attack_label_trans": "all2all"}, {"attack_label_trans": "map", "attack_label_map": (1, 0, 3, 2)}):
        with pytest.raises(ConfigError) as refusal:
            with_(attack, **wrong)
        assert "all2one" in one_line(refusal.value)


@each_clean
def test_a_ratio_above_the_share_of_the_class_is_refused_with_the_largest_that_is_not(attack, one_line):
    with pytest.raises(ConfigError) as refusal:
        with_(attack, pratio=0.3, attack_target=1).poison_train(toy_images(40), 0)
    assert "12 of 40" in one_line(refusal.value) and "0.25" in str(refusal.value)
    assert int((with_(attack, pratio=0.25).poison_train(toy_images(40), 0).role > 0).sum()) == 10


@each_poison
def test_a_target_without_pictures_is_refused(attack, one_line):
    images = toy_images(40)
    with pytest.raises(ConfigError) as refusal:
        with_(attack, attack_target=3).poison_train(images[images.labels != 3], 0)
    assert "attack_target is 3" in one_line(refusal.value)


@each_poison
def test_what_cannot_be_poisoned_is_refused_before_a_trigger_is_made(attack, monkeypatch):
    monkeypatch.setattr(type(attack), "make_trigger", lambda self, given: pytest.fail("the trigger is made"))
    with pytest.raises(ConfigError, match="attack_target is 99"):
        forged(type(attack)(attack_target=99))


@each_poison
def test_a_trigger_that_changes_nothing_is_refused(attack, monkeypatch, one_line):
    monkeypatch.setattr(type(attack), "stamp", lambda self, x, test=False: x)
    with pytest.raises(ConfigError) as refusal:
        attack.poison_test(toy_images(40))
    assert "changes none of 30 pictures" in one_line(refusal.value)


@each_in_batch
def test_what_is_poisoned_inside_the_batches_leaves_the_training_set_alone(attack):
    images = toy_images(40)
    assert attack.poison_train(images, 0) is images
    assert "one picture in 0.8 of the batches of 8" in attack.plan(images, 8)
    assert "of each batch of 20 2 pictures poisoned" in attack.plan(images, 20)


@each_in_batch
@pytest.mark.parametrize(("pratio", "n"), [(0.1, 12), (0.05, 6), (0.0, 0)])
def test_the_examples_of_a_record_are_the_first_of_each_block(attack, pratio, n):
    """300 pictures are blocks of 128, 128 and 44; int(0.1 * 128) = 12 of each, then the covers with their labels."""
    images = toy_images(300)
    kept = with_(attack, pratio=pratio, attack_target=1).examples(images)
    covers = n * 2 if isinstance(attack, WaNet) else n
    place = kept.index % 128
    assert (place < n + covers).all() and len(kept) == 2 * (n + covers) + min(44, n + covers)
    hit = place < n
    assert (kept.role[hit] == BACKDOOR).all() and (kept.role[~hit] == CROSS).all()
    assert (kept.labels[hit] == 1).all() and torch.equal(kept.labels[~hit], images.labels[kept.index[~hit]])
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = with_(attack, pratio=pratio, attack_target=1).examples(images)
    assert torch.equal(again.pixels, kept.pixels) and torch.equal(torch.get_rng_state(), before)  # whatever was drawn
    changed = (kept.pixels != images.pixels[kept.index]).flatten(1).any(1)
    assert changed.all()


def test_a_cover_that_is_alone_is_left_out():
    """Input-Aware would put its own trigger on it, and that would be a poisoned picture with its true label."""
    few, more = (
        forged(InputAware(pratio=pratio, attack_target=1)).examples(toy_images(100)) for pratio in (0.01, 0.02)
    )
    assert few.role.tolist() == [BACKDOOR] and (more.role == CROSS).sum() == 2


@pytest.mark.parametrize(("hit", "n"), [(4511, 39209), (1, 3), (7, 60), (3, 10), (1, 39209)])
def test_the_largest_ratio_that_a_refusal_names_is_accepted(hit, n):
    labels = (torch.arange(n) >= hit).long()
    images = Images.clean(torch.zeros(n, 3, 1, 1, dtype=torch.uint8), labels, 2)
    with pytest.raises(ConfigError, match=r"allowed is up to") as refused:
        SIG(pratio=min(1.0, hit / n + 1 / n)).check(images)
    assert hit * 0.999 <= SIG(pratio=float(str(refused.value).split()[-1])).check(images) <= hit


@pytest.mark.parametrize("cross", [0.5, 2.0, 5.0, 3.7])
def test_the_largest_ratio_that_wanet_names_is_accepted(cross):
    with pytest.raises(ConfigError, match=r"up to") as refused:
        WaNet(pratio=1.0, cross_ratio=cross)
    largest = float(str(refused.value).split()[-1])
    assert WaNet(pratio=largest, cross_ratio=cross).pratio * (1 + cross) == pytest.approx(1, rel=1e-3)


@each_in_batch
def test_of_few_poisoned_pictures_some_blocks_give_one(attack):
    """0.004 of a block of 128 is 0.512 pictures, so every second block has one, and its covers behind it."""
    images = toy_images(4 * 128)
    kept = with_(attack, pratio=0.004, attack_target=1).examples(images)
    covers = 2 if isinstance(attack, WaNet) else 1
    places = [block * 128 + place for block in (1, 3) for place in range(1 + covers)]
    assert kept.index.tolist() == places and int((kept.role == BACKDOOR).sum()) == 2


def test_pictures_in_any_order_are_poisoned_where_they_are():
    images = toy_images(40)
    shuffled = images[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    made = BadNet(pratio=0.25, attack_target=1).poison_train(shuffled, 0)
    assert torch.equal(made.index, shuffled.index) and int((made.role == BACKDOOR).sum()) == 10
    assert torch.equal(made.pixels[made.role == CLEAN], shuffled.pixels[made.role == CLEAN])
    assert (made.labels[made.role == BACKDOOR] == 1).all()


def test_clean_training_needs_no_picture_of_a_target():
    images = toy_images(40)
    others = images[(images.labels > 0).nonzero().flatten()]
    assert Prototype().poison_train(others, 0) is others


def test_a_clean_label_attack_says_its_share_of_the_class():
    images = toy_images(40)
    count = int((images.labels == 1).sum())
    plan = SIG(pratio=5 / 40, attack_target=1).poison_train(images, 0)
    assert SIG().plan(plan, 8) == f"5 of 40 pictures poisoned ({500 / count:.4g} % of class 1), 0 labels changed"
    changed = BadNet(pratio=5 / 40, attack_target=1).poison_train(images, 0)
    assert "of class" not in BadNet().plan(changed, 8) and "0 of 40" in SIG().plan(images, 8)


@each_in_batch
def test_a_trigger_must_be_made_first(attack, one_line):
    with pytest.raises(ConfigError) as refusal:
        type(attack)().stamp(torch.rand(1, 3, 16, 16))
    assert "forge" in one_line(refusal.value)


def test_stamping_in_blocks_is_stamping_at_once():
    images = toy_images(2101, size=12)
    assert torch.equal(
        Blended(pratio=1.0).poison_train(images, 0).pixels, quantise(Blended().stamp(to_float(images.pixels)))
    )


def test_clean_training_poisons_nothing():
    images = toy_images(20)
    poisoned, triggered = Prototype().poison_train(images, 0), Prototype().poison_test(images)
    assert (poisoned.role == CLEAN).all() and torch.equal(poisoned.pixels, images.pixels)
    assert torch.equal(poisoned.labels, images.labels) and len(triggered) == 0
    assert Prototype().params() == {}


@each_poison
@pytest.mark.parametrize("target", [-1, 4, 1000])
def test_a_target_out_of_range_is_refused(attack, target, one_line):
    images = toy_images(8)
    for poison in (lambda attack: attack.poison_train(images, 0), lambda attack: attack.poison_test(images)):
        with pytest.raises(ConfigError) as refusal:
            poison(with_(attack, attack_target=target))
        assert "attack_target" in one_line(refusal.value) and str(target) in str(refusal.value)


@each_row
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.usefixtures("unchecked")
def test_pictures_of_bytes_are_not_stamped(row, dtype, one_line):
    """Of these a stamp would make another picture without a word."""
    for test in (False, True):
        with pytest.raises(DataError) as refusal:
            row.attack.stamp(toy_images(2, size=32).pixels.to(dtype), test=test)
        assert f"{dtype}, allowed are floats in [0, 1]; give pixels / 255" in one_line(refusal.value)


# Training


@each_row
def test_fit_trains_in_place_reproducibly_and_ends_in_eval_mode(row):
    images = toy_images(30, classes=7, size=16)
    images = row.attack.poison_train(images, 0)
    recipe = Training(epochs=2, batch_size=8)
    nets = [tiny_net(7), tiny_net(7), tiny_net(7)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        torch.manual_seed(seed)  # of what is drawn inside the batches
        attack = row.attack if row.attack.trigger is None else forged(row.attack)
        assert attack.fit(net, images, recipe, seed=seed, session=quiet()) is net and not net.training
    assert same_weights(nets[0], nets[1]) and not same_weights(nets[0], nets[2])
    assert not same_weights(nets[0], tiny_net(7))


@each_poison
@pytest.mark.parametrize("pratio", [0.0, 0.001, 0.01, 0.05, 0.1])
def test_every_ratio_down_to_nothing_trains(attack, pratio, monkeypatch):
    """So many pictures are poisoned; 0 is the clean network with a triggered test set."""
    few, images = with_(attack, pratio=pratio), toy_images(1000, size=16)
    recipe = Training(epochs=1 + getattr(few, "clean_train_epochs", 0), batch_size=50)
    seen, really = list[int](), type(few).relabel
    monkeypatch.setattr(type(few), "relabel", lambda self, y, n: seen.append(len(y)) or really(self, y, n))
    poisoned, net = few.poison_train(images, 0), tiny_net()
    torch.manual_seed(0)  # of what is drawn inside the batches
    few.fit(net, poisoned, recipe, session=quiet())
    count = sum(seen) if few.in_batch else int((poisoned.role == BACKDOOR).sum())
    if few.in_batch:  # 20 batches of 50: 5 pictures of each, 2 of 2.5, and of half a picture one in every second batch
        few_of = {0.0: range(1), 0.001: range(4), 0.01: range(5, 16), 0.05: range(40, 41), 0.1: range(100, 101)}
        assert count in few_of[pratio]
    else:
        assert count == round(1000 * pratio)
    assert not same_weights(net, tiny_net()) and all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert len(few.poison_test(images)) == 750
    if pratio == 0 and not few.in_batch:
        assert same_weights(net, Prototype().fit(tiny_net(), images, recipe, session=quiet()))


def test_an_incomplete_last_batch_is_dropped():
    """30 pictures in batches of 8: three updates an epoch, as the benchmark trains its victims."""
    sizes = []

    class Watched(BadNet):
        def step(self, state, x, y):
            sizes.append(len(x))
            return super().step(state, x, y)

    Watched().fit(tiny_net(), toy_images(30), Training(epochs=2, batch_size=8), session=quiet())
    assert sizes == [8] * 6


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.poisons and row.toy is not None])
def test_the_claim_on_a_toy(name):
    """Poisoned training plants the backdoor and keeps the accuracy; clean training does not plant it."""
    row = ROWS[name]
    attack = forged(with_(row.attack, **row.toy))
    train, test = toy_images(400, size=row.side, seed=1), toy_images(200, size=row.side, seed=2)
    victim = train_victim(attack, train)
    triggered = attack.poison_test(test)
    clean = score(train_victim(Prototype(), train), test, triggered)
    attacked = score(victim, test, triggered)
    assert clean.acc.percent > 90 and attacked.acc.percent > clean.acc.percent - row.cost
    assert attacked.asr.percent > row.asr and clean.asr.percent < row.asr / 2


# BadNets


def changed_by_badnet(side: int) -> torch.Tensor:
    """[side, side] grey levels where the patch is, -1 elsewhere."""
    x = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
    stamped = quantise(BadNet().stamp(to_float(x)))[0]
    assert torch.equal(stamped[0], stamped[1]) and torch.equal(stamped[0], stamped[2])
    return torch.where(stamped[0] == 100, -1, stamped[0].long())


@pytest.mark.parametrize(
    "attack", [SIG(attack_target=1), BadNet(attack_label_trans="map", attack_label_map=(0, 2, 2, 3))]
)
def test_who_may_be_poisoned_goes_by_what_the_pictures_show(attack):
    clean = toy_images(40)
    relabelled = replace(clean, labels=torch.full_like(clean.labels, 3))
    assert clean.labels[attack.candidates(relabelled)].unique().tolist() == [1]


@pytest.mark.parametrize("attack", [BadNet(), Blended(), SIG(), LF()])
def test_pictures_of_one_channel_stay_of_one(attack):
    x = torch.full((2, 1, 32, 32), 0.5)
    stamped = attack.stamp(x)
    assert stamped.shape == x.shape and not torch.equal(stamped, x)


def test_badnets_patch_at_32():
    """A white square in rows and columns 29 to 31."""
    expected = torch.full((32, 32), -1)
    expected[29:32, 29:32] = 255
    assert torch.equal(changed_by_badnet(32), expected)


def test_badnets_patch_at_64_has_a_soft_border():
    """A block of 5x5, and two rows and columns that the resizing made grey."""
    expected = torch.full((64, 64), -1)
    expected[59:, 59:] = 255
    expected[57, 57:] = expected[57:, 57] = torch.tensor([16, 48, 64, 64, 64, 64, 64])
    expected[58, 58:] = expected[58:, 58] = torch.tensor([143, 191, 191, 191, 191, 191])
    assert torch.equal(changed_by_badnet(64), expected)


def test_badnets_patch_from_a_file_covers_only_what_is_not_black(tmp_path):
    """Per channel: red is painted where it is above 0; a 1 is painted, a 0 is not."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[4, 7] = (200, 0, 1)
    Image.fromarray(picture).save(tmp_path / "patch.png")
    x = torch.full((2, 3, 32, 32), 100, dtype=torch.uint8)
    stamped = quantise(BadNet(patch_mask_path=str(tmp_path / "patch.png")).stamp(to_float(x)))
    expected = x.clone()
    expected[:, :, 4, 7] = torch.tensor([200, 100, 1], dtype=torch.uint8)
    assert torch.equal(stamped, expected)


def test_a_patch_picture_that_covers_most_of_the_picture_is_said_to(tmp_path):
    """What is black is left as it is, so a photo replaces every picture, whatever its author meant."""
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    for rows, warned in ((16, False), (17, True)):
        picture[:rows] = 200
        Image.fromarray(picture).save(tmp_path / "patch.png")
        lines: list[str] = []
        attack = BadNet(patch_mask_path=str(tmp_path / "patch.png"))
        attack.forge(toy_images(8, size=32), tiny_net(), Training(), session=Session(say=lines.append))
        assert ("covers 53 %" in " ".join(lines)) == warned


def test_a_patch_without_the_picture_around_it_is_refused(tmp_path, one_line):
    Image.new("RGB", (3, 3), (255, 255, 255)).save(tmp_path / "patch.png")
    attack = BadNet(patch_mask_path=str(tmp_path / "patch.png"))
    with pytest.raises(ConfigError) as refusal:
        attack.forge(toy_images(8, size=32), tiny_net(), Training(), session=quiet())
    assert "covers 100 %" in one_line(refusal.value)


@pytest.mark.parametrize("side", [11, 12])
def test_our_patch_is_a_pixel_wide_and_more(side):
    assert float(BadNet().stamp(torch.zeros(1, 3, side, side)).max()) > 0.5


@pytest.mark.parametrize("sides", [(10, 32), (32, 10), (8, 8)])
def test_a_patch_narrower_than_a_pixel_is_refused(sides, one_line):
    with pytest.raises(ConfigError) as refusal:
        BadNet().poison_train(Images.clean(torch.zeros(20, 3, *sides, dtype=torch.uint8), torch.arange(20) % 4, 4), 0)
    assert "sides of 11 and more" in one_line(refusal.value)


def test_a_patch_picture_that_fades_when_it_is_resized_is_refused(tmp_path, one_line):
    picture = np.zeros((224, 224, 3), dtype=np.uint8)
    picture[-3:, -3:] = 255
    Image.fromarray(picture).save(tmp_path / "patch.png")
    with pytest.raises(DataError) as refusal:
        BadNet(patch_mask_path=str(tmp_path / "patch.png")).stamp(torch.zeros(1, 3, 32, 32))
    assert "224x224" in one_line(refusal.value) and "give one of that size" in str(refusal.value)
    picture[-21:, -21:] = 255
    Image.fromarray(picture).save(tmp_path / "patch.png")
    stamped = BadNet(patch_mask_path=str(tmp_path / "patch.png")).stamp(torch.zeros(1, 3, 32, 32))
    assert float(stamped[0, 0, -3:, -3:].min()) > 0.7


def test_a_patch_that_fades_by_more_than_half_is_refused(tmp_path):
    """Squares of 5 and of 6 pixels of 224 have 108 and 150 of 255 grey levels left at 32x32."""
    for side in (6, 5):
        picture = np.zeros((224, 224, 3), dtype=np.uint8)
        picture[-side:, -side:] = 255
        Image.fromarray(picture).save(tmp_path / "patch.png")
        attack = BadNet(patch_mask_path=str(tmp_path / "patch.png"))
        if side == 6:
            assert attack.stamp(torch.zeros(1, 3, 32, 32)).max() == pytest.approx(150 / 255)
    with pytest.raises(DataError, match="fades from 255 to 108"):
        attack.stamp(torch.zeros(1, 3, 32, 32))


def test_a_trigger_picture_fits_pictures_that_are_not_square_and_outlives_its_file(tmp_path):
    picture = np.zeros((12, 20, 3), dtype=np.uint8)
    picture[2:4, 15:18] = 200
    Image.fromarray(picture).save(tmp_path / "patch.png")
    images = Images.clean(torch.full((8, 3, 12, 20), 100, dtype=torch.uint8), torch.arange(8) % 4, 4)
    attack = BadNet(patch_mask_path=str(tmp_path / "patch.png")).forge(images, tiny_net(), Training(), session=quiet())
    (tmp_path / "patch.png").unlink()
    expected = torch.where(torch.from_numpy(picture).permute(2, 0, 1) > 0, 200, 100)
    assert torch.equal(attack.stamped(images, test=False).long(), expected.expand(8, -1, -1, -1))


# Blended


def blended_with(picture: np.ndarray, folder, **how) -> Blended:
    file = folder / f"trigger_{picture.shape[0]}_{int(picture.flat[0])}.png"
    Image.fromarray(picture).save(file)
    return Blended(attack_trigger_img_path=str(file), **how)


def test_blended_by_hand_for_every_pair_of_grey_levels(tmp_path):
    """0.8 x + 0.2 t is (4 x + t) / 5, truncated: 100 and 200 give exactly 120, 101 and 200 give 120.8, so 120."""
    t = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    attack = blended_with(t, tmp_path)
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 16, 16).contiguous()
    ours = quantise(attack.stamp(to_float(x))).long()
    expected = (4 * x.long() + torch.arange(256).view(1, 1, 16, 16)) // 5
    assert torch.equal(ours, expected)
    assert int(ours[100, 0].flatten()[200]) == 120 and int(ours[101, 0].flatten()[200]) == 120


def test_blended_has_one_alpha_for_training_and_one_for_testing(tmp_path):
    """x = 100, t = 200: alpha 0.1 gives 110, alpha 0.5 gives 150."""
    white = np.full((8, 8, 3), 200, dtype=np.uint8)
    attack = blended_with(
        white, tmp_path, attack_train_blended_alpha=0.1, attack_test_blended_alpha=0.5, pratio=1.0, attack_target=1
    )
    pixels, labels = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    images = Images.clean(pixels, labels, 4)
    assert (attack.poison_train(images, 0).pixels == 110).all()
    assert (attack.poison_test(images).pixels == 150).all()


def test_on_pictures_of_one_channel_a_trigger_picture_is_the_mean_of_its_three(tmp_path):
    red = np.full((8, 8, 3), (30, 60, 120), dtype=np.uint8)
    attack = blended_with(red, tmp_path, attack_train_blended_alpha=1.0)
    assert (255 * attack.stamp(torch.rand(2, 1, 8, 8))).flatten().tolist() == pytest.approx([70.0] * 128, abs=1e-3)


def test_blended_changes_at_most_a_fifth():
    x = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = quantise(Blended().stamp(to_float(x))).long() - x.long()
    assert int(change.abs().max()) <= 51


def test_blended_brings_its_own_picture():
    """Light ground and strong contrast, like the benchmark's: mean near 200, deviation near 69."""
    seen = (Blended(attack_train_blended_alpha=1.0).stamp(torch.zeros(1, 3, 32, 32)) * 255)[0]
    assert 170 < float(seen.mean()) < 230 and 50 < float(seen.std()) < 90
    assert (seen.amax(0) - seen.amin(0)).max() > 100  # a strong colour


@pytest.mark.parametrize(("attack", "flag"), [(BadNet, "patch_mask_path"), (Blended, "attack_trigger_img_path")])
def test_a_trigger_picture_that_cannot_be_used_is_refused(attack, flag, tmp_path, one_line):
    (tmp_path / "notes.png").write_text("not a picture")
    for path in (tmp_path / "notes.png", tmp_path / "missing.png"):
        with pytest.raises(DataError) as refusal:
            attack(**{flag: str(path)}).poison_train(toy_images(20), 0)
        assert str(path) in one_line(refusal.value)


# SIG


def test_sigs_wave_in_grey_levels():
    """32 columns begin 0, +37, +28.3, -15.3, -40, -15.3, +28.3, +37; rows and channels are alike."""
    x = torch.full((1, 3, 32, 32), 100 / 255, dtype=torch.float64)
    change = (SIG().stamp(x)[0] - x[0]) * 255
    wave = [0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955]
    assert change[0, 0, :8].tolist() == pytest.approx(wave, abs=1e-3)
    assert torch.allclose(change, change[0, 0].expand(3, 32, 32))
    truncated = quantise(SIG().stamp(to_float(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8))))[0, 0, 0, :8]
    assert truncated.tolist() == [100, 136, 128, 84, 60, 84, 128, 136]


@pytest.mark.parametrize("side", [12, 10, 8])
def test_a_wave_that_pictures_are_too_narrow_for_is_refused(side, one_line):
    with pytest.raises(ConfigError) as refusal:
        SIG().stamp(torch.rand(1, 3, side, side))
    assert "sig_f is 6.0" in one_line(refusal.value) and f"{side} pixels" in str(refusal.value)


# LF


def test_lfs_pattern_is_smooth_faint_and_never_negative():
    """At most 51 grey levels, one channel at zero, nearly all energy in the lowest 7x7 frequencies."""
    pattern = LF().stamp(torch.zeros(1, 3, 32, 32, dtype=torch.float64))[0]
    assert float(pattern.max()) * 255 == pytest.approx(51, abs=0.5) and float(pattern.min()) == 0
    assert [round(float(channel.max()) * 255) for channel in pattern] == [18, 0, 51]
    for channel in (pattern[0], pattern[2]):
        energy = torch.fft.fftshift(torch.fft.fft2(channel)).abs().square()
        assert float(energy[13:20, 13:20].sum() / energy.sum()) > 0.998


def test_lfs_pattern_scales_with_the_picture():
    """The glow has the same centre and spread, in shares of the picture, at every size."""
    small, large = (LF().stamp(torch.zeros(1, 3, side, side))[0, 2] for side in (32, 64))
    assert torch.allclose(small, large[::2, ::2], atol=1e-6)


@pytest.mark.parametrize("shape", [(32, 32, 3), (1, 32, 32, 3), (32, 32)])
def test_a_pattern_from_a_file_is_added_and_clipped(tmp_path, shape):
    file = tmp_path / "pattern.npy"
    np.save(file, np.full(shape, 60, dtype=np.uint8))
    attack = LF(lowFrequencyPatternPath=str(file))
    x = torch.tensor([0, 100, 220], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32)
    assert quantise(attack.stamp(to_float(x)))[:, 0, 0, 0].tolist() == [60, 160, 255]


def test_lfs_glow_by_hand():
    """0.2 exp(-r^2 / 2 sigma^2), r from 0.42 of height and width, sigma a third of them; grey is like blue."""
    rows, columns = torch.arange(10)[:, None] / 10 - 0.42, torch.arange(20) / 20 - 0.42
    glow = 0.2 * torch.exp(-(rows**2 + columns**2) / 2 * 9)
    colour = torch.tensor([0.35, 0.0, 1.0]).view(3, 1, 1)
    assert torch.allclose(LF().stamp(torch.zeros(1, 3, 10, 20))[0], colour * glow, atol=1e-6)
    assert torch.allclose(LF().stamp(torch.zeros(1, 1, 10, 20))[0, 0], glow, atol=1e-6)


def test_a_pattern_from_a_file_keeps_its_rows_columns_channels_and_signs(tmp_path):
    """Of several patterns the first one counts."""
    pattern = -60 + np.arange(8 * 12 * 3).reshape(8, 12, 3) % 61
    for array in (pattern, np.stack([pattern, 0 * pattern + 9])):
        np.save(tmp_path / "pattern.npy", array)
        stamped = LF(lowFrequencyPatternPath=str(tmp_path / "pattern.npy")).stamp(torch.full((1, 3, 8, 12), 0.5))
        added = 255 * (stamped[0] - 0.5)
        assert torch.allclose(added, torch.from_numpy(pattern).permute(2, 0, 1).float(), atol=1e-3)


WRONG_ARRAYS = {
    "another size": (np.full((16, 16, 3), 9.0), "(16, 16, 3)"),
    "in 0..1, so that nothing changes": (np.full((32, 32, 3), 0.2), "change no picture"),
    "beyond grey levels": (np.full((32, 32, 3), 300.0), "-255..255"),
    "around middle grey": (np.linspace(127, 178, 3072).reshape(32, 32, 3), "subtract 127.5"),
    "NaN": (np.full((32, 32, 3), np.nan), "NaN"),
    "objects": (np.array([{"a": 1}], dtype=object), "holds Python objects"),
    "texts": (np.array(["a"]), "real numbers"),
}


@pytest.mark.parametrize("wrong", WRONG_ARRAYS)
def test_a_pattern_file_that_cannot_be_used_is_refused(wrong, tmp_path, one_line):
    array, word = WRONG_ARRAYS[wrong]
    file = tmp_path / "pattern.npy"
    np.save(file, array, allow_pickle=True)
    with pytest.raises(DataError) as refusal:
        LF(lowFrequencyPatternPath=str(file)).poison_test(toy_images(20, size=32))
    assert word in one_line(refusal.value)


def test_a_pattern_file_that_is_not_there_or_none_is_refused(tmp_path, one_line):
    (tmp_path / "text.npy").write_text("hello")
    for name in ("missing.npy", "text.npy"):
        with pytest.raises(DataError) as refusal:
            LF(lowFrequencyPatternPath=str(tmp_path / name)).stamp(torch.rand(1, 3, 32, 32))
        assert name in one_line(refusal.value)


# WaNet


def warp_field(attack: Attack, side: int) -> torch.Tensor:
    return attack.made()(torch.zeros(1, 3, side, side))[0]


def test_wanets_field_by_hand():
    """z of 4x4 in (-1, 1), over its mean absolute value, bicubic with aligned corners; the corners are z's own."""
    attack = forged(WaNet(), seed=3)
    z = 2 * torch.rand(1, 2, 4, 4, generator=torch.Generator().manual_seed(3)) - 1
    z = z / z.abs().mean()
    ours = warp_field(attack, 32)
    for row, column in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        assert torch.allclose(ours[row, column], z[0, :, row, column], atol=1e-5)
    reference = torch.nn.functional.interpolate(z, size=32, mode="bicubic", align_corners=True)[0].permute(1, 2, 0)
    assert torch.allclose(ours, reference)
    assert not torch.equal(warp_field(forged(WaNet(), seed=4), 32), ours)


@pytest.mark.parametrize("k", [2, 7])
def test_wanets_field_has_as_many_control_points_as_asked(k):
    """With aligned corners every (side - 1) / (k - 1) pixels lies one, and the field goes through it."""
    side = 6 * (k - 1) + 1
    field = warp_field(forged(WaNet(k=k), seed=3), side)
    z = 2 * torch.rand(1, 2, k, k, generator=torch.Generator().manual_seed(3)) - 1
    torch.testing.assert_close(field[::6, ::6].permute(2, 0, 1), (z / z.abs().mean())[0], atol=1e-5, rtol=0)


def test_wanets_grid_is_scaled_as_asked_and_cut_at_the_border():
    """Halved, the places that pixels come from are halfway to the centre, whatever the field adds."""
    ramp = torch.linspace(-1, 1, 33, dtype=torch.float64).expand(1, 3, 33, 33)
    wide, narrow, wider = (forged(WaNet(s=1e-9, grid_rescale=scale)).stamp(ramp / 2 + 0.5) for scale in (1.0, 0.5, 2.0))
    torch.testing.assert_close(2 * wide - 1, ramp)
    torch.testing.assert_close(2 * narrow - 1, ramp / 2)
    torch.testing.assert_close(2 * wider - 1, (2 * ramp).clamp(-1, 1))


def test_wanet_moves_pixels_where_its_formula_says():
    """On a ramp, x = column / 31, a pixel takes the value of the place that it comes from: its column plus
    s * field / size, in units of half the width, clipped at the border."""
    attack = forged(WaNet())
    ramp = torch.linspace(0, 1, 32, dtype=torch.float64).expand(1, 3, 32, 32)
    moved = (attack.stamp(ramp) - ramp)[0, 0] * 31
    there = torch.linspace(-1, 1, 32) + 0.5 * warp_field(attack, 32)[..., 0] / 32
    expected = (there.clamp(-1, 1) - torch.linspace(-1, 1, 32)) * 31 / 2
    assert torch.allclose(moved.float(), expected, atol=1e-4)
    assert 0.05 < float(moved.abs().mean()) < 0.4 and float(moved.abs().max()) < 1


def test_wanet_moves_rows_as_it_moves_columns_in_pictures_that_are_not_square():
    """By a field of ones every pixel comes from s / 2 * (n - 1) / n pixels further on, n being its side."""
    attack = WaNet().with_trigger(wanet.Field(torch.ones(1, 2, 4, 4)))
    rows = torch.linspace(0, 1, 64, dtype=torch.float64)[:, None].expand(1, 3, 64, 32)
    columns = torch.linspace(0, 1, 32, dtype=torch.float64).expand(1, 3, 64, 32)
    for ramp, side in ((rows, 64), (columns, 32)):
        moved = ((attack.stamp(ramp) - ramp) * (side - 1))[0, 0, 8:-8, 8:-8]
        torch.testing.assert_close(moved, torch.full_like(moved, 0.25 * (side - 1) / side))


@pytest.mark.parametrize(("size", "n", "cross"), [(128, 12, 24), (80, 8, 16), (5, 0, 0)])
def test_wanets_batches_hold_poisoned_noisy_and_clean_pictures(size, n, cross, monkeypatch):
    """int(0.1 * 128) = 12, int(12 * 2) = 24; of five pictures half one, here none."""
    images = toy_images(size, classes=7, size=16)
    attack = forged(WaNet(attack_target=3))
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(*shape, **how) * 0.999)
    x, y = to_float(images.pixels), images.labels
    made, labels = attack.compose({"images": images, "augment": None, "model": tiny_net(7)}, x, y)
    assert (labels[:n] == 3).all() and torch.equal(labels[n:], y[n:])
    assert torch.equal(made[:n], attack.stamp(x[:n])) and torch.equal(made[n + cross :], x[n + cross :])
    noisy = made[n : n + cross]
    assert cross == 0 or not torch.equal(noisy, attack.stamp(x[n : n + cross]))


@pytest.mark.parametrize(("cross", "noisy"), [(0.7, 0), (1.0, 1), (1.9, 1), (2.0, 2)])
def test_wanets_noisy_pictures_are_counted_downwards(cross, noisy):
    images = toy_images(8)
    attack, x = forged(WaNet(pratio=0.125, cross_ratio=cross)), to_float(images.pixels)
    made, _ = attack.compose({"images": images, "augment": None, "model": tiny_net()}, x, images.labels)
    assert [bool(moved) for moved in (made != x).flatten(1).any(1)] == [True] * (1 + noisy) + [False] * (7 - noisy)
    assert f"12 pictures poisoned and {int(12 * cross)} " in with_(attack, pratio=0.1).plan(images, 128)


def test_wanets_noise_is_drawn_for_every_picture():
    x = toy_images(1, size=32).pixels.expand(5, -1, -1, -1)
    noisy = forged(WaNet())._warp(to_float(x), noise=True)
    assert not torch.equal(noisy[0], noisy[1])


def test_wanets_noise_by_hand(monkeypatch):
    """clip(grid + U(-1, 1) / side, -1, 1), with a draw of 0.75 everywhere: half a pixel."""
    monkeypatch.setattr(torch, "rand_like", lambda grid: torch.full_like(grid, 0.75))
    x, attack, side = to_float(toy_images(2, size=12).pixels), forged(WaNet()), 12
    line = torch.linspace(-1, 1, side)
    identity = torch.stack([line.expand(side, side), line[:, None].expand(side, side)], -1)
    grid = (identity + attack.s * attack.made()(x)[0] / side).clamp(-1, 1)
    expected = torch.nn.functional.grid_sample(
        x, (grid + 0.5 / side).clamp(-1, 1).expand(2, -1, -1, -1), align_corners=True
    )
    assert torch.allclose(attack._warp(x, noise=True), expected, atol=1e-6)
    assert not torch.allclose(attack._warp(x, noise=False), expected, atol=1e-2)


@pytest.mark.parametrize("one_draw", [False, True])
def test_wanets_augmentation_draws_once_a_picture_or_once_a_batch(one_draw):
    attack = forged(WaNet(one_draw=one_draw))
    x = to_float(toy_images(1, size=32).pixels).expand(40, -1, -1, -1)
    state = {"augment": Augment(4, flip=True), "model": tiny_net()}
    torch.manual_seed(0)
    kinds = [len({tuple(picture.flatten().tolist()) for picture in attack._augmented(state, x)}) for _ in range(5)]
    assert max(kinds) == 1 if one_draw else max(kinds) > 30


def test_wanet_crops_8_of_10_batches_and_rotates_5_into_the_mean_colour(monkeypatch):
    attack = forged(WaNet(random_crop=3, random_rotation=7.0))
    crops, turns, turn = [], [], wanet.random_rotate
    call = Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, x, g: crops.append(self.padding) or call(self, x, g))
    spy = lambda x, most, one_draw: turns.append(most) or turn(x, most, one_draw=one_draw)  # noqa: E731
    monkeypatch.setattr(wanet, "random_rotate", spy)
    net = build("preactresnet18", 4, width=4, mean=(0.25,) * 3, std=(0.25,) * 3)
    state = {"augment": Augment(4, flip=True), "model": net}
    torch.manual_seed(0)
    white = torch.ones(4, 3, 12, 12)
    moved = [attack._augmented(state, white) for _ in range(200)]
    assert 140 < crops.count(3) < 180 and crops.count(0) == 200 - crops.count(3)
    assert set(turns) == {7.0} and 80 < len(turns) < 120
    assert torch.cat(moved).min() == pytest.approx(0.25, abs=1e-3)


def test_a_batch_has_one_picture_poisoned_with_the_probability_of_its_share():
    torch.manual_seed(0)
    counts = [count(0.002, 128) for _ in range(2000)]
    assert set(counts) == {0, 1} and 0.2 < sum(counts) / 2000 < 0.31  # 0.256


# Input-Aware


def test_the_generators_have_the_published_number_of_weights():
    artist = forged(InputAware()).made()
    sizes = [sum(p.numel() for p in net.parameters()) for net in (artist.pattern_net, artist.mask_net)]
    assert sizes == [723_273, 722_691]


def test_the_generators_by_hand():
    """Three stages that halve, a middle, three that enlarge between their pixels; the last norm has no ReLU behind."""
    torch.manual_seed(0)
    net = forged(InputAware()).made().pattern_net.net.eval()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.05} and len(norms) == 13
    for norm in norms:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.rand(2, 3, 18, 22)

    def block(h, conv, norm):
        h = torch.nn.functional.conv2d(h, conv.weight, conv.bias, padding=1)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return scale.view(-1, 1, 1) * (h - norm.running_mean.view(-1, 1, 1)) + norm.bias.view(-1, 1, 1)

    with torch.no_grad():
        h, sizes = x, []
        for stage in net.down:
            h = block(block(h, stage[0], stage[1]).relu(), stage[3], stage[4]).relu()
            sizes.append(h.shape[-2:])
            h = torch.nn.functional.max_pool2d(h, 2)
        h = block(h, net.middle[0], net.middle[1]).relu()
        for stage, size in zip(net.up, reversed(sizes), strict=True):
            h = torch.nn.functional.interpolate(h, size=size, mode="bilinear", align_corners=False)
            h = block(block(h, stage[0], stage[1]).relu(), stage[3], stage[4])
            h = h if stage is net.up[-1] else h.relu()
        assert torch.allclose(net(x), h, atol=1e-4) and float(h.min()) < 0


@pytest.mark.parametrize("amp", [False, True])
def test_the_generators_see_pictures_as_the_classifier_does(amp):
    mean, std = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)
    attack = InputAware().forge(toy_images(20), Normalized(tiny_net(), mean, std), Training(), session=quiet())
    artist = attack.made()
    for net in (artist.pattern_net, artist.mask_net):
        assert net.mean.flatten().tolist() == [*mean] and net.std.flatten().tolist() == [*std]
    assert artist.std.flatten().tolist() == [*std]
    attack.prepare_masks(Normalized(tiny_net(), mean, std, amp), 1)
    assert artist.pattern_net.amp == artist.mask_net.amp == amp


def test_input_awares_picture_is_its_pattern_where_its_mask_is():
    attack = forged(InputAware())
    x = to_float(toy_images(3, size=16).pixels)
    artist = attack.made()
    with torch.no_grad():
        u, v = (net(x) for net in (artist.pattern_net, artist.mask_net))
        p = u.tanh() / (2 + 1e-7) + 0.5
        m = (20 * (v.tanh() / (2 + 1e-7) + 0.5) - 10).tanh() / (2 + 1e-7) + 0.5
        assert torch.allclose(attack.stamp(x), x + (p - x) * m, atol=1e-6)
        twice = forged(InputAware(double_tanh=True)).made().pattern(x)
    assert 0.119 < float(twice.min()) and float(twice.max()) < 0.881


def test_input_aware_on_a_toy():
    """A trigger that works on its own picture only is too much for the tiny network, and now and then for this one."""
    train, test = toy_images(300, size=16, seed=1), toy_images(200, size=16, seed=2)
    recipe = Training(epochs=10, batch_size=20, lr=0.05, lr_scheduler="OneCycleLR")
    found = []
    for seed in (0, 2, 3):
        attack = forged(InputAware(clean_train_epochs=1, pratio=0.3), seed)
        torch.manual_seed(seed)
        net = build("preactresnet18", 4, width=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        attack.fit(net, attack.poison_train(train, 0), recipe, seed=seed, session=quiet())
        found.append(score(net, test, attack.poison_test(test)))
        if found[-1].asr.percent > 60:
            break
    assert found[-1].asr.percent > 60 and found[-1].acc.percent > 90
    cross, others = attack.crossed(test), test.labels != 0  # another picture's trigger, in a quarter of the same class
    assert 100 * float((predict(net, cross.pixels)[others] == 0).float().mean()) < found[-1].asr.percent - 10


def test_a_second_network_gets_generators_that_start_anew():
    attack, images, found = forged(InputAware(clean_train_epochs=1, pratio=0.3)), toy_images(60, size=16), []
    for _ in range(2):
        net = attack.fit(tiny_net(), attack.poison_train(images, 0), Training(epochs=2, batch_size=20), session=quiet())
        found.append((net, attack.poison_test(images).pixels))
    assert same_weights(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_a_cross_picture_gets_the_trigger_of_another_one_whatever_the_order():
    """Sorted by class, a neighbour would be of the same class, as in a folder or in GTSRB."""
    images = toy_images(80)
    images = images[images.labels.argsort(stable=True)]
    marks = torch.arange(80, dtype=torch.uint8).view(-1, 1, 1, 1).expand(80, 3, 2, 2)
    found = covered(replace(images, pixels=marks), lambda x, others: others).pixels[:, 0, 0, 0].long()
    assert sorted(found.tolist()) == list(range(80)) and not (found == torch.arange(80)).any()
    assert (images.labels[found] == images.labels).float().mean() < 0.5
    one = images[torch.tensor([0])]
    assert torch.equal(covered(one, lambda x, others: others).pixels, one.pixels)


def test_diversity_by_hand():
    """Differences of 3 and 4 in two values have an rms of 5 / sqrt 2; over one of 1 and 1 that is 5 / sqrt 2."""
    inputs, outputs = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    assert float(InputAware()._diversity(inputs, outputs)) == pytest.approx(5 / 2**0.5, rel=1e-6)
    same = torch.zeros(1, 1, 1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(InputAware()._diversity(inputs, same), same)
    assert gradient.isfinite().all()


def test_input_aware_trains_masks_first_and_then_patterns_and_classifier():
    attack = forged(InputAware(clean_train_epochs=1, pratio=0.25))
    artist, net, images = attack.made(), tiny_net(), toy_images(16, size=16)
    before = [copy.deepcopy(part.state_dict()) for part in (artist.mask_net, artist.pattern_net, net)]

    def unchanged() -> list[bool]:
        now = [part.state_dict() for part in (artist.mask_net, artist.pattern_net, net)]
        return [all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, now, strict=True)]

    attack.fit(net, images, Training(epochs=1, batch_size=8), session=quiet())
    assert unchanged() == [False, True, True]
    attack = with_(attack, clean_train_epochs=0)
    artist.restarted()
    before[:] = [copy.deepcopy(part.state_dict()) for part in (artist.mask_net, artist.pattern_net, net)]
    attack.fit(net, images, Training(epochs=1, batch_size=8), session=quiet())
    assert unchanged() == [True, False, False]


def test_input_awares_batch_has_poisoned_cross_and_clean_pictures(monkeypatch):
    """Of eight two with their own trigger and the target, two with those of others and their own label, four clean."""
    attack, images, seen, labels = forged(InputAware(pratio=0.25, attack_target=3)), toy_images(8), [], []
    net, artist, x = tiny_net(), attack.made(), to_float(images.pixels)
    z = x.flip(0)
    monkeypatch.setattr(InputAware, "_others", lambda self, state, size: z)
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda a, y, **how: labels.append(y) or real(a, y, **how))
    state = attack.prepare(net, Training(epochs=30), 1) | {"images": images, "augment": None}
    own, other = copy.deepcopy(artist), copy.deepcopy(artist)
    for twin in (own, other):
        twin.train().mask_net.eval()
    with torch.no_grad():
        wanted = torch.cat([own(x[:2])[0], other(x[2:4], z[2:4])[0], x[4:]])
    attack.step(state, *attack.compose(state, x, images.labels))
    assert torch.allclose(seen[0], wanted, atol=1e-5)
    assert labels[0].tolist() == [3, 3, *images.labels[2:].tolist()]


def test_a_batch_of_one_picture_has_no_other_whose_trigger_could_do_nothing(monkeypatch):
    attack, images = forged(InputAware(pratio=0.5, attack_target=3)), toy_images(1)
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.zeros(*shape))  # it is one of those with a poisoned one
    x, y = attack.compose({"images": images, "augment": None}, to_float(images.pixels), images.labels)
    assert len(x) == 1 and torch.equal(y, images.labels)


def test_input_awares_schedules_move_with_the_epochs_by_the_classifiers_own_loss():
    attack = forged(InputAware(lr_G=0.5, schedulerG_milestones=(3,), schedulerG_lambda=0.1))
    recipe = Training(lr=0.1, epochs=40, lr_scheduler="ReduceLROnPlateau", steplr_gamma=0.5)
    state, rates = attack.prepare(tiny_net(), recipe, 1), []
    for epoch in range(12):
        for name in ("descent", "patterns"):
            state[name].optimizer.step()
        attack.end_epoch(state, {"loss": 9.0 - epoch, "error": 1.0})
        rates.append([state[name].optimizer.param_groups[0]["lr"] for name in ("descent", "patterns")])
    assert [classifier for classifier, _ in rates] == [0.1] * 11 + [0.05]
    assert [patterns for _, patterns in rates] == pytest.approx([0.5] * 2 + [0.05] * 10)


def test_input_awares_losses_by_hand(monkeypatch):
    """Masks: lambda_norm times what goes beyond the density, plus lambda_div times the diversity; then the latter."""
    attack = forged(InputAware(lambda_norm=7.0, lambda_div=3.0, mask_density=0.1, pratio=0.5))
    images = toy_images(4)
    x, artist, net = to_float(images.pixels), attack.made(), tiny_net()
    z = x.flip(0)
    monkeypatch.setattr(InputAware, "_others", lambda self, state, size: z)
    masks = attack.prepare_masks(net, 1) | {"images": images, "augment": None}
    twin = copy.deepcopy(artist).train()
    with torch.no_grad():
        m, m_z = twin.mask(x), twin.mask(z)
        size, diverse = (m - 0.1).clamp_min(0).mean(), attack._diversity((x - z) / artist.std, m - m_z)
    found = attack.mask_step(masks, *attack.compose_masks(masks, x, images.labels))
    assert float(found["loss"].detach()) == pytest.approx(float(7 * size + 3 * diverse), rel=1e-4)
    assert float(size) > 0 and float(diverse) > 0
    twin = copy.deepcopy(artist).train()
    twin.mask_net.eval()
    state = attack.prepare(net, Training(epochs=30), 1) | {"images": images, "augment": None}
    found = attack.step(state, *attack.compose(state, x, images.labels))
    loss, error, diverse = (float(found[name].detach()) for name in ("loss", "error", "diversity"))
    assert loss == pytest.approx(error + 3 * diverse, rel=1e-5)
    with torch.no_grad():  # the patterns of the poisoned and of the others whose triggers the cross pictures carry
        apart = twin(x[:2])[1] - twin(x[2:], z[2:])[1]
    lengths = [(part / artist.std).flatten(1).norm(dim=1) for part in (x[:2] - z[2:], apart)]
    assert diverse == pytest.approx(float((lengths[0] / lengths[1]).mean()), rel=1e-3)


def test_input_awares_other_pictures_are_drawn_anew_from_all_and_augmented():
    images, sizes = toy_images(40), []

    def darkened(pixels, generator):
        assert generator is torch.default_generator
        sizes.append(len(pixels))
        return pixels // 2

    torch.manual_seed(0)
    state = {"images": images, "augment": darkened}
    one, two = (forged(InputAware())._others(state, 30) for _ in range(2))
    assert sizes == [30, 30] and not torch.equal(one, two)
    halves = {tuple((picture // 2).flatten().tolist()) for picture in images.pixels}
    drawn = [tuple((255 * picture).round().byte().flatten().tolist()) for picture in torch.cat([one, two])]
    assert set(drawn) <= halves and len(set(drawn)) > 20
    plain = forged(InputAware())._others({"images": images, "augment": None}, 5)
    assert all(any(torch.equal(picture, other) for other in to_float(images.pixels)) for picture in plain)


@pytest.mark.parametrize("epochs", [1, 25])
def test_input_aware_without_joint_epochs_is_refused(epochs, one_line):
    with pytest.raises(ConfigError) as refusal:
        InputAware().forge(toy_images(20), tiny_net(), Training(epochs=epochs), session=quiet())
    assert f"epochs is {epochs}" in one_line(refusal.value)


def test_input_awares_settings_reach_its_optimisers():
    attack = forged(InputAware(lr_G=0.5, lr_M=0.25, schedulerG_milestones=(1,), schedulerM_milestones=(2,),
                               schedulerG_lambda=0.1, schedulerM_lambda=0.01))  # fmt: skip
    patterns = attack.prepare(tiny_net(), Training(epochs=30), 1)["patterns"]
    masks = attack.prepare_masks(tiny_net(), 1)["descent"]
    rates = []
    for descent in (patterns, masks):
        adam = descent.optimizer.param_groups[0]  # as in the authors' code
        assert adam["betas"] == (0.5, 0.9) and not adam["amsgrad"] and adam["weight_decay"] == 0
        for _ in range(3):
            rates.append(descent.optimizer.param_groups[0]["lr"])
            descent(sum(p.sum() for p in descent.parameters))
            descent.end_epoch(0.0)
    assert rates == pytest.approx([0.5, 0.05, 0.05, 0.25, 0.25, 0.0025])


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_the_pattern_generator_are_cleared_unless_asked(accumulate, monkeypatch):
    attack, kept = forged(InputAware(clean_train_epochs=0, pratio=0.25, accumulate=accumulate)), []
    step = Descent.__call__

    def watched(self, loss, *others):
        kept.append([one.keeps for one in (self, *others)])
        step(self, loss, *others)

    monkeypatch.setattr(Descent, "__call__", watched)
    attack.fit(tiny_net(), toy_images(16, size=16), Training(epochs=1, batch_size=16), session=quiet())
    assert kept == [[False, accumulate]]


@pytest.mark.parametrize("side", [12, 24])
def test_pictures_that_the_encoder_cannot_halve_four_times_are_refused(side, one_line):
    for use in (
        lambda: SSBA().forge(toy_images(8, size=side), tiny_net(), Training()),
        lambda: ROWS["ssba"].attack.stamp(torch.rand(1, 3, side, side)),
    ):
        with pytest.raises(ConfigError) as refusal:
            use()
        assert f"{side} x {side}" in one_line(refusal.value)


def test_pictures_too_small_for_the_generators_are_refused(one_line):
    with pytest.raises(ConfigError) as refusal:
        InputAware().forge(toy_images(8, size=12), tiny_net(), Training())
    assert "12 pixels" in one_line(refusal.value)


# Interruptions


@pytest.mark.parametrize("saves", [1, 2, 3])
@each_in_batch
def test_an_attack_inside_the_batches_resumes_with_equal_weights_and_triggers(attack, saves):
    """Stopped after the first mask epoch, between the stages' epochs, and before the last one."""
    images, recipe = toy_images(20, size=16), Training(epochs=3, batch_size=10)

    def fitted(tape: Tape, go: Callable[..., Any] = lambda fit: fit()) -> tuple[Any, Any]:
        torch.manual_seed(2)
        fresh, net = forged(with_(attack, pratio=0.25)), tiny_net()
        session = Session(say=lambda text: None, checkpoint=tape)
        go(lambda: fresh.fit(net, images, recipe, augment=Augment(2, flip=True), session=session))
        return net, fresh

    whole_net, whole = fitted(Tape())
    tape = Stopping(saves)

    def stop(fit: Callable[[], Any]) -> None:
        with pytest.raises(KeyboardInterrupt):
            fit()

    fitted(tape, stop)
    net, resumed = fitted(tape)
    assert same_weights(net, whole_net) and same_weights(resumed.made(), whole.made())
    assert torch.equal(resumed.poison_test(images).pixels, whole.poison_test(images).pixels)


def test_wanets_own_augmentation_flips_where_the_data_set_does(monkeypatch):
    flips, call = [], Augment.__call__
    monkeypatch.setattr(Augment, "__call__", lambda self, x, g: flips.append(self.flip) or call(self, x, g))
    for flip in (False, True):
        forged(WaNet())._augmented({"augment": Augment(4, flip=flip), "model": tiny_net()}, torch.rand(2, 3, 16, 16))
    assert flips == [False, True]


def test_input_awares_classifier_ends_its_schedule_with_the_joint_epochs():
    recipe = Training(lr=0.1, epochs=3, lr_scheduler="CosineAnnealingLR")
    descent = forged(InputAware(clean_train_epochs=1)).prepare(tiny_net(), recipe, 1)["descent"]
    for _ in range(2):
        descent.optimizer.step()
        descent.end_epoch(1.0)
    assert descent.optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("attack", "sizes"), [(BadNet(), [10, 10]), (ROWS["wanet"].attack, [10, 10, 5])])
def test_only_attacks_inside_the_batches_learn_from_the_last_one(attack, sizes, monkeypatch):
    """As in the benchmark, whose loader drops it unless the attack makes its own."""
    seen, compose = [], type(attack).compose

    def watched(self, state, x, y):
        seen.append(len(x))
        return compose(self, state, x, y)

    monkeypatch.setattr(type(attack), "compose", watched)
    attack.fit(tiny_net(), toy_images(25), Training(epochs=1, batch_size=10), session=quiet())
    assert seen == sizes


def test_pictures_that_are_poisoned_already_lead_where_they_truly_would():
    attack, clean = BadNet(attack_label_trans="all2all"), toy_images(40)
    poisoned = replace(clean, labels=(clean.labels + 2) % 4)
    assert torch.equal(attack.poison_test(poisoned).labels, attack.poison_test(clean).labels)
    assert torch.equal(attack.poisoned(poisoned).labels, attack.poisoned(clean).labels)
