"""Pixels and radii in units other than [0, 1]: refused with the right advice, and right ones are taken."""

import pytest
import torch
from toys import pair, quiet, refuses, same_weights, tiny_net, triples

from sau.data.images import in_range
from sau.defense import FT
from sau.errors import DataError
from sau.evaluate import score
from sau.models import Normalized

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
QUICK = FT(epochs=1, batch_size=8, lr=0.01)


def normalised(x):
    return (x - torch.tensor(MEAN).view(1, -1, 1, 1)) / torch.tensor(STD).view(1, -1, 1, 1)


@pytest.mark.parametrize("give", [lambda x, y: (x, y), triples], ids=["pair", "loader"])
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,), (0.5,)), ((0.1307,), (0.3081,))])
def test_mean_and_std_of_images_that_are_not_normalised_are_refused(give, mean, std):
    x, y = pair()
    with refuses(DataError, "so they are not normalised; leave mean and std out"):
        QUICK.purify(tiny_net(), give(x, y), mean=mean, std=std, session=quiet())


def test_images_that_are_normalised_are_taken():
    """Also a batch without dark pixels, bytes, which are never normalised, and statistics that change nothing."""
    x, y = pair()
    x[8:16] = x[8:16].clamp_min(0.5)  # the second batch of the loader
    QUICK.purify(tiny_net(), triples(normalised(x), y), mean=MEAN, std=STD, session=quiet())
    QUICK.purify(tiny_net(), (normalised(x), y), mean=MEAN, std=STD, session=quiet())
    bytes_of = (255 * x.clamp(0.5, 0.7)).to(torch.uint8)
    QUICK.purify(tiny_net(), triples(bytes_of, y), mean=MEAN, std=STD, session=quiet())
    plain = QUICK.purify(tiny_net(), (x, y), session=quiet())
    assert same_weights(plain, QUICK.purify(tiny_net(), (x, y), mean=(0.0,), std=(1.0,), session=quiet()))


def test_rounding_is_clamped():
    x, y = pair()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -3e-8, 1 + 2e-7
    plain = QUICK.purify(tiny_net(), (x.clamp(0, 1), y), session=quiet())
    assert same_weights(QUICK.purify(tiny_net(), (x, y), session=quiet()), plain)
    assert same_weights(
        QUICK.purify(tiny_net(), [(x, y)], session=quiet()),
        QUICK.purify(tiny_net(), [(x.clamp(0, 1), y)], session=quiet()),
    )
    assert score(tiny_net(), (x, y), None) == score(tiny_net(), (x.clamp(0, 1), y), None)
    inside = in_range(x)
    assert (inside.min(), inside.max()) == (0, 1) and in_range(inside) is inside  # no copy of what is right


def test_a_network_that_owns_its_normalisation_takes_normalised_images_too():
    x, y = pair()
    net = Normalized(tiny_net(), MEAN, STD).eval()
    QUICK.purify(net, (normalised(x), y), mean=MEAN, std=STD, session=quiet())
