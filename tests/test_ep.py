"""EP: histograms by hand, with values on the edges; what is drawn."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from toys import pair, quiet, same_weights, tiny_net

from sau.defense import EP, ep


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


def test_a_layer_that_runs_twice_counts_where_it_is_highest():
    norm, x = nn.BatchNorm2d(3).eval(), torch.rand(20, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    net = nn.Sequential(norm, nn.Hardswish(), norm)
    with torch.no_grad():
        (found,) = EP(batch_size=20, bin_width=0.4).scores(net, [(x, None)]).values()
        t = torch.maximum(x.amax((2, 3)), net[:2](x).amax((2, 3))).double()
    assert (-found).tolist() == pytest.approx(by_hand((t - t.mean(0)) / t.std(0), 0.4), rel=1e-12)


def test_so_many_images_are_drawn_as_the_batch_size_says():
    """From as many batches as that takes, and no more than there are."""
    pixels = torch.arange(20.0).view(20, 1, 1, 1).expand(20, 3, 2, 2)
    batches = [(pixels[i : i + 6], None) for i in range(0, 20, 6)]
    for size, length in ((2, 2), (6, 6), (7, 7), (20, 20), (256, 20)):
        assert torch.equal(ep.first_images(batches, size), pixels[:length])


def test_the_labels_are_not_used():
    x, y = pair()
    one, other = (EP(u=0.5, batch_size=10).purify(tiny_net(), (x, labels), session=quiet()) for labels in (y, 3 - y))
    assert same_weights(one, other) and not same_weights(one, tiny_net())
