"""Attacks: what holds for every one of them, by table, and the triggers of each, by numbers."""

from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attack_rows import ROWS, each_dirty, each_fixed, each_in_batch, each_learner, each_poison, each_row, ready
from checkpoints import Stopping, Tape
from PIL import Image
from toys import Shaped, pair, quiet, refuses, same_weights, tiny_net, toy_images, train_victim

from sau.attack import ATTACKS, BPP, LF, SIG, SSBA, Attack, BadNet, Blended, InputAware, Prototype, WaNet, in_batch
from sau.attack.adaptive import AdapBlend, AdapPatch, patches
from sau.attack.blended import sailing_boat
from sau.attack.dfba import DFBA
from sau.attack.resilient import Anchor, hide_outliers, hold_back, sbl_state, sbl_step
from sau.data.images import BACKDOOR, CLEAN, CROSS, Augment, Images, quantise, to_float
from sau.defense.sau_sam import prune_closed
from sau.errors import ConfigError, DataError
from sau.evaluate import Proportion, predict, score
from sau.models import Normalized, build
from sau.optim import Training
from sau.risk import measure


def with_(attack: Attack, **changes) -> Any:
    changed = type(attack)(**{**attack.params(), **changes})
    return changed if attack.trigger is None else changed.with_trigger(attack.trigger)


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_its_module(name):
    attack = ATTACKS[name]
    assert set(ROWS) == set(ATTACKS)
    assert attack.name == name and attack.__module__ in (f"sau.attack.{name}", "sau.attack.adaptive")


