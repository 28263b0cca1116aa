"""How victims are trained fast: small pictures first, and recipes that say so."""

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer
from toys import QUICK, TinyNet, quiet, tiny_net, toy_images

from sau.attack import BadNet, WaNet
from sau.attack.recipe import Recipe
from sau.command.request import Request
from sau.data.augment import Augment
from sau.data.images import shrunk, to_float
from sau.defense import SAU
from sau.errors import ConfigError, DataError
from sau.models import Normalized
from sau.optim import Training
from sau.settings.config import options
from sau.settings.run import AttackRun, DefenseRun


def settled(*flags: str, dataset: str = "cifar10", method: type = BadNet) -> tuple:
    request = Request("x", method, (AttackRun, Recipe, method), [*flags, "--device", "cpu"])
    return request.recipe(), *request.settle(request.recipe()[0], dataset)


def test_pictures_grow_from_epoch_to_epoch():
    """16 pixels: a half, three quarters, then whole for good; whole ones are the bits that they were."""
    images = toy_images(8)
    growing, plain = images.batches(4, seed=1, sides=(0.5, 0.75, 1.0)), images.batches(4, seed=1)
    for epoch, side in enumerate((8, 12, 16, 16)):
        for batches in (growing, plain):
            batches.set_epoch(epoch)
        for (x, y, _), (whole, labels, _) in zip(growing, plain, strict=True):
            assert x.shape[2:] == (side, side) and torch.equal(y, labels)
            assert torch.equal(x, whole if side == 16 else shrunk(whole, side / 16))


def test_a_small_pixel_is_an_average():
    x = torch.zeros(1, 1, 8, 8)
    x[..., ::2] = 1  # stripes of one pixel
    assert torch.allclose(shrunk(x, 0.5)[..., 1:-1], torch.tensor(0.5), atol=0.1)
    assert (
        shrunk(torch.ones(1, 3, 9, 5), 0.5).shape == (1, 3, 4, 2) and shrunk(torch.ones(1, 3, 1, 1), 0.1).shape[2] == 1
    )


def test_a_small_pixel_is_an_average_of_all_that_it_stands_for():
    """A stripe in four is a quarter, wherever it begins; seven pixels by half are four."""
    for first in range(4):
        x = torch.zeros(1, 1, 16, 16)
        x[..., first::4] = 1
        assert torch.allclose(shrunk(x, 0.25)[..., 1:-1], torch.tensor(0.25))
    assert shrunk(torch.ones(1, 3, 7, 16), 0.5).shape == (1, 3, 4, 8)


def test_a_victim_sees_pictures_of_these_sizes():
    seen: list[int] = []
    net = tiny_net().train()
    net.features[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    recipe = Recipe(epochs=3, batch_size=40, lr=0.05, sides=(0.5, 1.0))
    BadNet().fit(net, toy_images(80), recipe, session=quiet())
    assert seen[2:] == [8, 8, 16, 16, 16, 16]  # the first two ask whether the network takes whole ones, and 8x8


@pytest.mark.parametrize("attack", [BadNet(), WaNet(pratio=0.0)], ids=lambda attack: attack.name)
@pytest.mark.parametrize("unaugmented", [True, False])
def test_a_victim_sees_pictures_as_they_are_if_its_recipe_says_so(attack, unaugmented):
    """Whatever the caller offers; else every picture is a crop, at a place of its own, of attacks in the batch, too."""
    images, net, seen = toy_images(64), tiny_net().train(), []
    recipe = Recipe(epochs=4, batch_size=32, lr=0.05, unaugmented=unaugmented)
    attack = attack.forge(images, net, recipe)
    net.features[0].register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0]) if module.training else None
    )
    attack.fit(net, images, recipe, augment=Augment(4), session=quiet())
    known = {tuple(pixels.flatten().tolist()) for pixels in images.pixels}
    met = {tuple((255 * x).round().flatten().tolist()) for x in torch.cat(seen)}
    assert (met == known) is unaugmented


def test_triggers_are_made_with_the_augmentation_of_the_victim():
    """A network that a trigger is searched on is trained like the victim."""
    seen = []

    class Maker(BadNet):
        def make_trigger(self, given):
            seen.append(given.augment)

    for recipe in (Recipe(), Recipe(unaugmented=True), Training()):
        Maker().forge(toy_images(8), tiny_net(), recipe, augment=Augment(4))
    assert seen == [Augment(4), None, Augment(4)]


