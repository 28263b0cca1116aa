"""RNP: when the ascent ends, what the masks are trained on, what is pruned."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import backdoored, pair, quiet, same_weights, tiny_net

from sau.defense import RNP, pruning
from sau.evaluate import Proportion, Score

SMALL = {"batch_size": 8, "unlearning_epochs": 2, "recovering_epochs": 2, "augment": False}


def watched(defense: RNP, net: nn.Module, data: Any) -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    """The rows of a run, and what its state held after every epoch."""
    rows: list[dict[str, float]] = []
    states: list[dict[str, Any]] = []

    def look(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
        rows.append(losses)
        kept = {name: thing.state_dict() for name, thing in state.items()}
        states.append({name: {k: v.clone() for k, v in kept[name].items()} for name in kept if name != "descent"})
        return {}

    defense.purify(net, data, session=quiet(on_epoch=look))
    return rows, states


def test_the_ascent_ends_after_the_epoch_that_reaches_the_threshold():
    """Accuracy of an epoch in percent, threshold as a share; without it all epochs run."""
    net, clean, _, _ = backdoored()
    settings = {"batch_size": 50, "recovering_epochs": 0, "clean_threshold": 0.3}
    rows, _ = watched(RNP(**settings, unlearning_epochs=9, unlearning_lr=0.05), net, clean)
    accuracies = [row["clean_acc"] for row in rows]
    assert 1 < len(rows) < 9 and accuracies[-1] <= 30 and all(accuracy > 30 for accuracy in accuracies[:-1])
    assert rows[-1]["loss"] > rows[0]["loss"]  # it is an ascent
    assert len(watched(RNP(**settings, unlearning_epochs=3, unlearning_lr=1e-5), net, clean)[0]) == 3


def test_the_ascent_goes_up_the_clipped_gradient():
    """One batch, no momentum to remember: the step is lr * 20 / |g| * g where |g| > 20, weight decay beside it."""
    net, (x, y) = tiny_net(), pair(8)
    with torch.no_grad():
        net.linear.weight.mul_(300)
    copy = tiny_net().train()
    copy.load_state_dict(net.state_dict())
    gradients = torch.autograd.grad(F.cross_entropy(copy(x), y), list(copy.parameters()))
    length = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    assert length > 40
    _, states = watched(RNP(batch_size=8, unlearning_epochs=1, recovering_epochs=0, augment=False), net, (x, y))
    for (name, before), gradient in zip(copy.named_parameters(), gradients, strict=True):
        step = 0.01 * (gradient * 20 / length - 5e-4 * before.detach())
        moved = states[0]["unlearned"][f"net.{name}"] - before.detach()
        assert torch.allclose(moved, step, atol=1e-5 * float(before.detach().abs().max()) + 1e-6), name


def test_masks_are_trained_by_alpha_times_the_clean_loss():
    """One update from masks of 1: down recovering_lr * alpha * dCE/dm, cut to [0, 1]; the unlearned weights stay."""
    net, (x, y) = tiny_net(), pair(8)
    settings = {"batch_size": 8, "augment": False, "recovering_lr": 3.0, "alpha": 0.5}
    _, states = watched(RNP(unlearning_epochs=0, recovering_epochs=1, **settings), net, (x, y))
    scale = net.features[1].weight.detach().clone().requires_grad_()  # dCE/dm = scale * dCE/dscale
    copy = tiny_net().train()
    logits = torch.func.functional_call(copy, {"features.1.weight": scale}, (x,))
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), scale)
    wanted = (1 - 3.0 * 0.5 * scale.detach() * gradient).clamp(0, 1)
    (mask,) = states[0]["masks"].values()
    assert torch.allclose(mask, wanted, atol=1e-6) and (mask < 1).any() and (mask == 1).any()
    for name, parameter in net.named_parameters():
        assert torch.equal(states[0]["unlearned"][f"net.{name}"], parameter)


def pruned(net: nn.Module) -> Tensor:
    return net.get_parameter("features.1.weight") == 0


def test_the_threshold_decides_on_the_given_network():
    """Scales go where masks are low enough; shifts, other weights and statistics are those of the given network."""
    net, data = tiny_net(), pair(40)
    nn.init.constant_(net.features[1].bias, 0.1)
    _, states = watched(RNP(recovering_lr=1.0, **SMALL, pruning_number=0.0), net, data)
    (mask,) = states[-1]["masks"].values()
    threshold = float(mask.sort().values[4])
    fixed = RNP(recovering_lr=1.0, **SMALL, pruning_number=threshold).purify(net, data, session=quiet())
    assert torch.equal(pruned(fixed), mask <= threshold) and int(pruned(fixed).sum()) >= 5
    with torch.no_grad():
        net.features[1].weight[pruned(fixed)] = 0
    assert same_weights(fixed, net)


@pytest.mark.parametrize(("select", "number"), [("defender", None), ("oracle", 0.7)])
def test_a_search_for_the_threshold(monkeypatch, select, number):
    """The hardest one that keeps the accuracy of a fifth of the images, which train no mask; the oracle's, whatever
    pruning_number is, has the lowest ASR among those that keep the test accuracy."""

    def judge(network: nn.Module, clean: Any = None, triggered: Any = None) -> Score:
        assert clean is None or len(clean[1]) == 8
        n = int((network.get_parameter("net.features.1.weight") == 0).sum())
        return Score(Proportion(90 if n <= 4 else 10, 100), Proportion(100 - n, 100))

    monkeypatch.setattr(pruning, "score", judge)
    settings = {**SMALL, "recovering_lr": 5.0, "pruning_max": 1.0, "pruning_step": 0.01, "pruning_number": number}
    session = quiet(judge=judge if select == "oracle" else None)
    fixed = RNP(**settings, select=select).purify(tiny_net(), pair(40), session=session)
    assert 1 <= int(pruned(fixed).sum()) <= 4
