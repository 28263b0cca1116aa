"""CLP, BNP and EP: their scores by hand, the rule of outliers that they share, the claim, with RNP."""

import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pruning import gone
from torch import Tensor, nn
from toys import pair, planted, quiet, same_weights, tiny_net

from sau.defense import BNP, CLP, EP, RNP, Defense, clp, ep, pruning
from sau.evaluate import Proportion, Score, score
from sau.models import Normalized, build, unwrapped


@pytest.mark.parametrize(("scores", "u", "expected"), [
    ([0.0, 0, 0, 0, 5], 1.78, [4]),  # mean 1, deviation sqrt(20 / 4): the last lies 4 / 2.236 = 1.789 above
    ([0.0, 0, 0, 0, 5], 1.79, []),
    ([-5.0, 0, 0, 0, 0], 1.78, []),
    ([-5.0, 0, 0, 0, 0], 0.0, [1, 2, 3, 4]),
    # A layer keeps its lowest score, also where the mean of equal ones is rounded below them, or there is but one.
    *(([0.1] * n, 0.0, []) for n in (3, 7)),
    ([2.0], 0.0, []),
    ([1e-9, 1.0], 0.0, [1]),
])  # fmt: skip
def test_channels_u_deviations_above_their_layer_are_outliers(scores, u, expected):
    found = CLP().level({"a": torch.tensor(scores, dtype=torch.float64)}, u).pruned
    assert [i for flags in found.values() for i in flags.nonzero().flatten().tolist()] == expected


class First(pruning.ChannelOutlierPruning):
    """Channel i of the tiny network's batch norm scores -i: with u 1 the first two go, 4.5 / 3.03 and 3.5 / 3.03."""

    name: ClassVar[str] = "first"

    def scores(self, model, batches):
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        assert not any(getattr(module, "amp", False) for module in model.modules())
        (name,) = pruning.batch_norms(model, "first")
        return {name: -torch.arange(10.0)}


def test_the_shift_goes_too_with_zero_shift():
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    for zero_shift in (True, False):
        model = First(u=1.0, zero_shift=zero_shift).purify(Normalized(net, amp=True), pair(), session=quiet())
        fixed = model.net
        assert model.amp is True and fixed.features[1].weight.tolist() == [0, 0] + [1] * 8
        assert fixed.features[1].bias.tolist() == [float(not zero_shift)] * 2 + [1] * 8


def test_the_oracle_tries_u_from_the_highest_to_the_lowest():
    """1.0 (two channels) has the lowest ASR among those that keep the accuracy; 0.0 costs too much."""
    measured = []

    def judge(network: nn.Module) -> Score:
        measured.append(gone(network))
        acc, asr = {0: (90, 99), 2: (89, 1), 3: (85, 5), 5: (10, 0)}[measured[-1]]
        return Score(Proportion(acc, 100), Proportion(asr, 100))

    defense = First(select="oracle", u_min=0.0, u_max=1.5, u_num=4)
    fixed = defense.purify(tiny_net(), pair(), session=quiet(judge=judge))
    assert measured == [0, 2, 3, 5] and gone(fixed) == 2


@pytest.mark.parametrize("cls", [CLP, BNP, EP])
def test_nothing_but_scales_and_shifts_of_pruned_channels_changes(cls):
    net = tiny_net()
    nn.init.ones_(net.features[1].bias)
    fixed = cls(u=0.5, batch_size=10).purify(net, pair(), session=quiet())
    zero = fixed.features[1].weight == 0
    assert zero.any() and torch.equal(zero, fixed.features[1].bias == 0)
    with torch.no_grad():
        fixed.features[1].weight[zero], fixed.features[1].bias[zero] = 1, 1
    assert same_weights(fixed, net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fixed.modules())


# The claim: the one channel that answers to the trigger goes, and no other


