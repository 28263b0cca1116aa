"""What a network to attack may be, and what it may be trained on: refused in a line, or trained in any context."""

import pytest
import torch
from toys import refuses, same_weights, tiny_net, toy_images

from sau.attack import BadNet, Prototype, WaNet
from sau.data.images import Augment, Images, sample
from sau.errors import ConfigError, DataError
from sau.loop import RunContext
from sau.optim import Training
from sau.risk import measure

RECIPE, QUIET = Training(epochs=1, batch_size=8, lr=0.01), RunContext(say=lambda text: None)
PIXELS, LABELS = toy_images(8).pixels, toy_images(8).labels


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("pixels", "labels", "word"),
    [
        (PIXELS / 255, LABELS, "torch.float32"),
        (PIXELS.permute(0, 2, 3, 1), LABELS, "8, 16, 16, 3"),
        (PIXELS, torch.eye(4)[LABELS], "8, 4"),
        (PIXELS, LABELS.float(), "torch.float32"),
    ],
)
def test_images_and_labels_of_another_kind_are_refused(pixels, labels, word):
    with pytest.raises(DataError, match=word):
        Images.clean(pixels, labels, 4)


def test_labels_may_be_whole_numbers_of_any_width():
    small = Images.clean(PIXELS, LABELS.int(), 4)
    assert same_weights(*(Prototype().fit(tiny_net(), i, RECIPE, session=QUIET) for i in (small, toy_images(8))))


class Heads(torch.nn.Module):
    """Auxiliary logits while it learns, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return (self.net(x), self.net(x)) if self.training else self.net(x)


FLAT = torch.nn.Flatten()
UNFIT = {
    "frozen": (tiny_net().requires_grad_(False), ConfigError),
    "too few classes": (tiny_net(3), DataError),
    "64 bits": (tiny_net().double(), DataError),
    "several heads": (Heads(), DataError),
    "a lazy layer": (torch.nn.Sequential(FLAT, torch.nn.LazyLinear(4)), ConfigError),
    "a softmax": (torch.nn.Sequential(tiny_net(), torch.nn.Softmax(1)), ConfigError),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("net", "kind"), UNFIT.values(), ids=UNFIT)
def test_networks_that_no_attack_can_train_are_refused(net, kind):
    with refuses(kind):
        BadNet().fit(net, toy_images(8), RECIPE, session=QUIET)


def test_a_batch_of_one_image_is_too_few_for_batch_norm():
    net = torch.nn.Sequential(FLAT, torch.nn.Linear(768, 4), torch.nn.BatchNorm1d(4))
    with pytest.raises(DataError, match="batch norm"):
        Prototype().fit(net, toy_images(4), Training(epochs=1, batch_size=1), session=QUIET)
    with pytest.raises(DataError, match="no images"):
        Prototype().fit(tiny_net(), toy_images(4)[torch.arange(0)], RECIPE, session=QUIET)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_networks_learn_and_risks_are_measured_in_any_context(context):
    images, net, other = toy_images(16), tiny_net(), tiny_net()
    wanted = BadNet().fit(tiny_net(), images, RECIPE, session=QUIET)
    risks = measure(wanted, other, images).summary()
    with context():
        fitted = BadNet().fit(net, images, RECIPE, session=QUIET)
        assert measure(wanted, other, images).summary() == risks
    assert same_weights(fitted, wanted)


@pytest.mark.parametrize("mean", [[0.5] * 3, torch.full((3,), 127.5)])
def test_a_mean_of_the_networks_own_is_none_of_ours(mean):
    """WaNet's border has the mean colour that `Normalized` subtracts; elsewhere it is black."""
    nets = [tiny_net(), tiny_net()]
    if isinstance(mean, torch.Tensor):
        nets[1].register_buffer("mean", mean, persistent=False)
    else:
        nets[1].mean = mean
    images = toy_images(16)
    attack = WaNet(pratio=0.25).fit_trigger(images, nets[0], RECIPE, session=QUIET)
    assert same_weights(*(attack.fit(net, images, RECIPE, augment=Augment(2), session=QUIET) for net in nets))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("seed", [-1, 1.5, None, 2**70])
def test_seeds_are_whole_numbers(seed):
    images = toy_images(8)
    for use in (
        lambda: BadNet().poison_train(images, seed),
        lambda: BadNet().fit(tiny_net(), images, RECIPE, seed=seed, session=QUIET),
        lambda: measure(tiny_net(), tiny_net(), images, seed=seed),
    ):
        with pytest.raises(ConfigError, match="seed is"):
            use()


@pytest.mark.usefixtures("unchecked")
def test_networks_that_cannot_be_compared_have_no_risks():
    images = toy_images(8)
    for other, word in ((tiny_net(3), "4 and 3 classes"), (tiny_net().to("meta"), "device meta")):
        with pytest.raises(DataError, match=word):
            measure(tiny_net(), other, images)
    with pytest.raises(ConfigError, match="samples is 0"):
        sample(images, None, 0)
