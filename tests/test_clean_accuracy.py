"""A network that is used otherwise than it was trained is told by its clean images; one that is used well is not."""

import re

import pytest
import torch
from defense_rows import ROWS
from toys import pair, quiet, same_weights, tiny_net, toy_images

from sau.attack import BadNet
from sau.data.images import Augment
from sau.defense import EP, FT
from sau.defense.base import Defense
from sau.loop import Session
from sau.models import Normalized


class Shades(torch.nn.Sequential):
    """It is right about images of one shade: class k has the mean (k + 1) / (classes + 1) in each of its channels.

    Argument `shift`, `scale`: the images come as (x - shift) / scale.
    """

    def __init__(self, classes: int = 10, shift: float = 0.0, scale: float = 1.0) -> None:
        linear = torch.nn.Linear(3, classes)
        shade = torch.arange(1, classes + 1) / (classes + 1)
        with torch.no_grad():  # -(m - shade)^2 but for m^2, which is the same for all classes
            linear.weight.copy_((2e4 * shade * scale / 3)[:, None].expand(-1, 3))
            linear.bias.copy_(1e4 * (2 * shade * shift - shade**2))
        super().__init__(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), linear)
        self.eval()


def shades(n: int = 500, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """What `Shades` is right about, in [0, 1], with labels in a random order."""
    y = (torch.arange(n) % classes)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    return ((y + 1) / (classes + 1)).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).clone(), y


def lines(net, x, y, defense: Defense | None = None, **more) -> tuple[str, list[str]]:
    """The line with the clean accuracy, and the warnings."""
    said: list[str] = []
    (defense or FT(epochs=0, batch_size=100)).purify(net, (x, y), session=Session(say=said.append), **more)
    return next(line for line in said if " classifies " in line), [line for line in said if line.startswith("warning")]


def test_the_share_of_clean_images_is_always_said():
    x, y = shades()
    assert lines(Shades(), x, y) == ("the network classifies 500 of 500 clean images correctly (100.0 %)", [])
    y[:20] = (y[:20] + 1) % 10  # 96 %: no reason to look further
    assert lines(Shades(), x, y) == ("the network classifies 480 of 500 clean images correctly (96.0 %)", [])
    x, y = shades(2400, 100)
    assert "2,400 of 2,400 clean images correctly" in lines(Shades(100), x, y)[0]


@pytest.mark.parametrize("right", [0.1, 0.17, 0.4])
def test_few_correct_images_are_warned_of_with_the_usual_causes(right):
    """Well above chance, too; here the labels of images are wrong, so that no other way to use the network helps."""
    x, y = shades(1000)
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) > right
    y[wrong] = torch.randint(10, (int(wrong.sum()),), generator=torch.manual_seed(2))
    (warning,) = lines(Shades(), x, y)[1]
    assert "classifies only" in warning
    for cause in ("mean and std", "order of the channels", "size of the images", "numbering of the classes"):
        assert cause in warning


def test_a_normalisation_that_is_forgotten_is_named():
    x, y = shades()
    net = Shades(shift=float(x.mean()), scale=float(x.std()))
    line, (warning,) = lines(net, x, y)
    count = int(re.search(r"classifies (\d+) of", line)[1])
    assert count < 300
    how, better = re.search(r"(with .* std) the network classifies (\d+) of", warning).groups()
    assert how == "with images normalised by their own mean and std" and int(better) > 450  # those of each batch
    assert "Normalized(model, mean, std), or --mean and --std" in warning
    fine = Normalized(net, [float(x.mean())] * 3, [float(x.std())] * 3)
    assert not lines(fine, x, y)[1]


def test_a_normalisation_that_is_too_much_is_named():
    """The loader normalises and says so, but the network takes pixels in [0, 1]."""
    x, y = shades()
    mean, std = (0.3,) * 3, (0.25,) * 3
    (warning,) = lines(Shades(), (x - 0.3) / 0.25, y, mean=mean, std=std)[1]
    assert "without mean and std the network classifies 500 of 500" in warning and "leave mean and std out" in warning


@pytest.mark.parametrize("twice", [False, True])
def test_pixels_up_to_255_are_named(twice):
    """The network expects them, or the loader divides by 255 twice."""
    x, y = shades()
    net, x = (Shades(), x / 255) if twice else (Shades(scale=1 / 255), x)
    (warning,) = lines(net, x, y)[1]
    assert "with pixels 255 times as large the network classifies 500 of 500" in warning