def test_small_pictures_count_by_their_pixels():
    """A quarter, nine sixteenths, and whole for good."""
    growing = Recipe(sides=(0.5, 0.75, 1.0))
    assert [growing.whole(epochs) for epochs in (0, 1, 2, 3, 4)] == [0, 0.25, 0.8125, 1.8125, 2.8125]
    assert Recipe().whole(3) == 3


def test_another_error_than_the_size_keeps_its_own_words(unchecked, one_line):
    """A network that answers with several things takes small pictures as well as large ones."""

    class Several(TinyNet):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(DataError) as refusal:
        BadNet().forge(toy_images(8), Normalized(Several()), Recipe(sides=(0.5, 1.0)), session=quiet())
    assert "the network answers with tuple, allowed are logits" in one_line(refusal.value)


def test_a_recipe_without_what_came_later_is_what_it_was():
    """The digests of results contain the settings, so a setting that came later is left out where it does nothing."""
    still = Recipe(epochs=0, wd=0.0)
    assert still.params() == Training(epochs=0, wd=0.0).params() and "epochs" in still.params()
    assert Recipe(sides=(0.5, 1.0)).params() == {**Training().params(), "sides": (0.5, 1.0)}
    assert Recipe(unaugmented=True).params() == {**Training().params(), "unaugmented": True}
    assert set(options(Recipe)) == {*options(Training), "sides", "unaugmented"}


@pytest.mark.parametrize("sides", [(0.0,), (0.5, 1.5), (-1.0,)])
def test_sides_are_shares(sides, one_line):
    with pytest.raises(ConfigError) as refusal:
        Recipe(sides=sides)
    assert "sides" in one_line(refusal.value)


def test_sides_that_cannot_be_are_refused(one_line):
    """By an attack inside the batches, and by a network that takes no such pictures."""
    images, recipe = toy_images(8), Recipe(epochs=1, sides=(0.5, 1.0))
    with pytest.raises(ConfigError) as refusal:
        WaNet().forge(images, tiny_net(), recipe).fit(tiny_net(), images, recipe, session=quiet())
    assert "inside the batches" in one_line(refusal.value)
    blank = tiny_net().train()
    BadNet().forge(images, blank, recipe)
    assert blank.training  # whoever asked is left with the network as it was
    with pytest.raises(ConfigError) as refusal:
        BadNet().fit(nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), images, recipe, session=quiet())
    assert "8x8" in one_line(refusal.value)
    with pytest.raises(ConfigError) as refusal:
        BadNet().fit(VisionTransformer(16, 4, 1, 1, 8, 8, num_classes=4), images, recipe, session=quiet())
    assert "8x8: Wrong image height" in one_line(refusal.value)


def test_fast_depends_on_the_device_and_is_for_attacks_beforehand():
    (recipe, why), run, training, _ = settled("--recipe", "fast")
    assert (recipe, run.recipe, run.width) == ("fast_cpu", "fast_cpu", 16) and "without CUDA" in why
    assert training.sides and training.unaugmented and training.epochs < settled("--recipe", "cpu")[2].epochs
    for whole in ("cpu", "paper"):
        assert settled("--recipe", whole)[2].sides == () and not settled("--recipe", whole)[2].unaugmented
    (recipe, why), _, training, _ = settled("--recipe", "fast", method=WaNet)
    assert recipe == "cpu" and "poisoned beforehand" in why and training.sides == ()


@pytest.mark.parametrize(("recorded", "full"), [("fast_cpu", "cpu"), ("fast", "paper"), ("cpu", "cpu")])
def test_a_defense_takes_the_whole_recipe(recorded, full):
    assert Request("x", SAU, (DefenseRun, SAU), []).recipe(recorded)[0] == full
    assert Request("x", SAU, (DefenseRun, SAU), ["--recipe", "fast", "--device", "cpu"]).recipe("paper")[0] == "cpu"


def test_data_sets_without_a_fast_recipe_say_so(refused):
    line = refused("attack", "badnet", "--dataset", "digits", "--recipe", "fast", *QUICK)
    assert "fast_cpu" in line and "digits" in line and "allowed is cpu" in line


def test_the_probe_leaves_no_trace():
    """Whether a network takes small pictures is asked in eval mode: its statistics stay what they were."""
    net, images = tiny_net(), toy_images(8)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    BadNet().fit(net, images, Recipe(epochs=0, sides=(0.5, 1.0)), session=quiet())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert to_float(images.pixels).shape[-1] == 16
