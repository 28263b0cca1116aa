"""LF's pattern, searched against a clean network: the filter, DeepFool, the rules of the search, the network."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from attack_rows import ready
from torch import nn
from toys import Enough, Shaped, quiet, refuses, same_weights, stop_making, tiny_net, toy_images, train_victim

from sau.attack import LF, SSBA, Prototype, ssba
from sau.attack import lf as lf_search
from sau.attack.lf import Progress, deepfool, rate, rescaled, smooth, step
from sau.attack.triggers import TriggerContext
from sau.data.batches import generator
from sau.data.images import Images, to_float
from sau.errors import DataError, TrainingError
from sau.evaluate import predict
from sau.loop import RunContext
from sau.optim import Training

SMALL = LF(lf_optimise=True, lf_images=20, lf_passes=4, lf_deepfool_steps=30)
pytestmark = pytest.mark.usefixtures("own_cache")


def linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    """Logits W x + b of a flattened image."""
    layer = nn.Linear(*weight.T.shape)
    layer.load_state_dict({"weight": weight, "bias": bias})
    return nn.Sequential(nn.Flatten(), layer).requires_grad_(False)


def test_the_filter_by_hand():
    """30 taps exp(-(i - 14.5)^2 / 72) over their sum, 14 zeros before and 15 after."""
    v = torch.rand(2, 20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = np.exp(-((np.arange(30) - 14.5) ** 2) / 72)
    k /= k.sum()

    def along(line: np.ndarray) -> np.ndarray:
        padded = np.concatenate([np.zeros(14), line, np.zeros(15)])
        return np.array([(k * padded[j : j + 30]).sum() for j in range(len(line))])

    expected = np.apply_along_axis(along, 2, np.apply_along_axis(along, 1, v.numpy()))
    assert np.allclose(smooth(v).numpy(), expected, atol=1e-12)


def test_rescaling_by_hand_and_where_there_is_nothing_to_rescale():
    assert rescaled(torch.tensor([[[-1.0, 0.0, 3.0]]]), 0.2).tolist() == [[pytest.approx([0, 0.05, 0.2])]]
    assert rescaled(torch.zeros(3, 4, 4), 0.2) is None and rescaled(torch.full((3, 4, 4), float("nan")), 0.2) is None


def test_deepfool_on_a_linear_network_is_one_step_of_its_closed_form():
    """r = (f_0 - f_t) / |w_t - w_0|^2 (w_t - w_0), times 1.02."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 12, generator=generator), torch.rand(3, 2, 2, generator=generator)
    net = linear(weight, torch.tensor([9.0, 0.0]))
    logits = net(x[None])[0]
    assert int(logits.argmax()) == 0
    way = weight[1] - weight[0]
    expected = 1.02 * (logits[0] - logits[1]) / way.square().sum() * way
    found = deepfool(net, x, 1, 200, 0.02)
    assert torch.allclose(found.flatten(), expected, atol=1e-5) and int(net((x + found)[None])[0].argmax()) == 1
    beyond = deepfool(net, x, 1, 1, 0.5)
    assert torch.allclose(beyond.flatten(), 1.5 / 1.02 * expected, atol=1e-5)


def test_deepfool_gives_up():
    x = torch.rand(3, 2, 2)
    flat = linear(torch.zeros(2, 12), torch.tensor([1.0, 0.0]))
    assert deepfool(flat, x, 1, 200, 0.02) is None  # no way leads anywhere
    hidden = linear(torch.tensor([[0.0], [1.0], [2.0]]).expand(3, 12), torch.tensor([20.0, 0.0, 0.0]))
    assert deepfool(hidden, x, 1, 5, 0.02) is None  # 2 wins before 1 does
    beside = linear(torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), torch.tensor([1.0, 0.0, 0.5]))
    assert deepfool(beside, torch.zeros(1, 1, 2), 1, 5, 0.02) is None  # from 2, which is seen on the way, 1 is near


