"""Attacks: what holds for every one of them, by table, and the triggers of each, by numbers."""

import inspect
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from toys import REPOSITORY, quiet, same_weights, tiny_net, toy_images, train_victim

from sau.attack import ATTACKS, Attack, BadNet, Blended, Prototype
from sau.config import options
from sau.data.images import BACKDOOR, CLEAN, Images, quantise, to_float
from sau.errors import ConfigError, DataError
from sau.evaluate import score
from sau.optim import Training


@dataclass(frozen=True)
class Row:
    """A method and what it promises."""

    attack: Attack
    poisons: bool = True  # whether it changes anything at all


ROWS = {"badnet": Row(BadNet()), "blended": Row(Blended()), "prototype": Row(Prototype(), poisons=False)}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
each_poison = pytest.mark.parametrize(
    "attack", [row.attack for row in ROWS.values() if row.poisons], ids=[n for n, row in ROWS.items() if row.poisons]
)


def with_(attack: Attack, **changes) -> Attack:
    return type(attack)(**{**attack.params(), **changes})


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
@pytest.mark.parametrize("side", [12, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_stamp_keeps_shape_range_and_type_and_its_argument(row, side, dtype):
    x = torch.rand(3, 3, side, side, dtype=dtype, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    for test in (False, True):
        stamped = row.attack.stamp(x, test=test)
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


@each_poison
@pytest.mark.parametrize("pratio", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_the_training_set_is_poisoned_where_it_says_and_nowhere_else(attack, pratio):
    """80 pictures: round(0.03 * 80) = 2, and so on; the target class is not spared."""
    images = toy_images(80)
    before = {name: tensor.clone() for name, tensor in images.tensors().items()}
    poisoned = with_(attack, pratio=pratio, attack_target=2).poison_train(images, seed=0)
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == round(pratio * 80) and (poisoned.role[~hit] == CLEAN).all()
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


@each_poison
def test_the_benchmarks_indices_in_its_order(attack):
    """attacks.md 0.3: N = 50,000 and seed 0 begin 11841, 19602, ...; k pictures are the first k of that draw."""
    images = Images.clean(torch.zeros(50_000, 3, 2, 2, dtype=torch.uint8), torch.ones(50_000, dtype=torch.long), 10)
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
    images = toy_images(30, classes=7, size=12)
    triggered = with_(attack, attack_target=3).poison_test(images)
    kept = (images.labels != 3).nonzero().flatten()
    assert triggered.index.tolist() == kept.tolist() and len(triggered) == 26
    assert (triggered.labels == 3).all() and torch.equal(triggered.true_labels, images.labels[kept])
    assert (triggered.role == BACKDOOR).all() and triggered.num_classes == 7
    assert torch.equal(triggered.pixels, quantise(attack.stamp(to_float(images.pixels[kept]), test=True)))


@each_poison
@pytest.mark.parametrize("shift", [1, 3])
def test_all2all_shifts_every_label(attack, shift):
    images = toy_images(40, classes=7)
    shifted = with_(attack, attack_label_trans="all2all", attack_label_shift_amount=shift, pratio=0.5)
    poisoned, triggered = shifted.poison_train(images, 0), shifted.poison_test(images)
    hit = poisoned.role == BACKDOOR
    assert int(hit.sum()) == 20 and torch.equal(poisoned.labels[hit], (images.labels[hit] + shift) % 7)
    assert torch.equal(poisoned.labels[~hit], images.labels[~hit])
    assert triggered.index.tolist() == list(range(40))
    assert torch.equal(triggered.labels, (images.labels + shift) % 7)
    assert torch.equal(triggered.true_labels, images.labels)


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


@each_poison
@pytest.mark.parametrize("pratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(attack, pratio, one_line):
    with pytest.raises(ConfigError) as refusal:
        with_(attack, pratio=pratio)
    assert "pratio" in one_line(refusal.value) and "0 to 1" in str(refusal.value)


# Training


@each_row
def test_fit_trains_in_place_reproducibly_and_ends_in_eval_mode(row):
    images = row.attack.poison_train(toy_images(30, classes=7, size=12), 0)
    recipe = Training(epochs=2, batch_size=8)
    nets = [tiny_net(7), tiny_net(7), tiny_net(7)]
    for net, seed in zip(nets, (0, 0, 1), strict=True):
        assert row.attack.fit(net, images, recipe, seed=seed, session=quiet()) is net and not net.training
    assert same_weights(nets[0], nets[1]) and not same_weights(nets[0], nets[2])
    assert not same_weights(nets[0], tiny_net(7))


def test_an_incomplete_last_batch_is_dropped():
    """30 pictures in batches of 8: three updates an epoch, as the benchmark trains its victims."""
    sizes = []

    class Watched(BadNet):
        def step(self, state, x, y):
            sizes.append(len(x))
            return super().step(state, x, y)

    Watched().fit(tiny_net(), toy_images(30), Training(epochs=2, batch_size=8), session=quiet())
    assert sizes == [8] * 6


@each_poison
def test_the_claim_on_a_toy(attack):
    """Poisoned training plants the backdoor and keeps the accuracy; clean training does not plant it."""
    train, test = toy_images(400, size=32, seed=1), toy_images(200, size=32, seed=2)
    triggered = attack.poison_test(test)
    clean = score(train_victim(Prototype(), train), test, triggered)
    attacked = score(train_victim(attack, train), test, triggered)
    assert clean.acc.percent > 90 and attacked.acc.percent > clean.acc.percent - 5
    assert attacked.asr.percent > 80 and clean.asr.percent < 50


# BadNets


def changed_by_badnet(side: int) -> torch.Tensor:
    """[side, side] grey levels where the patch is, -1 elsewhere."""
    x = torch.full((1, 3, side, side), 100, dtype=torch.uint8)
    stamped = quantise(BadNet().stamp(to_float(x)))[0]
    assert torch.equal(stamped[0], stamped[1]) and torch.equal(stamped[0], stamped[2])
    return torch.where(stamped[0] == 100, -1, stamped[0].long())


def test_badnets_patch_at_32():
    """A white square in rows and columns 29 to 31."""
    expected = torch.full((32, 32), -1)
    expected[29:32, 29:32] = 255
    assert torch.equal(changed_by_badnet(32), expected)


def test_badnets_patch_at_64_has_a_soft_border():
    """attacks.md 1.1: a block of 5x5, and two rows and columns that the resizing made grey."""
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


def test_blended_changes_at_most_a_fifth():
    x = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    change = quantise(Blended().stamp(to_float(x))).long() - x.long()
    assert int(change.abs().max()) <= 51


def test_blended_brings_its_own_picture():
    """Light ground and strong contrast, like the benchmark's: mean near 200, deviation near 69 (attacks.md 1.2)."""
    seen = (Blended(attack_train_blended_alpha=1.0).stamp(torch.zeros(1, 3, 32, 32)) * 255)[0]
    assert 170 < float(seen.mean()) < 230 and 50 < float(seen.std()) < 90
    assert (seen.amax(0) - seen.amin(0)).max() > 100  # a strong colour


@pytest.mark.parametrize("name", ["attack_train_blended_alpha", "attack_test_blended_alpha"])
@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_an_alpha_outside_0_to_1_is_refused(name, alpha, one_line):
    with pytest.raises(ConfigError) as refusal:
        Blended(**{name: alpha})
    assert name in one_line(refusal.value)


@pytest.mark.parametrize(("attack", "flag"), [(BadNet, "patch_mask_path"), (Blended, "attack_trigger_img_path")])
def test_a_trigger_picture_that_cannot_be_used_is_refused(attack, flag, tmp_path, one_line):
    (tmp_path / "notes.png").write_text("not a picture")
    for path in (tmp_path / "notes.png", tmp_path / "missing.png"):
        with pytest.raises(DataError) as refusal:
            attack(**{flag: str(path)}).poison_train(toy_images(20), 0)
        assert str(path) in one_line(refusal.value)