def test_another_order_of_the_channels_is_named():
    """Class 0 is red, 1 green, 2 blue, to a network that was trained on images of OpenCV."""
    y = torch.arange(60) % 3
    x = 0.2 + 0.6 * torch.eye(3)[y].view(-1, 3, 1, 1).expand(-1, 3, 4, 4)
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3)).eval()
    with torch.no_grad():
        net[2].weight.copy_(torch.eye(3).flip(1))
        net[2].bias.zero_()
    (warning,) = lines(net, x, y)[1]
    assert "with the channels in reverse order the network classifies 60 of 60" in warning and "BGR" in warning


def test_classes_that_are_numbered_otherwise_are_named():
    """As text: 0, 1, 10, 11, 2, ...; two of them swapped; and an accuracy of 70 % that is in order but for that."""
    x, y = shades(1200, 12)
    as_text = torch.tensor(sorted(range(12), key=str)).argsort()  # label 2 stands at place 4
    line, (warning,) = lines(Shades(12), x, as_text[y])
    assert "(16.7 %)" in line and "with the classes in another order the network classifies 1,200 of 1,200" in warning
    named = re.search(r"label (\d+) is class (\d+) of the network", warning)
    assert as_text[int(named[2])] == int(named[1]) != int(named[2]) and "sorted as text" in warning
    swapped = torch.tensor([0, 1, 2, 4, 3, *range(5, 12)])
    _, (warning,) = lines(Shades(12), x, swapped[y])
    assert "label 3 is class 4" in warning or "label 4 is class 3" in warning
    wrong = torch.rand(len(y), generator=torch.Generator().manual_seed(1)) > 0.7
    _, (warning,) = lines(Shades(12), x, torch.where(wrong, (y + 5) % 12, as_text[y]))
    assert "classes in another order" in warning


@pytest.mark.parametrize("each", [1, 2])
def test_an_order_that_suits_few_images_by_chance_is_not_named(each):
    """Of one or two images in each of 100 classes, some order suits most, whatever the network answers."""
    x, y = shades(100 * each, 100)
    answers = torch.randint(100, (100 * each,), generator=torch.Generator().manual_seed(0))
    (warning,) = lines(Shades(100), (answers + 1).view(-1, 1, 1, 1) / 101 * torch.ones_like(x), y)[1]
    assert "classifies only" in warning


def test_the_attackers_images_are_not_called_clean():
    images = BadNet(pratio=0.2).poison_train(toy_images(40), 0)
    line, _ = lines(tiny_net(), images.pixels, images.labels, EP())
    assert re.search(r"classifies \d+ of 40 poisoned images correctly", line)


def test_before_and_after_are_counted_on_the_images_as_they_are():
    """Not on crops of them, which lose most of the shades in one half of these images."""
    x, y = shades(400)
    x[:, :, :, 2:] = 0
    defense = FT(epochs=1, lr=1e-9, batch_size=100, augment=True)
    right = "the network classifies 400 of 400 clean images correctly (100.0 %)"
    assert lines(Shades(scale=2.0), x, y, defense, augment=Augment(3)) == (right, [])


class Soft(torch.nn.Module):
    """A network that ends in an activation."""

    def __init__(self, last: torch.nn.Module) -> None:
        super().__init__()
        inner = tiny_net()
        self.features, self.linear, self.last = inner.features, inner.linear, last
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.linear(self.features(x)))


@pytest.mark.parametrize("name", ["clp", "bnp", "ep"])
def test_methods_without_a_loss_take_probabilities(name):
    plain, soft = (
        ROWS[name].defense.purify(net, pair(), session=quiet()) for net in (tiny_net(), Soft(torch.nn.Softmax(1)))
    )
    assert same_weights(plain, soft)


def test_log_probabilities_are_logits():
    """A cross-entropy of them is the same."""
    plain, logged = (
        ROWS["ft"].defense.purify(net, pair(), session=quiet()) for net in (tiny_net(), Soft(torch.nn.LogSoftmax(1)))
    )
    pairs = zip(plain.parameters(), logged.parameters(), strict=True)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in pairs) and not same_weights(logged, tiny_net())