@pytest.mark.parametrize("defense", [
    CLP(),
    BNP(augment=False),
    EP(augment=False),
    RNP(batch_size=200, unlearning_lr=0.005, recovering_lr=5.0, pruning_number=None, augment=False),
], ids=lambda defense: defense.name)  # fmt: skip
def test_the_planted_channel_goes_and_no_other(defense: Defense):
    net, poisoned, clean, triggered = planted(share=0.2 if defense.data_use == "poisoned" else 0.05)
    before = score(net, clean, triggered)
    given = (poisoned, net(poisoned).argmax(1)) if defense.data_use == "poisoned" else clean
    fixed = defense.purify(net, given, session=quiet())
    after = score(fixed, clean, triggered)
    assert (fixed[1].weight == 0).nonzero().flatten().tolist() == [5]
    assert before.asr.percent > 95 and before.acc.percent > 95
    assert after.asr.percent < 5 and after.acc.percent > 95 and after.racc.percent > before.racc.percent + 50


PLAIN = {"mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.mark.parametrize("groups", [1, 2])
def test_lipschitz_constants_are_those_of_numpy(groups):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, groups=groups).double(), nn.BatchNorm2d(6, eps=0.1).double()
    nn.init.normal_(norm.weight)
    norm.running_var.uniform_(0.1, 2)
    found = clp.lipschitz(conv, norm)
    for c in range(6):
        matrix = conv.weight[c].detach().numpy().reshape(4 // groups, 9)
        largest = np.linalg.svd(matrix, compute_uv=False)[0]
        gain = abs(norm.weight[c].item()) / np.sqrt(norm.running_var[c].item() + 0.1)
        assert found[c].item() == pytest.approx(largest * gain, rel=1e-12)


def names(model: nn.Module, pairing: str = "traced") -> dict[str, str]:
    """The pairs as names, without the prefix of the wrapper."""
    norms = pruning.batch_norms(model, "clp")
    x = torch.zeros(1, 3, 32, 32)
    pairs = clp.traced(model.eval(), norms, x) if pairing == "traced" else clp.ordered(model, norms)
    known = {module: name.removeprefix("net.") for name, module in model.named_modules()}
    return {name.removeprefix("net."): known[conv] for name, conv in pairs.items()}


@pytest.mark.parametrize("amp", [False, True])
def test_pairs_of_preactresnet18(amp):
    """The second batch norm of each block, and the first one of all, which the stem feeds; the other seven follow a
    residual sum."""
    model = build("preactresnet18", 10, width=4, amp=amp, **PLAIN)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    wanted = {"layer1.0.bn1": "conv1", **{f"{block}.bn2": f"{block}.conv1" for block in blocks}}
    assert names(model) == wanted
    by_order = names(model, "order")
    assert by_order.items() >= wanted.items() and len(by_order) == 16
    assert by_order["layer1.1.bn1"] == "layer1.0.conv2"  # whose output is summed first
    assert by_order["layer2.1.bn1"] == "layer2.0.shortcut.0"


def test_pairs_of_torchvisions_resnet18():
    norms = [name for name, module in unwrapped("resnet18", 10).named_modules() if isinstance(module, nn.BatchNorm2d)]
    wanted = {name: name.replace("bn", "conv").replace("downsample.1", "downsample.0") for name in norms}
    assert len(wanted) == 20 and names(build("resnet18", 10, **PLAIN)) == wanted


class Odd(nn.Module):
    """A batch norm behind a ReLU in place, one used behind two convolutions, one behind a sum in place, one that is
    never used, and one that is paired."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.relu, self.twice, self.sum, self.unused, self.good = (nn.BatchNorm2d(3) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(F.relu_(self.a(x)))
        x = self.twice(self.b(self.twice(self.c(x))))
        y = self.a(x)
        y += x
        return self.good(self.b(self.sum(y)))


def test_what_only_looks_like_a_convolutions_output_is_left_out():
    model = Odd()
    found = clp.traced(model.eval(), pruning.batch_norms(model, "clp"), torch.rand(1, 3, 8, 8))
    assert found == {"good": model.b} and not any(m._forward_hooks for m in model.modules())
    other = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(4))
    assert clp.ordered(other, pruning.batch_norms(other, "clp")) == {}  # numbers of channels differ


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten()).eval()


def test_statistics_are_those_of_all_images_in_the_network_as_it_is():
    """Whatever the batches; a batch norm normalises by its running statistics, not by those of the batch."""
    net, (x, y) = two_layers(), pair(20)
    net[1].running_mean += 0.3
    net[4].running_var *= 2.5
    found = BNP().scores(net, [(x[:7], y[:7]), (x[7:8], y[7:8]), (x[8:], y[8:])])
    for name, inputs in (("1", net[0](x)), ("4", net[:4](x))):
        norm, values = net.get_submodule(name), inputs.double().detach()
        var = values.var((0, 2, 3), unbiased=False) + norm.eps
        mean, running_var = values.mean((0, 2, 3)), norm.running_var.double() + norm.eps
        apart = (mean - norm.running_mean.double()) ** 2
        wanted = (running_var / var).log() / 2 + (var + apart) / (2 * running_var) - 0.5
        torch.testing.assert_close(found[name], wanted)
    assert found.keys() == {"1", "4"}


def test_a_dead_channel_has_a_finite_score():
    net = two_layers()
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
        net[1].running_var[2] = 0
        scores = BNP().scores(net, [pair(8)])["1"]
    assert scores.isfinite().all() and scores[2] == pytest.approx(0)


def by_hand(z: Tensor, width: float) -> list[float]:
    """Entropies of whole bins that are open on both sides."""
    low, high, entropies = float(z.min()), float(z.max()), []
    for column in z.t().tolist():
        edges = [low + width * b for b in range(int((high - low) / width) + 1)]
        shares = [sum(a < v < b for v in column) / len(column) for a, b in pairwise(edges)]
        entropies.append(-sum(p * math.log(p) for p in shares if p))
    return entropies


@pytest.mark.parametrize("width", [0.1, 0.5, 3.0])
def test_entropies_are_those_worked_out_by_hand(width):
    z = torch.randn(100, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 3] = z[:, 3].sign() + 0.01 * z[:, 4]  # two narrow modes
    found = ep.entropy(z, width)
    assert found.tolist() == pytest.approx(by_hand(z, width), rel=1e-12)
    assert width > 1 or found.argmin() == 3


def test_values_on_edges_and_beyond_the_last_whole_bin_are_in_no_bin():
    """Edges 0, 1, 2, 3 (the highest value is 3.5). Of the first column 0.5 and 0.6 share a bin, 1 and 2 lie on edges,
    1.5 is alone: shares 2/5 and 1/5. Of the second 0 is on the first edge, 3.5 and 3.2 lie beyond the last, 3 on it,
    and 2.5 is alone."""
    z = torch.tensor([[0.5, 0.6, 1.0, 2.0, 1.5], [0.0, 3.5, 3.2, 3.0, 2.5]], dtype=torch.float64).t()
    wanted = [-(0.4 * math.log(0.4) + 0.2 * math.log(0.2)), -0.2 * math.log(0.2)]
    torch.testing.assert_close(ep.entropy(z, 1.0), torch.tensor(wanted, dtype=torch.float64))
    assert ep.entropy(z, 4.0).tolist() == [0, 0]  # not one whole bin


def test_scores_are_entropies_of_spatial_maxima_at_the_batch_norm():
    net, (x, y) = tiny_net(), pair(20)
    with torch.no_grad():
        net.features[0].weight[3], net.features[0].bias[3] = 0, 1  # a constant channel is 0
        (found,) = EP(batch_size=20, bin_width=0.4).scores(net, [(x[:12], y[:12]), (x[12:], y[12:])]).values()
        maxima = net.features[0](x).amax((2, 3)).double()
    z = ((maxima - maxima.mean(0)) / maxima.std(0)).nan_to_num(0)
    assert (-found).tolist() == pytest.approx(by_hand(z, 0.4), rel=1e-12)


def test_so_many_images_are_drawn_as_the_batch_size_says():
    pixels = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 2, 2)
    batches = [(pixels[i : i + 6], None) for i in range(0, 20, 6)]
    for size, length in ((2, 2), (6, 6), (7, 7), (20, 20), (256, 20)):
        assert torch.equal(ep.first_images(batches, size), pixels[:length])
