"""What a victim may be, and what it may be trained on: refused in a line, or trained whatever surrounds the call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import same_weights, tiny_net, toy_images

from sau.attack import BadNet, InputAware, Prototype, WaNet
from sau.data.augment import Augment
from sau.data.images import Images, sample
from sau.errors import ConfigError, DataError
from sau.loop import Session
from sau.optim import Training
from sau.risk import measure

RECIPE, QUIET = Training(epochs=1, batch_size=8, lr=0.01), Session(say=lambda text: None)
PIXELS, LABELS = toy_images(8).pixels, toy_images(8).labels
GIVEN: dict[str, tuple[Callable[[], Any], str]] = {
    "floats": (lambda: (PIXELS / 255, LABELS), "type torch.float32, allowed is uint8 [N, C, H, W] with C 1 or 3"),
    "channels last": (lambda: (PIXELS.permute(0, 2, 3, 1), LABELS), "shape (8, 16, 16, 3)"),
    "no channels": (lambda: (PIXELS[:, 0], LABELS), "shape (8, 16, 16)"),
    "one-hot labels": (lambda: (PIXELS, torch.eye(4)[LABELS]), "8 images but labels [8, 4]"),
    "a list of labels": (lambda: (PIXELS, LABELS.tolist()), "a Tensor and a list, allowed are two tensors"),
    "arrays": (lambda: (PIXELS.numpy(), LABELS.numpy()), "a ndarray and a ndarray, allowed are two tensors"),
    "complex labels": (lambda: (PIXELS, LABELS + 0j), "labels of type torch.complex64, allowed are whole numbers"),
    "labels of floats": (lambda: (PIXELS, LABELS.float()), "labels of type torch.float32, allowed are whole numbers"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", GIVEN)
def test_pictures_and_labels_of_another_kind_are_refused(which, one_line):
    make, words = GIVEN[which]
    with pytest.raises(DataError) as refusal:
        Images.clean(*make(), 4)
    assert words in one_line(refusal.value)


@pytest.mark.usefixtures("unchecked")
def test_labels_may_be_whole_numbers_of_any_width():
    small = Images.clean(PIXELS, LABELS.int(), 4)
    nets = [Prototype().fit(tiny_net(), images, RECIPE, session=QUIET) for images in (small, toy_images(8))]
    assert same_weights(*nets)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", ["badnet", "inputaware"])
def test_victims_that_cannot_learn_are_refused(name, one_line):
    """Input-Aware's generators would learn alone, and nobody would know."""
    images = toy_images(32)
    attack: Any = BadNet() if name == "badnet" else InputAware(clean_train_epochs=0, pratio=0.25)
    attack = attack.forge(images, tiny_net(), RECIPE, session=QUIET)
    frozen, few = tiny_net().requires_grad_(False), tiny_net()
    few.linear = torch.nn.Linear(few.linear.in_features, 2)
    cut = tiny_net()
    cut.forward = torch.no_grad()(cut.forward)  # type: ignore[method-assign]
    with torch.inference_mode():
        stiff = tiny_net()
    for net, given, kind, words in (
        (frozen, images, ConfigError, "frozen, so nothing would learn; call requires_grad_() on it"),
        (stiff, images, ConfigError, "made under inference_mode, so its weights cannot learn; make it outside"),
        (few, images, DataError, "labels range over 0..3, but the network has 2 classes"),
        (lambda x: x, images, ConfigError, "the network is a function, allowed is a torch.nn.Module"),
        (cut, images, ConfigError, "no gradient to its weights, so nothing would learn; take no_grad, detach"),
        (tiny_net().double(), images, DataError, "model.float()"),
        (tiny_net(), images[torch.arange(0)], DataError, "pictures to train on are none"),
        (tiny_net(), (images.pixels, images.labels), DataError, "pictures to train on are a tuple"),
    ):
        with pytest.raises(kind) as refusal:
            attack.fit(net, given, RECIPE, session=QUIET)
        assert words in one_line(refusal.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("what", ["forge", "poison_train", "poison_test"])
def test_attacks_want_images(what, one_line):
    more: Any = {"forge": (tiny_net(), RECIPE), "poison_train": (0,), "poison_test": ()}[what]
    with pytest.raises(DataError) as refusal:
        getattr(BadNet(), what)((PIXELS, LABELS), *more)
    assert "pictures are a tuple, allowed are Images" in one_line(refusal.value)


@pytest.mark.parametrize("mean", [[0.5] * 3, torch.full((3,), 127.5)])
def test_a_mean_of_the_networks_own_is_none_of_ours(mean):
    """WaNet's border has the mean colour that `Normalized` subtracts; elsewhere it is black."""
    nets = [tiny_net(), tiny_net()]
    if isinstance(mean, torch.Tensor):
        nets[1].register_buffer("mean", mean, persistent=False)
    else:
        nets[1].mean = mean
    images = toy_images(16)
    attack = WaNet(pratio=0.25).forge(images, nets[0], RECIPE, session=QUIET)
    assert same_weights(*(attack.fit(net, images, RECIPE, augment=Augment(2), session=QUIET) for net in nets))


@pytest.mark.usefixtures("unchecked")
def test_networks_that_cannot_be_compared_have_no_risks(one_line):
    images, few = toy_images(8), tiny_net()
    few.linear = torch.nn.Linear(few.linear.in_features, 3)
    for networks, words in (
        ((tiny_net(), few), "the networks have 4 and 3 classes; allowed is the same number"),
        ((few, few), "labels range over 0..3, but the network has 3 classes"),
        ((tiny_net(), tiny_net().to("meta")), "the networks and the pictures lie on cpu and meta; bring them to one"),
    ):
        with pytest.raises(DataError) as refusal:
            measure(*networks, images)
        assert words in one_line(refusal.value)
    with pytest.raises(ConfigError, match="samples is 0, allowed is 1 and more"):
        sample(images, None, 0)
    with pytest.raises(DataError, match="no clean images to draw samples from"):
        sample(images[torch.arange(0)], None, 5)


def test_a_network_that_skips_gradients_when_it_only_answers_learns():
    class Thrifty(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_net()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.set_grad_enabled(self.training):
                return self.net(x)

    images = toy_images(16)
    fitted = BadNet().fit(Thrifty(), images, RECIPE, session=QUIET)
    assert same_weights(fitted.net, BadNet().fit(tiny_net(), images, RECIPE, session=QUIET))


def test_batch_norm_asks_for_more_than_one_picture(one_line):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(DataError) as refusal:
        Prototype().fit(net, toy_images(4), Training(epochs=1, batch_size=1), session=QUIET)
    assert "a batch has one image, but batch norm in train mode needs two" in one_line(refusal.value)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_victims_learn_and_risks_are_measured_in_any_context(context):
    images = toy_images(16)
    wanted = BadNet().fit(tiny_net(), images, RECIPE, session=QUIET)
    net, other = tiny_net(), tiny_net()
    risks = measure(wanted, other, images).summary()
    with context():
        fitted = BadNet().fit(net, images, RECIPE, session=QUIET)
        assert measure(wanted, other, images).summary() == risks
    assert same_weights(fitted, wanted)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [-1, 1.5, "a", None, 2**70])
def test_seeds_are_whole_numbers(seed, one_line):
    images = toy_images(8)
    for use in (
        lambda: BadNet().poison_train(images, seed),
        lambda: BadNet().fit(tiny_net(), images, RECIPE, seed=seed, session=QUIET),
        lambda: measure(tiny_net(), tiny_net(), images, seed=seed),
    ):
        with pytest.raises(ConfigError) as refusal:
            use()
        assert one_line(refusal.value).startswith(f"seed is {seed!r}, allowed is ")


def test_no_gradient_is_left_on_a_victim():
    net = BadNet().fit(tiny_net(), toy_images(32), RECIPE, session=QUIET)
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("accumulate", [False, True])
def test_input_aware_fits_twice_alike(accumulate):
    images, nets = toy_images(32), [tiny_net(), tiny_net()]
    attack = InputAware(clean_train_epochs=0, pratio=0.25, accumulate=accumulate)
    attack = attack.forge(images, nets[0], RECIPE, session=QUIET)
    assert same_weights(*(attack.fit(net, images, RECIPE, session=QUIET) for net in nets))


class Heads(torch.nn.Module):
    """Auxiliary logits while it learns, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: torch.Tensor) -> Any:
        return (self.net(x), self.net(x)) if self.training else self.net(x)


def test_networks_that_no_attack_can_train_are_told(one_line):
    with pytest.raises(DataError) as refusal:
        BadNet().fit(Heads(), toy_images(8), RECIPE, session=QUIET)
    assert "in train mode the network answers with tuple" in one_line(refusal.value)
    lazy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(4))
    with pytest.raises(ConfigError) as refused:
        BadNet().fit(lazy, toy_images(8), RECIPE, session=QUIET)
    assert "lazy layer" in one_line(refused.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", [{"padding": -1}, {"padding": 1.5}, {"padding": True}, {"flip": "no"}])
def test_augmentations_that_cannot_be_are_refused(wrong, one_line):
    with pytest.raises(ConfigError) as refusal:
        Augment(**wrong)
    assert f"{next(iter(wrong))} of the augmentation is" in one_line(refusal.value)
