"""FT-SAM: its perturbation by hand, its gradients by double precision, and what must be left as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import pair, quiet, same_weights, tiny_net, toy_images

from sau.defense import FTSAM
from sau.defense.ft_sam import perturbed, smoothed_loss


def doubles(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(value, dtype=torch.float64) for value in values]


def test_the_adaptive_perturbation_by_hand():
    """|w| g = (3, 4, 12) over two tensors has the norm 13; w^2 g = (3, -8, 36); rho / 13 = 1/2."""
    weights, gradients = doubles([1.0, -2.0], [3.0]), doubles([3.0, -2.0], [4.0])
    e = FTSAM(rho=6.5).perturbation(weights, gradients)
    assert torch.allclose(torch.cat(e), torch.tensor([1.5, -4.0, 18.0], dtype=torch.float64), rtol=1e-12)
    relative = torch.cat(e) / torch.cat(weights).abs()
    assert relative.norm().item() == pytest.approx(6.5, rel=1e-12)  # on the boundary of N(w)


def test_the_plain_perturbation_by_hand():
    """(3, -4) has the norm 5; no gradient, no perturbation."""
    e = FTSAM(rho=10.0, adaptive=False).perturbation(doubles([7.0], [1.0]), doubles([3.0], [-4.0]))
    assert torch.cat(e).tolist() == pytest.approx([6.0, -8.0])
    assert FTSAM().perturbation(doubles([1.0]), doubles([0.0]))[0].item() == 0


def test_smoothing_leaves_the_label_exactly_its_share():
    """4 classes, 0.3: the label has 0.7, the others 0.1 each."""
    z, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0])
    wanted = torch.full((5, 4), 0.1, dtype=torch.float64).scatter(1, y[:, None], 0.7)
    assert smoothed_loss(z, y, 0.3).item() == pytest.approx(-(wanted * z.log_softmax(1)).sum(1).mean().item())
    assert smoothed_loss(z, y, 0.0).item() == pytest.approx(F.cross_entropy(z, y).item())
    assert torch.isfinite(smoothed_loss(z[:, :2], y % 2, 0.5))


def test_weights_are_undone_to_the_bit_whatever_happens():
    weights = [torch.randn(100) * 10.0**i for i in range(-3, 3)]
    before = [weight.clone() for weight in weights]
    with pytest.raises(KeyError), perturbed(nn.Identity(), weights, [torch.randn(100) for _ in weights]):
        assert not any(torch.equal(now, then) for now, then in zip(weights, before, strict=True))
        raise KeyError
    assert all(torch.equal(now, then) for now, then in zip(weights, before, strict=True))


def test_statistics_are_kept_and_those_of_the_batch_used():
    norm, x = nn.BatchNorm2d(3).train(), torch.randn(4, 3, 5, 5) + 2
    wanted, kept = nn.BatchNorm2d(3)(x), {name: value.clone() for name, value in norm.state_dict().items()}
    with perturbed(norm, [], []):
        assert torch.equal(norm(x), wanted)
    assert all(torch.equal(value, kept[name]) for name, value in norm.state_dict().items())
    norm(x)
    assert norm.num_batches_tracked == 1 and not torch.equal(norm.running_mean, kept["running_mean"])


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_step_is_the_papers_in_double_precision(adaptive, alpha):
    """w - lr * (gradient at w + e), worked out again by functional calls; the statistics are those of one batch."""
    net, images = tiny_net().double().train(), toy_images(8)
    x, y = images.pixels.double() / 255, images.labels
    method = FTSAM(lr=0.1, sgd_momentum=0.0, wd=0.0, rho=0.7, adaptive=adaptive, alpha=alpha, lr_scheduler="constant")
    weights = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    buffers = {name: value.clone() for name, value in net.named_buffers()}
    soft = torch.full((8, 4), 0.1 / 3, dtype=torch.float64).scatter(1, y[:, None], 0.9)

    def gradient(at: dict[str, torch.Tensor]) -> torch.Tensor:
        at = {name: weight.clone().requires_grad_() for name, weight in at.items()}
        copied = {name: value.clone() for name, value in buffers.items()}
        z = torch.func.functional_call(net, (at, copied), (x,))
        loss = -(soft * z.log_softmax(1)).sum(1).mean()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(at.values()))])

    w, g = torch.cat([weight.flatten() for weight in weights.values()]), gradient(weights)
    size = w.abs() if adaptive else torch.ones_like(w)
    e = method.rho * size**2 * g / (size * g).norm()
    parts = (w + e).split([weight.numel() for weight in weights.values()])
    there = gradient({name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)})
    across = g - (g @ there) / (there @ there) * there
    wanted = w - 0.1 * (there - alpha * across)

    once = tiny_net().double().train()
    once(x)
    method.step(method.prepare(net, range(1)), x, y)
    found = torch.cat([weight.detach().flatten() for weight in net.parameters()])
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12) and not torch.allclose(found, w - 0.1 * g, atol=1e-4)
    assert all(torch.equal(value, dict(once.named_buffers())[name]) for name, value in net.named_buffers())


def test_a_weight_that_the_loss_does_not_know_stays():
    net = tiny_net()
    net.register_parameter("spare", nn.Parameter(torch.ones(3)))
    fixed = FTSAM(epochs=1, lr=0.01, wd=0.0).purify(net, pair(), session=quiet())
    assert fixed.spare.tolist() == [1, 1, 1] and not same_weights(fixed, net)