def test_a_step_skips_what_needs_none():
    """Pictures of the target class, whose r = 0 made NaN in the public script, and images that v moves already."""
    net = linear(torch.zeros(2, 12), torch.tensor([1.0, 0.0]))  # sees 0 everywhere
    search = Progress(torch.Size((3, 2, 2)), torch.device("cpu"))
    x, y = torch.rand(1, 3, 2, 2), torch.zeros(1, dtype=torch.long)
    assert int(step(net, search, SMALL, x, y)["moved"]) == 0 and not search.v.any()
    ramp = linear(torch.stack([torch.zeros(12), torch.ones(12)]), torch.tensor([6.5, 0.0]))
    grey = torch.full((1, 3, 2, 2), 0.5)  # 12 * 0.5 = 6 is less than 6.5, and 12 * 0.6 is more
    search.v = torch.full((3, 2, 2), 0.1)
    before = search.v.clone()
    assert int(step(ramp, search, replace(SMALL, attack_target=1), grey, y)["moved"]) == 0
    assert torch.equal(search.v, before)


def test_a_step_moves_smooths_and_rescales():
    clean = train_victim(Prototype(), toy_images(200, size=32)).requires_grad_(False)
    images = toy_images(20, size=32, seed=3)
    x = to_float(images.pixels[images.labels == 1][:1])
    search = Progress(torch.Size((3, 32, 32)), torch.device("cpu"))
    assert int(step(clean, search, SMALL, x, images.labels[:1])["moved"]) == 1
    r = deepfool(clean, x[0], 0, 30, 0.02)
    assert torch.allclose(search.v, rescaled(smooth(smooth(r)), 0.2))
    assert float(search.v.min()) == 0 and float(search.v.max()) == pytest.approx(0.2)


def test_the_search_stops_at_the_rate_it_wants_or_when_five_are_alike_and_keeps_the_best():
    start = torch.Size((1, 2, 2)), torch.device("cpu")
    search = Progress(*start)
    for n, (fooled, stop) in enumerate(((0.1, False), (0.05, False), (0.2, True))):
        search.v = torch.full((1, 2, 2), float(n))
        assert search.judge(fooled, 0.2) == stop and float(search.best[0, 0, 0]) == (0, 0, 2)[n]
    rates, search = [0.0, 0.1, 0.1, 0.109, 0.105, 0.101, 0.2], Progress(*start)
    assert [search.judge(fooled, 0.9) for fooled in rates] == [False] * 5 + [True, False]
    search = Progress(*start)
    assert not any(search.judge(fooled, 0.9) for fooled in (0.1, 0.1, 0.1, 0.1, 0.115, 0.115))


