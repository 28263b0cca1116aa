"""How weights move: every optimiser by its formula, every schedule by its rates."""

import copy
import math
import typing

import pytest
import torch
from checkpoints import Tape
from torch import nn
from toys import quiet, same_weights, tiny_net, toy_images

from sau.config import options
from sau.defense import SAU
from sau.optim import Descent, Schedule, Training

SCHEDULES = typing.get_args(Schedule)
OPTIMIZERS = typing.get_args(options(Training)["client_optimizer"].hint)


def cosine(start: float, end: float, done: float) -> float:
    """From `start` to `end` along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


# name: (settings, the rate in each of the first epochs), at lr = 0.1
RATES: dict[str, tuple[dict, list[float]]] = {
    "constant": ({}, [0.1] * 5),
    "CosineAnnealingLR": ({"epochs": 4}, [0.1, 0.0853553, 0.05, 0.0146447, 0.0]),
    "CosineAnnealingLR over 100": ({"epochs": 4, "cos_t_max": 8}, [cosine(0.1, 0, e / 8) for e in range(5)]),
    "CosineAnnealingLR to 0.02": ({"epochs": 4, "min_lr": 0.02}, [cosine(0.1, 0.02, e / 4) for e in range(5)]),
    "StepLR": ({"steplr_stepsize": 2, "steplr_gamma": 0.5}, [0.1, 0.1, 0.05, 0.05, 0.025]),
    "MultiStepLR": ({"steplr_milestones": (1, 3), "steplr_gamma": 0.1}, [0.1, 0.01, 0.01, 0.001, 0.001]),
    "CyclicLR": ({"min_lr": 0.02, "steplr_stepsize": 2}, [0.02, 0.06, 0.1, 0.06, 0.02]),
    # The loss does not fall: after ten patient epochs and one more the rate does.
    "ReduceLROnPlateau": ({"steplr_gamma": 0.5}, [0.1] * 12 + [0.05] * 11 + [0.025]),
}


def parameter() -> nn.Parameter:
    return nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))


def rate(descent: Descent) -> float:
    return descent.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", RATES)
def test_schedules_that_count_epochs(case, optimizer):
    settings, expected = RATES[case]
    weights = parameter()
    training = Training(**{"lr": 0.1, "lr_scheduler": case.split()[0], "client_optimizer": optimizer, **settings})
    descent, seen = training.descent([weights], 3), []
    for _ in expected:
        seen.append(rate(descent))
        for _ in range(3):
            descent(weights.square().sum())
            assert rate(descent) == seen[-1]  # never moves inside an epoch
        descent.end_epoch(1.0)
    assert seen == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("epochs", "steps"), [(4, 5), (1, 20)])
def test_one_cycle_counts_updates(optimizer, epochs, steps):
    """Up from a 25th of the peak over 30 % of the 20 updates, then down to a 250,000th (torch's constants)."""
    weights = parameter()
    training = Training(lr=0.1, lr_scheduler="OneCycleLR", client_optimizer=optimizer, epochs=epochs)
    descent, seen = training.descent([weights], steps), []
    for _ in range(epochs):
        for _ in range(steps):
            seen.append(rate(descent))
            descent(weights.square().sum())
        descent.end_epoch(1.0)
    up, down = [cosine(4e-3, 0.1, i / 5) for i in range(6)], [cosine(0.1, 4e-7, i / 14) for i in range(1, 15)]
    assert seen == pytest.approx([*up, *down], abs=1e-9)


REFERENCES = {
    "sgd": lambda p: torch.optim.SGD([p], 0.1, momentum=0.8, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam([p], 0.1, (0.7, 0.9), weight_decay=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW([p], 0.1, (0.7, 0.9), weight_decay=0.01, amsgrad=False),
    "adadelta": lambda p: torch.optim.Adadelta([p], 0.1, rho=0.9, eps=1e-6, weight_decay=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_are_those_of_torch_with_the_benchmarks_settings(name):
    """Six updates of p on the loss sum(c p^3 / 3), whose gradient c p^2 first rises and then falls."""
    how = {"lr_scheduler": "constant", "sgd_momentum": 0.8, "wd": 0.01, "adam_betas": (0.7, 0.9)}
    training = Training(lr=0.1, client_optimizer=name, **how)
    ours, theirs = parameter(), parameter()
    descent, optimizer = training.descent([ours], 6), REFERENCES[name](theirs)
    for c in (0.1, 1.0, 2.0, 0.5, 0.1, 0.01):
        descent((c * ours**3 / 3).sum())
        optimizer.zero_grad()
        (c * theirs**3 / 3).sum().backward()
        optimizer.step()
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7) and not torch.allclose(ours, parameter(), atol=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_given_gradients_move_as_a_loss_does(name):
    """Also where they lie in memory in another order than their weights, and OneCycleLR moves with them too."""
    training = Training(lr=0.1, lr_scheduler="OneCycleLR", client_optimizer=name, epochs=1, wd=0.01)
    moved = []
    for given in (False, True):
        weights = nn.Parameter(torch.arange(24.0).view(1, 2, 3, 4).to(memory_format=torch.channels_last) / 10)
        descent = training.descent([weights], 3)
        for _ in range(3):
            loss = (weights**3).sum()
            if given:
                (gradient,) = torch.autograd.grad(loss, descent.parameters)
                descent.follow([gradient.contiguous()])
            else:
                descent(loss)
        moved.append(weights.detach())
    assert torch.equal(*moved)
    with pytest.raises(ValueError, match="shorter"):
        descent.follow([])


def test_a_long_gradient_is_clipped_before_the_step():
    """(3, 4) has the length 5: cut to 1 it is (0.6, 0.8), over all weights together; cut to 6 it stays."""
    for clip, step in ((1.0, (0.6, 0.8)), (6.0, (3.0, 4.0)), (None, (3.0, 4.0))):
        a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        descent = Training(lr=1.0, lr_scheduler="constant", wd=0.0, sgd_momentum=0.0).descent([a, b], 1)
        descent((3 * a + 4 * b).sum(), clip=clip)
        assert (a.item(), b.item()) == pytest.approx((-step[0], -step[1]), rel=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_descent_goes_on_from_its_state(schedule, optimizer):
    """Three epochs at once, and one epoch, a checkpoint on disk, and two more: the same bits and rates."""
    how = {"epochs": 3, "steplr_stepsize": 1, "steplr_milestones": (1,)}
    training = Training(lr=0.1, lr_scheduler=schedule, client_optimizer=optimizer, **how)

    def epochs(weights: nn.Parameter, descent: Descent, n: int) -> list[float]:
        rates = []
        for _ in range(n):
            for _ in range(4):
                rates.append(rate(descent))
                descent((weights**4).sum() / 10)
            descent.end_epoch(1.0)
        return rates

    weights = parameter()
    rates = epochs(weights, training.descent([weights], 4), 3)
    half = parameter()
    first = training.descent([half], 4)
    half_rates = epochs(half, first, 1)
    tape = Tape()
    tape.save(first.state_dict())
    resumed = nn.Parameter(half.detach().clone())
    second = training.descent([resumed], 4)
    second.load_state_dict(tape.load())
    half_rates += epochs(resumed, second, 2)
    assert torch.equal(resumed, weights) and half_rates == rates


def test_descents_share_a_loss_and_may_keep_their_gradients():
    """Two SGDs at rate 1 on 2 a + 3 b: each step moves a by 2; b, whose gradient is kept, by 3, then 6, then 9."""
    a, b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
    plain = Training(lr=1.0, sgd_momentum=0.0, wd=0.0, lr_scheduler="constant")
    one, other = plain.descent([a], 1), plain.descent([b], 1)
    other.keeps = True
    for total in (3, 9, 18):
        one(2 * a + 3 * b, other)
        assert b.item() == -total
    assert a.item() == -6
    again = plain.descent([b], 1)  # another process, with a checkpoint of the first one's
    again.keeps = True
    kept, b.grad = copy.deepcopy(other.state_dict()), None
    again.load_state_dict(kept)
    one(2 * a + 3 * b, again)
    assert (a.item(), b.item()) == (-8, -30)
    again.keeps = False
    one(2 * a + 3 * b, again)
    assert (a.item(), b.item()) == (-10, -33) and "gradients" not in again.state_dict()


def test_one_cycle_goes_through_every_outer_step():
    how = {"lr": 0.01, "lr_scheduler": "OneCycleLR", "epochs": 2, "batch_size": 8}
    assert not same_weights(SAU(outer_steps=2, **how).purify(tiny_net(), toy_images(16), session=quiet()), tiny_net())