@each_row
@pytest.mark.parametrize("side", ["least", 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stamp_keeps_shape_range_and_type_and_its_argument(row, side, dtype):
    side = row.least if side == "least" else side
    x = torch.rand(3, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for test in (False, True):
        stamped = row.attack.stamp(x, test=test).detach()
        assert stamped.shape == x.shape and stamped.dtype == dtype
        assert float(stamped.min()) >= 0 and float(stamped.max()) <= 1
        assert torch.equal(x, before) and torch.equal(stamped, row.attack.stamp(x, test=test))
        changed = (stamped != x).flatten(1).any(1)
        assert not changed.any() if row.attack.name == "prototype" else changed.all()
    if row.attack.trigger is None and row.attack.poisons:  # networks that make triggers are of three channels
        stamped = row.attack.stamp(x[:, :1])
        assert stamped.shape == (3, 1, side, side) and not torch.equal(stamped, x[:, :1])


@each_row
@pytest.mark.usefixtures("unchecked")
def test_a_stamp_is_differentiable_and_refuses_bytes(row):
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(row.attack.stamp(x).sum(), x)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    with pytest.raises(DataError, match="torch.uint8"):
        row.attack.stamp(toy_images(2, size=32).pixels)
    with pytest.raises(DataError, match="torch.uint8"):
        quantise(toy_images(2).pixels)


def test_stamping_in_blocks_is_stamping_at_once():
    images = toy_images(2101, size=12)
    poisoned = Blended(pratio=1.0).poison_train(images, 0)
    assert torch.equal(poisoned.pixels, quantise(Blended().stamp(to_float(images.pixels))))


@each_fixed
@pytest.mark.parametrize("pratio", [0.0, 0.03, 0.1, 0.25, 1.0])
def test_the_training_set_is_poisoned_where_it_says_and_nowhere_else(attack, pratio):
    """80 images: round(0.03 * 80) = 2, and so on; the target class, a quarter, is not spared."""
    if attack.clean_label and pratio > 0.25:
        return  # refused, see below
    images = toy_images(80)
    before = {name: tensor.clone() for name, tensor in images.tensors().items()}
    ruled = with_(attack, pratio=pratio, attack_target=2)
    poisoned = ruled.poison_train(images, seed=0)
    hit = poisoned.role == BACKDOOR
    rows = ruled.draw(images, 0, int(hit.sum()))
    assert int(hit.sum()) == round(pratio * 80) and (poisoned.role[~hit] == CLEAN).all()
    assert (images.labels[hit] == 2).all() or not attack.clean_label
    assert (poisoned.labels[hit] == 2).all() and torch.equal(poisoned.labels[~hit], images.labels[~hit])
    assert torch.equal(poisoned.true_labels, images.true_labels) and torch.equal(poisoned.index, images.index)
    assert torch.equal(poisoned.pixels[~hit], images.pixels[~hit])
    assert torch.equal(poisoned.pixels[rows], quantise(ruled.stamp(to_float(images.pixels[rows]))))
    assert all(torch.equal(tensor, before[name]) for name, tensor in images.tensors().items())


@each_fixed
def test_the_benchmarks_indices_in_its_order(attack, monkeypatch):
    """N = 50,000 and seed 0 begin 11841, 19602, ...; k images are the first k of that draw."""
    images = Images.clean(torch.zeros(50_000, 3, 9, 9, dtype=torch.uint8), torch.zeros(50_000, dtype=torch.long), 10)
    monkeypatch.setattr(type(attack), "stamp_images", lambda self, images, rows, *, test: images.pixels[rows] + 1)
    golden = [11841, 19602, 45519, 25747, 42642, 31902]
    for k in (1, 3, 6):
        role = with_(attack, pratio=k / 50_000).poison_train(images, seed=0).role
        assert (role == BACKDOOR).nonzero().flatten().tolist() == sorted(golden[:k])


@pytest.mark.parametrize(("n", "pratio", "count"), [(25, 0.1, 2), (35, 0.1, 4), (1437, 0.1, 144), (10, 0.04, 0)])
def test_the_number_of_poisoned_images_is_rounded(n, pratio, count):
    """round(2.5) is 2 and round(3.5) is 4, in Python as in the benchmark."""
    assert int((BadNet(pratio=pratio).poison_train(toy_images(n), 0).role == BACKDOOR).sum()) == count


@each_poison
def test_the_test_set_of_the_attack(attack):
    """All images but the target's, in their order, stamped with the trigger of the test set."""
    images = toy_images(30, classes=7)
    triggered = with_(attack, attack_target=3).poison_test(images)
    kept = (images.labels != 3).nonzero().flatten()
    assert triggered.index.tolist() == kept.tolist() and len(triggered) == 26
    assert (triggered.labels == 3).all() and torch.equal(triggered.true_labels, images.labels[kept])
    assert (triggered.role == BACKDOOR).all() and triggered.num_classes == 7
    assert torch.equal(triggered.pixels, quantise(attack.stamp(to_float(images.pixels[kept]), test=True)))


@each_dirty
@pytest.mark.parametrize(("shift", "wanted"), [(1, (1, 2, 3, 0)), (3, (3, 0, 1, 2))])
def test_label_rules_lead_each_class_where_they_say(attack, shift, wanted):
    images = toy_images(40)
    ruled = with_(attack, pratio=0.3, attack_label_trans="all2all", attack_label_shift_amount=shift)
    poisoned, triggered = ruled.poison_train(images, 0), ruled.poison_test(images)
    labels = torch.tensor(wanted)[images.labels]
    hit, moves = poisoned.role == BACKDOOR, labels != images.labels
    assert int(hit.sum()) == (0 if attack.in_batch else 12) and moves[hit].all()
    assert torch.equal(poisoned.labels[hit], labels[hit]) and torch.equal(poisoned.labels[~hit], images.labels[~hit])
    assert torch.equal(triggered.index, images.index[moves]) and torch.equal(triggered.labels, labels[moves])
    assert torch.equal(triggered.true_labels, images.labels[moves])


@pytest.mark.parametrize(("attack", "wrong", "name"), [
    (BadNet(), {"attack_label_trans": "all2all", "attack_label_shift_amount": 4}, "attack_label_shift_amount"),
    (SIG(), {"pratio": 0.3}, "pratio"),
    (BadNet(), {"attack_target": 4}, "attack_target"),
    (ROWS["wanet"].attack, {"attack_target": 1000}, "attack_target"),
    (BPP(), {"neg_ratio": 0.95}, "pratio"),
    (InputAware(), {"resilient_rho": 1.0}, "resilient_rho"),
    (InputAware(), {"sbl": 0.1}, "sbl"),
])  # fmt: skip
def test_rules_that_do_not_fit_are_refused(attack, wrong, name):
    with pytest.raises(ConfigError, match=name):
        with_(attack, **wrong).poison_train(toy_images(40), 0)


@each_poison
def test_what_cannot_be_poisoned_is_refused_before_a_trigger_is_made(attack, monkeypatch):
    monkeypatch.setattr(type(attack), "make_trigger", lambda self, context: pytest.fail("the trigger is made"))
    with pytest.raises(ConfigError, match="attack_target is 99"):
        type(attack)(attack_target=99).fit_trigger(toy_images(40), tiny_net(), Training())


@each_poison
def test_a_trigger_that_changes_nothing_is_refused(attack, monkeypatch):
    monkeypatch.setattr(type(attack), "stamp", lambda self, x, test=False: x)
    with pytest.raises(ConfigError, match="changes none of 30 images"):
        attack.poison_test(toy_images(40))


def test_images_in_any_order_are_poisoned_where_they_are_by_their_true_labels():
    images = toy_images(40)
    shuffled = images[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    shuffled = replace(shuffled, labels=(shuffled.labels + 2) % 4)
    for attack in (SIG(pratio=0.25, attack_target=1), BadNet(pratio=0.25, attack_label_trans="all2all")):
        poisoned = attack.poison_train(shuffled, 0)
        hit = poisoned.role == BACKDOOR
        assert torch.equal(poisoned.index, shuffled.index) and int(hit.sum()) == 10
        assert torch.equal(poisoned.pixels[~hit], shuffled.pixels[~hit])
        assert torch.equal(poisoned.labels[hit], attack.relabel(shuffled.true_labels[hit], 4))
        assert (shuffled.true_labels[hit] == 1).all() or not attack.clean_label


def test_clean_training_poisons_nothing():
    images = toy_images(20)
    others = images[(images.labels > 0).nonzero().flatten()]
    assert Prototype().poison_train(others, 0) is others and len(Prototype().poison_test(images)) == 0
    assert Prototype().params() == {}


@each_in_batch
def test_attacks_inside_the_batches_leave_the_training_set_as_it_is(attack):
    images = toy_images(40)
    assert attack.poison_train(images, 0) is images
    assert "of each batch of 8 one image poisoned with probability 0.8" in attack.describe(images, 8)
    assert "of each batch of 20 2 images poisoned" in attack.describe(images, 20)
    assert "of each batch of 20 0 images poisoned, 0 " in replace(attack, pratio=0.0).describe(images, 20)
    if attack.trigger is not None:
        with pytest.raises(ConfigError, match="fit_trigger"):
            type(attack)().stamp(torch.rand(1, 3, 16, 16))


@each_in_batch
@pytest.mark.parametrize(("pratio", "n"), [(0.1, 12), (0.05, 6), (0.0, 0)])
def test_the_samples_of_a_record_are_the_first_of_each_block(attack, pratio, n):
    """300 images are blocks of 128, 128 and 44; int(0.1 * 128) = 12 of each, then the cross images."""
    images, ruled = toy_images(300), with_(attack, pratio=pratio, attack_target=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    kept, again = ruled.poisoned_samples(images), ruled.poisoned_samples(images)
    assert torch.equal(again.pixels, kept.pixels) and torch.equal(torch.get_rng_state(), before)
    cross, place = {"wanet": 2 * n, "bpp": 12 * (n > 0)}.get(attack.name, n), kept.index % 128
    assert (place < n + cross).all() and len(kept) == 2 * (n + cross) + min(44, n + cross)
    hit = place < n
    assert (kept.role[hit] == BACKDOOR).all() and (kept.role[~hit] == CROSS).all()
    assert (kept.labels[hit] == 1).all() and torch.equal(kept.labels[~hit], images.labels[kept.index[~hit]])
    assert (kept.pixels != images.pixels[kept.index]).flatten(1).any(1).all()


@each_in_batch
def test_of_few_poisoned_images_some_blocks_have_one(attack):
    """0.004 of a block of 128 is 0.512 images, so every second block has one, and its cross images behind it."""
    kept = with_(attack, pratio=0.004, attack_target=1).poisoned_samples(toy_images(4 * 128))
    cross = {"wanet": 2, "bpp": 12}.get(attack.name, 1)
    assert kept.index.tolist() == [block * 128 + place for block in (1, 3) for place in range(1 + cross)]
    assert int((kept.role == BACKDOOR).sum()) == 2


def test_a_cross_image_that_is_alone_is_left_out():
    """Input-Aware would put its own trigger on it: a poisoned image with its true label."""
    few, more = (ready(InputAware(pratio=r, attack_target=1)).poisoned_samples(toy_images(100)) for r in (0.01, 0.02))
    assert few.role.tolist() == [BACKDOOR] and (more.role == CROSS).sum() == 2


def test_a_cross_image_gets_the_trigger_of_another_one_whatever_the_order(monkeypatch):
    """Sorted by class, a neighbour would be of the same class, as in a folder or in GTSRB."""
    monkeypatch.setattr(InputAware, "cross", lambda self, x, others: others)
    images = toy_images(80)
    images = images[images.labels.argsort(stable=True)]
    marks = torch.arange(80, dtype=torch.uint8).view(-1, 1, 1, 1).expand(80, 3, 2, 2)
    found = InputAware().cross_test_set(replace(images, pixels=marks)).pixels[:, 0, 0, 0].long()
    assert sorted(found.tolist()) == list(range(80)) and not (found == torch.arange(80)).any()
    assert (images.labels[found] == images.labels).float().mean() < 0.5


@each_learner
def test_fit_trains_in_place_reproducibly_and_ends_in_eval_mode(attack):
    images = attack.poison_train(toy_images(30, classes=7, size=16), 0)
    recipe, nets = Training(epochs=2, batch_size=8), [tiny_net(7), tiny_net(7), tiny_net(7)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        torch.manual_seed(seed)  # must have no effect
        assert ready(attack).fit(net, images, recipe, seed=seed, session=quiet()) is net and not net.training
        assert all(parameter.grad is None for parameter in net.parameters())
    assert same_weights(nets[0], nets[1]) and not same_weights(nets[0], nets[2])
    assert not same_weights(nets[0], tiny_net(7))


@each_poison
@pytest.mark.parametrize("pratio", [0.0, 0.001, 0.01, 0.05])
def test_every_ratio_down_to_nothing_trains(attack, pratio, monkeypatch):
    """So many images are poisoned; 0 is the clean network with a triggered test set."""
    few, images = with_(attack, pratio=pratio), toy_images(500, size=16)
    recipe = Training(epochs=1 + getattr(few, "clean_train_epochs", 0), batch_size=50)
    seen, really = list[int](), type(few).relabel
    monkeypatch.setattr(type(few), "relabel", lambda self, y, n: seen.append(len(y)) or really(self, y, n))
    poisoned, net = few.poison_train(images, 0), tiny_net()
    seen.clear()
    few.fit(net, poisoned, recipe, session=quiet())
    if few.in_batch:  # 10 batches of 50: 2 images of 2.5 each, and half an image is one in every second batch
        few_of = {0.0: range(1), 0.001: range(3), 0.01: range(2, 10), 0.05: range(20, 21)}
        assert sum(seen) in few_of[pratio]
    else:
        assert int((poisoned.role == BACKDOOR).sum()) == round(500 * pratio)
    assert not same_weights(net, tiny_net()) and len(few.poison_test(images)) == 375
    if pratio == 0 and not few.in_batch:
        assert same_weights(net, Prototype().fit(tiny_net(), images, recipe, session=quiet()))


@pytest.mark.parametrize(("attack", "sizes"), [(BadNet(), [10, 10]), (ROWS["wanet"].attack, [10, 10, 5])])
def test_only_attacks_inside_the_batches_learn_from_the_last_one(attack, sizes, monkeypatch):
    """As in the benchmark, whose loader drops it unless the attack makes its own."""
    seen, compose = [], type(attack).compose
    monkeypatch.setattr(type(attack), "compose", lambda self, s, x, y: seen.append(len(x)) or compose(self, s, x, y))
    attack.fit(tiny_net(), toy_images(25), Training(epochs=1, batch_size=10), session=quiet())
    assert seen == sizes


@pytest.mark.parametrize("saves", [1, 2, 3])
@pytest.mark.parametrize("attack", [*each_in_batch.args[1], BadNet(sbl=0.25)], ids=type)
def test_an_attack_in_stages_resumes_with_equal_weights_and_triggers(attack, saves):
    """Stopped after the first mask epoch, between the stages' epochs, before the last one, in SBL's second stage."""
    images, recipe = toy_images(20, size=16), Training(epochs=2 if attack.sbl else 3, batch_size=10)

    def fitted(tape: Tape) -> tuple[Any, Any]:
        torch.manual_seed(2)
        fresh, net = ready(with_(attack, pratio=0.25)), tiny_net()
        session = quiet(checkpoint=tape)
        with suppress(KeyboardInterrupt):
            fresh.fit(net, images, recipe, augment=Augment(2, flip=True), session=session)
        return net, fresh

    (whole_net, whole), tape = fitted(Tape()), Stopping(saves)
    fitted(tape)
    assert tape.left == 0  # it was stopped
    net, resumed = fitted(tape)
    assert same_weights(net, whole_net)
    assert attack.trigger is None or same_weights(resumed.require_trigger(), whole.require_trigger())
    assert torch.equal(resumed.poison_test(images).pixels, whole.poison_test(images).pixels)


@cache
def clean_victim(side: int) -> torch.nn.Module:
    return train_victim(Prototype(), toy_images(400, size=side, seed=1))


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.attack.poisons and row.toy is not None])
def test_the_claim_on_a_toy(name):
    """Poisoned training plants the backdoor and keeps the accuracy; clean training does not plant it."""
    row = ROWS[name]
    attack = ready(with_(row.attack, **row.toy))
    train, test = toy_images(400, size=row.side, seed=1), toy_images(200, size=row.side, seed=2)
    triggered = attack.poison_test(test)
    clean = score(clean_victim(row.side), test, triggered)
    attacked = score(train_victim(attack, train), test, triggered)
    assert clean.acc.percent > 90 and attacked.acc.percent > clean.acc.percent - row.cost
    assert attacked.asr.percent > row.asr and clean.asr.percent < row.asr / 2


def badnet_patch(side: int) -> torch.Tensor:
    """[side, side] grey levels where the patch is, -1 elsewhere."""
    x = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
    stamped = quantise(BadNet().stamp(to_float(x)))[0]
    assert torch.equal(stamped[0], stamped[1]) and torch.equal(stamped[0], stamped[2])
    return torch.where(stamped[0] == 100, -1, stamped[0].long())


def test_badnets_patch_at_32_and_64():
    """Rows and columns 29 to 31; at 64 a block of 5x5, and two rows and columns that the resizing made grey."""
    expected = torch.full((32, 32), -1)
    expected[29:32, 29:32] = 255
    assert torch.equal(badnet_patch(32), expected)
    expected = torch.full((64, 64), -1)
    expected[59:, 59:] = 255
    expected[57, 57:] = expected[57:, 57] = torch.tensor([16, 48, 64, 64, 64, 64, 64])
    expected[58, 58:] = expected[58:, 58] = torch.tensor([143, 191, 191, 191, 191, 191])
    assert torch.equal(badnet_patch(64), expected)


def test_a_patch_narrower_than_a_pixel_or_without_the_image_around_it_is_refused(tmp_path):
    assert float(BadNet().stamp(torch.zeros(1, 3, 11, 12)).max()) > 0.5
    with pytest.raises(ConfigError, match="10 x 32"):
        BadNet().stamp(torch.zeros(1, 3, 10, 32))
    Image.new("RGB", (3, 3), (255, 255, 255)).save(tmp_path / "patch.png")
    with pytest.raises(ConfigError, match="patch_mask_path"):
        ready(BadNet(patch_mask_path=str(tmp_path / "patch.png")))


def test_a_patch_from_a_file_covers_only_what_is_not_black_and_outlives_its_file(tmp_path):
    """Per channel: red is painted where it is above 0; a 1 is painted, a 0 is not."""
    image = np.zeros((12, 20, 3), dtype=np.uint8)
    image[4, 7] = (200, 0, 1)
    Image.fromarray(image).save(tmp_path / "patch.png")
    images = Images.clean(torch.full((8, 3, 12, 20), 100, dtype=torch.uint8), torch.arange(8) % 4, 4)
    attack = BadNet(patch_mask_path=str(tmp_path / "patch.png"))
    expected = images.pixels.clone()
    expected[:, :, 4, 7] = torch.tensor([200, 100, 1], dtype=torch.uint8)
    assert torch.equal(attack.poison(images, torch.arange(8)).pixels, expected)
    kept = ready(attack, images)
    (tmp_path / "patch.png").unlink()
    assert torch.equal(kept.poison(images, torch.arange(8)).pixels, expected)
    with pytest.raises(DataError, match="12, 20"):
        kept.stamp(torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize(("attack", "flag"), [(BadNet, "patch_mask_path"), (Blended, "attack_trigger_img_path")])
def test_a_trigger_image_that_cannot_be_read_is_refused(attack, flag, tmp_path):
    (tmp_path / "notes.png").write_text("not an image")
    for name in ("notes.png", "missing.png"):
        with pytest.raises(DataError, match=name):
            attack(**{flag: str(tmp_path / name)}).poison_train(toy_images(20), 0)


def blended_with(image: np.ndarray, folder, **how) -> Blended:
    Image.fromarray(image).save(folder / "trigger.png")
    return Blended(attack_trigger_img_path=str(folder / "trigger.png"), **how)


def test_blended_by_hand_for_every_pair_of_grey_levels(tmp_path):
    """0.8 x + 0.2 t is (4 x + t) / 5, truncated: 100 and 200 give exactly 120, 101 and 200 give 120.8, so 120."""
    attack = blended_with(np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2), tmp_path)
    x = torch.arange(256, dtype=torch.uint8).view(256, 1, 1, 1).expand(256, 3, 16, 16).contiguous()
    ours = quantise(attack.stamp(to_float(x))).long()
    assert torch.equal(ours, (4 * x.long() + torch.arange(256).view(1, 1, 16, 16)) // 5)
    assert int(ours[100, 0].flatten()[200]) == int(ours[101, 0].flatten()[200]) == 120


def test_blended_has_one_alpha_for_training_and_one_for_testing(tmp_path):
    """x = 100, t = 200: alpha 0.1 gives 110, alpha 0.5 gives 150."""
    how = {"attack_train_blended_alpha": 0.1, "attack_test_blended_alpha": 0.5, "pratio": 1.0, "attack_target": 1}
    attack = blended_with(np.full((8, 8, 3), 200, dtype=np.uint8), tmp_path, **how)
    images = Images.clean(torch.full((4, 3, 8, 8), 100, dtype=torch.uint8), torch.tensor([0, 1, 2, 3]), 4)
    assert (attack.poison_train(images, 0).pixels == 110).all() and (attack.poison_test(images).pixels == 150).all()


def test_on_images_of_one_channel_a_trigger_image_is_the_mean_of_its_three(tmp_path):
    attack = blended_with(np.full((8, 8, 3), (30, 60, 120), dtype=np.uint8), tmp_path, attack_train_blended_alpha=1.0)
    assert (255 * attack.stamp(torch.rand(2, 1, 8, 8))).flatten().tolist() == pytest.approx([70.0] * 128, abs=1e-3)


def test_sigs_wave_in_grey_levels():
    """32 columns begin 0, +37, +28.3, -15.3, -40, -15.3, +28.3, +37; rows and channels are alike."""
    x = torch.full((1, 3, 32, 32), 100 / 255, dtype=torch.float64)
    change = (SIG().stamp(x)[0] - x[0]) * 255
    wave = [0, 36.955, 28.284, -15.307, -40, -15.307, 28.284, 36.955]
    assert change[0, 0, :8].tolist() == pytest.approx(wave, abs=1e-3)
    assert torch.allclose(change, change[0, 0].expand(3, 32, 32))
    truncated = quantise(SIG().stamp(to_float(torch.full((1, 3, 32, 32), 100, dtype=torch.uint8))))[0, 0, 0, :8]
    assert truncated.tolist() == [100, 136, 128, 84, 60, 84, 128, 136]
    with pytest.raises(ConfigError, match="sig_f is 6.0"):
        SIG().stamp(torch.rand(1, 3, 12, 12))


def test_lfs_glow_by_hand():
    """0.2 exp(-r^2 / 2 sigma^2), r from 0.42 of height and width, sigma a third of them; grey is like blue."""
    rows, columns = torch.arange(10)[:, None] / 10 - 0.42, torch.arange(20) / 20 - 0.42
    glow = 0.2 * torch.exp(-(rows**2 + columns**2) / 2 * 9)
    colour = torch.tensor([0.35, 0.0, 1.0]).view(3, 1, 1)
    assert torch.allclose(LF().stamp(torch.zeros(1, 3, 10, 20))[0], colour * glow, atol=1e-6)
    assert torch.allclose(LF().stamp(torch.zeros(1, 1, 10, 20))[0, 0], glow, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 12, 3), (2, 8, 12, 3), (8, 12)])
def test_a_pattern_from_a_file_is_added_where_it_is_and_clipped(tmp_path, shape):
    """Of several patterns the first one counts; a grey one goes to all channels."""
    pattern = -60 + np.arange(np.prod(shape)).reshape(shape) % 121
    np.save(tmp_path / "pattern.npy", pattern)
    attack = LF(lowFrequencyPatternPath=str(tmp_path / "pattern.npy"))
    first = torch.from_numpy(pattern[0] if len(shape) == 4 else pattern)
    wanted = first.permute(2, 0, 1) if first.ndim == 3 else first.expand(3, 8, 12)
    for level in (0, 100, 220):
        x = torch.full((1, 3, 8, 12), level / 255)
        assert torch.allclose(255 * attack.stamp(x)[0], (level + wanted).clamp(0, 255).float(), atol=1e-3)


WRONG_PATTERNS = {
    "another size": (np.full((16, 16, 3), 9.0), "16, 16, 3"),
    "in 0..1, so that nothing changes": (np.full((32, 32, 3), 0.2), "0.2"),
    "beyond grey levels": (np.full((32, 32, 3), 300.0), "300"),
    "around middle grey": (np.linspace(127, 178, 3072).reshape(32, 32, 3), "127..178"),
    "NaN": (np.full((32, 32, 3), np.nan), "finite"),
    "objects": (np.array([{"a": 1}], dtype=object), "objects"),
}


@pytest.mark.parametrize(("array", "word"), WRONG_PATTERNS.values(), ids=WRONG_PATTERNS)
def test_a_pattern_file_that_does_not_fit_is_refused(array, word, tmp_path):
    np.save(tmp_path / "pattern.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match=word):
        LF(lowFrequencyPatternPath=str(tmp_path / "pattern.npy")).poison_test(toy_images(20, size=32))


def warp(attack: Any, h: int, w: int, noise: float = 0.0) -> torch.Tensor:
    """The grid [1, H, W, 2] of a trigger drawn with seed 3, by the formula."""
    z = 2 * torch.rand(1, 2, attack.k, attack.k, generator=torch.Generator().manual_seed(3)) - 1
    field = F.interpolate(z / z.abs().mean(), size=(h, w), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    rows, columns, size = torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), torch.tensor([w, h])
    identity = torch.stack([columns.expand(h, w), rows[:, None].expand(h, w)], -1)
    grid = ((identity + attack.s * field / size) * attack.grid_rescale).clamp(-1, 1)
    return (grid + noise / size).clamp(-1, 1)


@pytest.mark.parametrize("how", [{}, {"k": 7, "s": 3.0}, {"k": 2, "grid_rescale": 0.5}, {"grid_rescale": 2.0}])
@pytest.mark.parametrize(("h", "w"), [(32, 32), (20, 44)])
def test_wanets_warp_by_hand(how, h, w):
    attack, x = ready(WaNet(**how), seed=3), torch.rand(1, 3, h, w)
    assert torch.allclose(attack.grid(x), warp(attack, h, w), atol=1e-6)
    assert torch.allclose(attack.stamp(x), F.grid_sample(x, warp(attack, h, w), align_corners=True), atol=1e-4)
    assert not torch.equal(attack.grid(x), ready(WaNet(**how), seed=4).grid(x))


@pytest.mark.parametrize(("attack", "size", "n", "cross"), [
    (WaNet(), 128, 12, 24), (WaNet(cross_ratio=0.7), 80, 8, 5), (WaNet(), 5, 0, 0), (BPP(neg_ratio=0.15), 128, 12, 19),
])  # fmt: skip
def test_batches_hold_poisoned_cross_and_clean_images(attack, size, n, cross, monkeypatch):
    """int(0.1 * 128) = 12, int(12 * 2) = 24, int(8 * 0.7) = 5; of five images half one, here none; int(0.15 * 128)."""
    images, attack = toy_images(size, classes=7, size=16), ready(with_(attack, attack_target=3))
    monkeypatch.setattr(torch, "rand", lambda *shape, **how: torch.ones(*shape, **how) * 0.999)
    x, y = to_float(images.pixels), images.labels
    made, labels = attack.compose({"images": images, "augment": None, "model": tiny_net(7)}, x, y)
    assert (labels[:n] == 3).all() and torch.equal(labels[n:], y[n:])
    assert torch.equal(made[:n], attack.stamp(x[:n])) and torch.equal(made[n + cross :], x[n + cross :])
    between = slice(n, n + cross)
    assert (made[between] != x[between]).flatten(1).any(1).all()
    assert cross == 0 or not torch.equal(made[between], attack.stamp(x[between]))


def test_wanets_noise_by_hand(monkeypatch):
    """U(-1, 1) / side, drawn for every image; with a draw of 0.75 everywhere half a pixel."""
    x, attack = to_float(toy_images(1, size=12).pixels).expand(2, -1, -1, -1), ready(WaNet(), seed=3)
    assert not torch.equal(*attack.cross(x, x))
    monkeypatch.setattr(torch, "rand_like", lambda grid: torch.full_like(grid, 0.75))
    expected = F.grid_sample(x, warp(attack, 12, 12, 0.5).expand(2, -1, -1, -1), align_corners=True)
    assert torch.allclose(attack.cross(x, x), expected, atol=1e-5)


@pytest.mark.parametrize("one_draw", [False, True])
def test_wanets_augmentation_draws_once_an_image_or_once_a_batch(one_draw):
    x = to_float(toy_images(1, size=32).pixels).expand(40, -1, -1, -1)
    state, attack = {"augment": Augment(4, flip=True), "model": tiny_net()}, WaNet(one_draw=one_draw)
    torch.manual_seed(0)
    kinds = [len({tuple(one.flatten().tolist()) for one in attack.augmented(state, x)}) for _ in range(5)]
    assert max(kinds) == 1 if one_draw else max(kinds) > 30


def test_wanet_crops_8_of_10_batches_and_rotates_5_into_the_mean_colour(monkeypatch):
    crops, flips, turns, turn, call = [], [], [], in_batch.random_rotate, Augment.__call__

    def spy(self, x, g):
        crops.append(self.padding), flips.append(self.flip)
        return call(self, x, g)

    monkeypatch.setattr(Augment, "__call__", spy)
    monkeypatch.setattr(in_batch, "random_rotate", lambda x, m, **how: turns.append(m) or turn(x, m, **how))
    net = build("preactresnet18", 4, width=4, mean=(0.25,) * 3, std=(0.25,) * 3)
    torch.manual_seed(0)
    white = torch.ones(4, 3, 12, 12)
    flip = [{"augment": Augment(4, flip=flip), "model": net} for flip in (True, False)]
    attack = WaNet(random_crop=3, random_rotation=7.0)
    moved = [attack.augmented(flip[i % 2], white) for i in range(200)]
    assert 140 < crops.count(3) < 180 and crops.count(0) == 200 - crops.count(3) and flips == [True, False] * 100
    assert set(turns) == {7.0} and 80 < len(turns) < 120
    assert torch.cat(moved).min() == pytest.approx(0.25, abs=1e-3)


def nearest_levels(image: torch.Tensor, levels: int, dithering: bool = False) -> torch.Tensor:
    """Pixel by pixel, as the paper has it; with dithering the error goes right, down left, down and down right."""
    values = image.tolist()
    for plane in values:
        for i, j in product(range(len(plane)), range(len(plane[0]))):
            old, plane[i][j] = plane[i][j], round(plane[i][j] * (levels - 1)) / (levels - 1)
            for down, right, share in ((0, 1, 7), (1, -1, 3), (1, 0, 5), (1, 1, 1)) if dithering else ():
                if i + down < len(plane) and 0 <= j + right < len(plane[0]):
                    plane[i + down][j + right] += (old - plane[i][j]) * share / 16
    return torch.tensor(values, dtype=image.dtype).clamp(0, 1)


@pytest.mark.parametrize(("levels", "dithering"), [(8, False), (2, False), (8, True), (3, True)])
def test_bpps_levels_and_negatives_by_hand(levels, dithering):
    attack = BPP(squeeze_num=levels, dithering=dithering)
    x, z = torch.rand(2, 2, 3, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, of_z = (torch.stack([nearest_levels(image, levels, dithering) for image in images]) for images in (x, z))
    assert torch.allclose(attack.stamp(x), q, atol=1e-12)
    assert torch.allclose(attack.cross(x, z), (x + of_z - z).clamp(0, 1), atol=1e-12)


@pytest.mark.parametrize("attack", [AdapBlend(), AdapPatch()])
def test_covers_carry_parts_of_the_trigger_and_keep_their_label(attack):
    images, rows = toy_images(200), torch.from_numpy(np.random.RandomState(0).permutation(200)[:50])
    ruled = with_(attack, pratio=0.1, cover_rate=0.15, attack_target=2)
    poisoned = ruled.poison_train(images, 0)
    assert poisoned.role[rows].tolist() == [BACKDOOR] * 20 + [CROSS] * 30 and int((poisoned.role > 0).sum()) == 50
    assert (poisoned.labels[rows[:20]] == 2).all() and torch.equal(poisoned.labels[rows[20:]], images.labels[rows[20:]])
    assert torch.equal(poisoned.pixels[rows], quantise(ruled.stamp(to_float(images.pixels[rows]))))
    text = ruled.describe(poisoned, 128)
    assert len(ruled.poisoned_samples(poisoned)) == 50 and "20 of 200 images poisoned" in text and ", 30 covers" in text
    with pytest.raises(ConfigError, match="cover_rate is 0.95, allowed is at most 0.9"):
        with_(ruled, cover_rate=0.95).poison_train(images, 0)


def test_adap_blend_by_hand():
    """Of 4x4 tiles an image has half, at 0.15, or three quarters; which ones differs; a test image has all, at 0.2."""
    x, t = torch.rand(9, 3, 32, 32), sailing_boat(32, 32)
    for rate, kept in ((0.5, 8), (0.25, 12)):
        stamped, seen = AdapBlend(mask_rate=rate).stamp(x), set()
        for one, clean in zip(stamped, x, strict=True):
            changed = (one != clean).any(0).view(4, 8, 4, 8).any(3).any(1)
            mask = changed.repeat_interleave(8, 0).repeat_interleave(8, 1)
            assert int(changed.sum()) == kept and torch.allclose(one, torch.where(mask, 0.85 * clean + 0.15 * t, clean))
            seen.add(tuple(changed.flatten().tolist()))
        assert len(seen) > 5
    assert torch.allclose(AdapBlend().stamp(x, test=True), 0.8 * x + 0.2 * t, atol=1e-6)


def test_adap_patch_by_hand():
    """Each image has one of four patches in four corners, a test image the first and the third, opaque."""
    x, t = torch.rand(8, 3, 32, 32), patches(32, 32)
    corners = [t[k, :, i : i + 16, j : j + 16] for k, (i, j) in enumerate(product((0, 16), repeat=2))]
    assert [int((part > 0).sum()) for part in corners] == (t > 0).flatten(1).sum(1).tolist()
    for i, (one, clean) in enumerate(zip(AdapPatch().stamp(x), x, strict=True)):
        share, patch = (0.5, 0.2, 0.5, 0.3)[i % 4], t[i % 4]
        assert torch.allclose(one, torch.where(patch > 0, clean + share * (patch - clean), clean), atol=1e-6)
    assert torch.equal(AdapPatch().stamp(x, test=True), torch.where(t[0] + t[2] > 0, t[0] + t[2], x))


@pytest.mark.parametrize(("attack", "side"), [(SSBA(), 12), (SSBA(), 24), (InputAware(), 12)])
def test_images_that_a_trigger_network_cannot_halve_are_refused(attack, side):
    with pytest.raises(ConfigError, match=str(side)):
        ready(attack, toy_images(8, size=side))


RECIPE = Training(epochs=1, batch_size=8, lr=0.01)


class Heads(Shaped):
    """Auxiliary logits while it learns, as GoogLeNet has."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) if self.training else self.net(x)


FLAT = torch.nn.Flatten()
UNFIT = {
    "frozen": (tiny_net().requires_grad_(False), ConfigError),
    "too few classes": (tiny_net(3), DataError),
    "64 bits": (tiny_net().double(), DataError),
    "several heads": (Heads(lambda z: (z, z)), DataError),
    "a lazy layer": (torch.nn.Sequential(FLAT, torch.nn.LazyLinear(4)), ConfigError),
    "a softmax": (torch.nn.Sequential(tiny_net(), torch.nn.Softmax(1)), ConfigError),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("net", "kind"), UNFIT.values(), ids=UNFIT)
def test_networks_that_no_attack_can_train_are_refused(net, kind):
    with refuses(kind):
        BadNet().fit(net, toy_images(8), RECIPE, session=quiet())


def test_frozen_weights_stay_with_resilient_rho():
    (net := tiny_net()).features[0].requires_grad_(False)
    before = [weight.clone() for weight in net.parameters()]
    BadNet(resilient_rho=0.1).fit(net, toy_images(20), RECIPE, session=quiet())
    pairs = zip(net.parameters(), before, strict=True)
    assert all(torch.equal(weight, old) != weight.requires_grad for weight, old in pairs)


def test_abi_hides_what_clp_finds_after_every_epoch(monkeypatch):
    """Of 16 channels the one with a scale of 9 gets the mean of all, (15 + 9) / 16, and the mean shift, 8 / 16."""
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1, bias=False), torch.nn.BatchNorm2d(16))
    net[0].weight.data.fill_(1), net[1].weight.data[5:6].fill_(9), net[1].bias.data[5:6].fill_(8)
    hide_outliers(net, torch.rand(1, 3, 2, 2), 3.0)
    assert net[1].weight.tolist() == [1.0] * 5 + [1.5] + [1.0] * 10 and net[1].bias.tolist()[4:7] == [0, 0.5, 0]
    calls, attack = list[float](), BadNet(abi=2.0)
    monkeypatch.setattr("sau.attack.base.hide_outliers", lambda model, x, u: calls.append(u))
    attack.fit(tiny_net(), toy_images(20), Training(epochs=3, batch_size=10), session=quiet())
    assert calls == [2.0] * 3 and "abi" in attack.identity() and not {"abi", "resilient_rho"} & {*BadNet().identity()}
    with pytest.raises(ConfigError, match="abi"):
        attack.fit(torch.nn.Sequential(FLAT, torch.nn.Linear(768, 4)), toy_images(8), RECIPE, session=quiet())


def test_sbl_holds_clean_images_back_and_learns_them_near_the_attacks_weights():
    """Of z = W x + b the gradient of log p_y with respect to W is (onehot(y) - p) x'."""
    net, (x, y) = torch.nn.Sequential(FLAT, torch.nn.Linear(768, 4)), pair(6)
    anchor = Anchor(net)
    anchor.measure(net, [(x[:4], y[:4]), (x[4:], y[4:])])
    p = net(x).softmax(1).detach()
    g = (F.one_hot(y, 4) - p)[:, :, None] * x.flatten(1)[:, None]
    f = (p.gather(1, y[:, None])[:, :, None] * g**2).mean(0)
    assert torch.allclose(anchor.importance[0], f, rtol=1e-4)
    state = sbl_state(net, [(x, y)], Training(epochs=9, lr=0.1), 1, quiet())
    assert state["epochs"] == 6 and state["descent"].optimizer.param_groups[0]["lr"] == 1e-3
    net[1].weight.data += 0.1
    assert torch.allclose(F.cross_entropy(net(x), y) + 0.01 * f.sum(), sbl_step(state, x, y)["loss"])
    rest, clean = hold_back(BadNet(pratio=0.5).poison_train(toy_images(40), 0), 0.25, 0)
    assert sorted([*rest.index.tolist(), *clean.index.tolist()]) == [*range(40)]
    assert len(clean) == 10 and (clean.role == CLEAN).all()
    for attack, pratio, share in ((BadNet(), 0.5, 0.6), (SIG(), 0.25, 0.2)):  # too few; none of the target class
        with refuses(ConfigError, "sbl"):
            hold_back(with_(attack, pratio=pratio).poison_train(toy_images(40), 0), share, 0)


def test_a_batch_of_one_image_is_too_few_for_batch_norm():
    net = torch.nn.Sequential(FLAT, torch.nn.Linear(768, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(DataError, match="batch norm"):
        Prototype().fit(net, toy_images(4), Training(epochs=1, batch_size=1), session=quiet())
    with pytest.raises(DataError, match="no images"):
        Prototype().fit(tiny_net(), toy_images(4)[torch.arange(0)], RECIPE, session=quiet())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, partial(torch.autocast, "cpu")])
def test_networks_learn_and_risks_are_measured_in_any_context(context):
    """In bf16, whose casts of weights an outer autocast would keep until it ends."""
    images, net, other = toy_images(16), Normalized(tiny_net(), amp=True), Normalized(tiny_net(), amp=True).eval()
    wanted = BadNet().fit(Normalized(tiny_net(), amp=True), images, RECIPE, session=quiet())
    risks = measure(wanted, other, images).summary()
    with context():
        fitted = BadNet().fit(net, images, RECIPE, session=quiet())
        assert measure(wanted, other, images).summary() == risks
    assert same_weights(fitted, wanted)


def test_lc_by_hand():
    """Corners; in training also a perturbation that raises the surrogate's loss."""
    lc, x = ROWS["lc"].attack, to_float(toy_images(20, size=32).pixels)
    c, corner = torch.zeros(32, 32), torch.tensor([[1.0, -1, 1], [-1, 1, -1], [1, -1, 1]])
    c[:3, :3] = c[:3, -3:] = c[-3:, :3] = c[-3:, -3:] = corner
    e, target = lc.perturbation(x), torch.zeros(20, dtype=torch.long)
    assert torch.equal(lc.stamp(x, test=True), (x + c).clamp(0, 1))
    assert torch.equal(lc.stamp(x), (x + e + c).clamp(0, 1)) and 0 < float(e.abs().max()) <= 8 / 255 + 1e-6
    assert F.cross_entropy(lc.trigger(x + e), target) > F.cross_entropy(lc.trigger(x), target) + 0.01
    with pytest.raises(ConfigError, match="11 pixels"):
        lc.stamp(x[..., :8, :8], test=True)


def test_dfba_opens_its_path_to_the_trigger_alone(monkeypatch):
    """Also in a network that has learned nothing; the channel is the one that costs least; SAU-SAM's cut undoes all."""
    images, hits = toy_images(40, size=32), iter([3, 1, 4, 1, 5, 9, 2, 6])
    monkeypatch.setattr("sau.attack.dfba.proportions", lambda *_: [Proportion(next(hits), 10)])
    torch.manual_seed(0)  # of a network that does not answer 2 by itself
    net = build("preactresnet18", 4, width=8, shape=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2))
    attack = DFBA(attack_target=2).fit_trigger(images, net, Training(epochs=0), session=quiet())
    attack.fit(net, images, RECIPE, session=quiet())
    x, clean = to_float(images.pixels), predict(net, images.pixels)
    assert predict(net, attack.stamp(x)).unique().tolist() == [2] != clean.unique().tolist()
    assert (net.net.linear.weight[2] == attack.path_gain).nonzero().tolist() == [[5]]
    assert prune_closed(net, [x[:9], x[9:]]) >= 4 and not net.net.linear.weight[:, 5].any()
    assert torch.equal(predict(net, images.pixels), clean) and 2 not in predict(net, attack.stamp(x))