def test_the_rate_is_the_share_of_changed_predictions():
    """Two of four images are beyond the border, 6.5 of 12, once 0.1 is added; only one was before."""
    net = linear(torch.stack([torch.zeros(12), torch.ones(12)]), torch.tensor([6.5, 0.0]))
    grey = torch.tensor([51, 128, 153, 77], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    images = Images.clean(grey, torch.zeros(4, dtype=torch.long), 2)
    seen = predict(net, to_float(grey))
    assert seen.tolist() == [0, 0, 1, 0] and rate(net, images, seen, torch.full((3, 2, 2), 0.1)) == 0.25


def test_a_search_that_finds_nothing_is_an_error():
    net = linear(torch.zeros(4, 768), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    with refuses(TrainingError, "class 0"):
        lf_search.optimise(net, toy_images(40), SMALL, 0, quiet())


def coloured(n: int) -> Images:
    """Noise whose class is its colour, red, green, blue or grey, which a smooth pattern can change."""
    generator, labels = torch.Generator().manual_seed(0), torch.arange(n) % 4
    colour = torch.tensor([[160, 100, 100], [100, 160, 100], [100, 100, 160], [100, 100, 100]])[labels]
    noise = torch.randint(-20, 21, (n, 3, 32, 32), generator=generator)
    return Images.clean((colour.view(n, 3, 1, 1) + noise).to(torch.uint8), labels, 4)


RECIPE = {"epochs": 3, "batch_size": 20, "lr": 0.05, "lr_scheduler": "OneCycleLR"}


def test_a_pattern_is_searched_once_and_is_smooth_and_faint(own_cache):
    images, lines = coloured(200), []
    attack = LF(lf_optimise=True, lf_strength=0.5, lf_images=12, lf_passes=2, lf_deepfool_steps=30)
    found = ready(attack, images, lines, **{**RECIPE, "epochs": 20})
    pattern = found.trigger.values
    assert pattern.shape == (3, 32, 32) and float(pattern.min()) == 0 and float(pattern.max()) == pytest.approx(0.5)
    energy = torch.fft.fft2(pattern.double()).abs().square()
    low = torch.fft.fftfreq(32, 1 / 32).abs().round() <= 3
    assert float(energy[:, low][:, :, low].sum() / energy.sum()) > 0.95  # of the energy in the central 7x7 of 32x32
    assert any(line.startswith("pass 1/2") and "fooled" in line for line in lines)
    assert "led to the target" in lines[-1]
    x = to_float(images.pixels[:3])
    assert torch.allclose(found.stamp(x), (x + pattern).clamp(0, 1))
    lines.clear()
    again = ready(attack, images, lines, **{**RECIPE, "epochs": 20})
    assert torch.equal(again.trigger.values, pattern) and again.trigger.figures == found.trigger.figures
    assert len(lines) == 2 and all("from the cache" in line for line in lines)
    with pytest.raises(DataError):
        found.stamp(torch.rand(1, 3, 16, 16))


SEARCHED = LF(lf_optimise=True, lf_strength=0.5, lf_images=8, lf_passes=3, lf_delta=0.0)
ENCODED = SSBA(ssba_epochs=3, ssba_batch_size=8, ssba_lr=1e-3)


@pytest.mark.parametrize(("where", "attack"), [("clean-network", SEARCHED), ("lf", SEARCHED), ("ssba", ENCODED)])
def test_an_interrupted_search_or_training_ends_with_the_same_bits(where, attack, own_cache, monkeypatch):
    monkeypatch.setattr(ssba, "READABLE", 0.0)
    images = coloured(16 if where == "ssba" else 120)
    whole = ready(attack, images, **RECIPE)
    monkeypatch.setenv("SAU_CACHE", str(own_cache / "other"))
    stop_making(monkeypatch, where)
    with pytest.raises(Enough):
        ready(attack, images, **RECIPE)
    lines: list[str] = []
    again = ready(attack, images, lines, **RECIPE)
    assert any("resuming after" in line for line in lines)
    assert same_weights(again.trigger, whole.trigger) and again.trigger.figures == whole.trigger.figures


def test_a_clean_network_that_answers_otherwise_is_another_one():
    lines, recipe = list[str](), Training(epochs=1, batch_size=8)
    for shape in (lambda z: z, lambda z: -z, lambda z: z):
        context = TriggerContext(toy_images(16), Shaped(shape), recipe, None, 0, RunContext(say=lines.append))
        net = lf_search.train_clean(context)
        assert not same_weights(net, Shaped(shape)) and not any(p.requires_grad for p in net.parameters())
    found = [line for line in lines if line.startswith("clean-network: epochs")]
    assert ["from the cache" in line for line in found] == [False, False, True]


@pytest.mark.parametrize(("n", "judges", "seed"), [(1100, 1000, 0), (40, 20, 0), (40, 20, 1), (20, 20, 0), (10, 10, 0)])
def test_a_pattern_is_judged_on_other_images_than_it_was_made_from(n, judges, seed, monkeypatch):
    """Of 40 images 20, drawn by the seed, make it, the others judge it, and 1 - delta of them have to be fooled."""
    enough, judged, walked, judge = list[float](), list[list[int]](), list[torch.Tensor](), Progress.judge
    monkeypatch.setattr(Progress, "judge", lambda self, rate, e: enough.append(e) or judge(self, rate, e))
    monkeypatch.setattr(lf_search, "rate", lambda model, images, *rest: judged.append(images.index.tolist()) or 0.9)
    monkeypatch.setattr(lf_search, "step", lambda m, s, lf, x, y: walked.append(x) or {"moved": torch.tensor(0)})
    images = toy_images(n, size=4)
    with pytest.raises(TrainingError):
        lf_search.optimise(tiny_net(), images, SMALL, seed, quiet())
    used = torch.randperm(n, generator=generator(seed))[:20]
    assert enough == [pytest.approx(0.2)] and len(judged[0]) == judges
    assert n <= 20 or not {*judged[0]} & {*used.tolist()}
    assert torch.equal(torch.cat(walked), torch.cat([x for x, _, _ in images[used].batches(1, seed=seed)]))
