"""The risks: exact where the maxima have closed forms, and ordered as the paper says."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from toys import QUICK, refuses, rows, summary, tiny_net, toy_images

from sau.data.images import Images, sample
from sau.errors import ConfigError, DataError, TrainingError
from sau.pgd import length
from sau.risk import Search, margins, measure, shared_margin

SIDE, N = 8, 96


class Line(nn.Module):
    """Two classes: logits (0, w . (x - 1/2))."""

    def __init__(self, w: torch.Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        height = (x - 0.5).flatten(1) @ self.w
        return torch.stack([torch.zeros_like(height), height], 1)


def pictures(seed=0, n=N, classes=2):
    torch.manual_seed(seed)
    pixels = torch.randint(90, 166, (n, 3, SIDE, SIDE), dtype=torch.uint8)
    return Images.clean(pixels, torch.randint(0, classes, (n,)), classes)


def lines(seed, overlap):
    """Two weight vectors; without overlap they look at different values."""
    torch.manual_seed(seed)
    first, second = torch.randn(2, 3 * SIDE * SIDE)
    if not overlap:
        half = torch.arange(len(first)) % 2 == 0
        first, second = first * half, second * ~half
    return first, second


def depth(w, data):
    """How far each image is from being misclassified: y (w . (x - 1/2)), below 0 where it already is."""
    side = 2 * data.labels - 1
    return side * ((data.pixels.float() / 255 - 0.5).flatten(1) @ w)


DUAL = {"L_inf": 1, "L2": 2, "L1": torch.inf}


def nearest_shared(norm, w1, w2, data):
    """Smallest norm that fools both lines; for L_inf and L1 the two must not look at the same values."""
    reach = [depth(w, data).clamp_min(0) / torch.linalg.vector_norm(w, ord=DUAL[norm]) for w in (w1, w2)]
    if norm == "L_inf":
        return torch.maximum(*reach)
    if norm == "L1":
        return reach[0] + reach[1]
    m1, m2 = (depth(w, data) / w.norm() for w in (w1, w2))
    rho = float(w1 @ w2 / w1.norm() / w2.norm())
    corner = ((m1**2 + m2**2 - 2 * rho * m1 * m2) / (1 - rho**2)).sqrt()
    one_is_enough = torch.where(rho * m1 >= m2, m1, torch.where(rho * m2 >= m1, m2, corner))
    return torch.where((m1 <= 0) & (m2 <= 0), 0.0, one_is_enough.clamp_min(0))


@pytest.mark.parametrize("norm, eps, overlap", [("L_inf", 0.006, False), ("L2", 0.07, True), ("L1", 0.25, False)])
def test_the_risks_of_two_linear_networks_are_the_exact_ones(norm, eps, overlap):
    w1, w2 = lines(1, overlap)
    data = pictures()
    found = measure(Line(w1), Line(w2), data, search=Search(norm=norm, eps=eps, steps=60, step_size=eps / 12))
    alone = depth(w1, data) / torch.linalg.vector_norm(w1, ord=DUAL[norm])
    both = nearest_shared(norm, w1, w2, data)
    for reach, flags in ((alone, found.adv), (both, found.share)):
        clear = (reach / eps - 1).abs() > 0.03  # a search of finite steps stops short of the boundary
        assert clear.sum() > 0.85 * N and 0.15 * N < (reach < eps).sum() < 0.9 * N
        assert torch.equal(flags[clear], (reach < eps)[clear])


class Curve(nn.Module):
    """Images of one value: logits (0, h_1, ...), which run straight between the grey levels of `points`."""

    def __init__(self, points: list[tuple[float, ...]]) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.tensor(points))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grey, heights, at = self.points[:, 0].detach().contiguous(), self.points[:, 1:], 255 * x.flatten(1)
        right = torch.searchsorted(grey, at.detach().flatten()).clamp(1, len(grey) - 1)
        share = (at - grey[right - 1, None]) / (grey[right] - grey[right - 1])[:, None]
        return torch.cat([0 * at, heights[right - 1].lerp(heights[right], share)], 1)


def greys(levels, labels):
    return Images.clean(torch.tensor(levels, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(labels), 3)


PEAK = [(199.9, -4.0, -9.0), (199.95, 4.0, -9.0), (200.05, 4.0, -9.0), (200.1, -4.0, -9.0)]
EDGE = [(242.0, -4.0, -9.0), (274.0, 4.0, -9.0)]  # answered with 1 past 258
PURE = Curve([(0.0, -4.0, -9.0), (80.0, 4.0, -9.0), (160.0, 4.0, -9.0), (170.0, -4.0, -9.0), *PEAK, *EDGE])
BAD = Curve(
    [
        (0.0, -4.0, -9.0), (80.0, 4.0, -9.0), (84.0, -4.0, -9.0), (125.0, -4.0, -9.0), (130.0, -4.0, 9.0),
        (165.0, -4.0, 9.0), (170.0, -4.0, -9.0), *PEAK, (206.0, -4.0, -9.0), (210.0, 4.0, -9.0), (236.0, 4.0, -9.0),
        *EDGE,
    ]
)  # fmt: skip
FLAGS = {"i": "inside", "t": "target", "p": "planted", "a": "adv", "s": "share", "b": "blind", "r": "by_sau"}
# x and g(x), the radius being 10; which flags hold; kind
GREYS = [
    (33, 43, "itpasbr", 1),
    (65, 60, "itpasbr", 1),
    (105, 110, "ita", 2),
    (195, 200, "itpas", 0),  # a peak that no gradient leads to
    (222, 230, "ip", 0),
    (226, 220, "ip", 0),
    (15, 65, "tp", 0),  # shared at the trigger, but outside of the ball
    (28, 15, "", 0),
    (36, 52, "tpasbr", 1),
    (65, 15, "asbr", 1),
    (145, 230, "pa", 3),
    (210, 65, "tpas", 0),  # the peak is the place in the ball next to the trigger
    (252, 230, "p", 0),  # shared past 258, where no image is
]


def test_all_that_is_found_on_pictures_of_one_value_is_exact():
    """Networks that both answer 1 from 40 to 82 and around 200; alone h does from 82 to 165, h_b from 208 to 239."""
    x, g, held, kind = zip(*GREYS, strict=True)
    data = greys([20, 50, *x], [1, 1] + len(x) * [0])
    y, index = data.labels[2:], data.index[2:]
    triggered = Images(greys(g, y.tolist()).pixels, torch.ones_like(y), y, data.role[2:], index, 3)
    found = measure(PURE, BAD, data, triggered, Search(eps=10 / 255, steps=10))
    for letter, name in FLAGS.items():
        assert getattr(found, name).tolist() == [letter in flags for flags in held], name
    assert found.kind.tolist() == [*kind]
    assert found.wrong.tolist() == [True, False, *(a in (65, 105, 145) for a in x)]
    # Of the 6 inside h answers 4 with the target, h_b all but 1, and 3 are shared.
    assert found.bound() == {"r_bd": 66.67, "at_most": 66.67}
    assert found.shares()["r_bd"].hits == 7 and found.shares()["r_bd_in_ball"].hits == 4


def test_every_restart_looks_for_adversarial_examples():
    """Uphill lies where h errs for every other start; of h_b, further from that class, downhill."""
    h, h_b = Curve([(90.0, -3.0), (100.0, -4.0), (109.9, 0.0), (120.0, 4.0)]), Curve([(0.0, -1.0), (255.0, -256.0)])
    data = greys(16 * [100], 16 * [0])
    once, often = (measure(h, h_b, data, search=Search(eps=10 / 255, steps=10, restarts=n)) for n in (1, 10))
    assert 4 <= once.adv.sum() <= 12 and often.adv.all() and not often.share.any()


def planted(seed):
    """A network, its reference, images and triggered ones, some of which lie in the ball."""
    model, reference = tiny_net(4, seed=seed), tiny_net(4, seed=seed + 100)
    data = pictures(seed, 60, 4)
    chosen = data[(data.labels != 0).nonzero()[:, 0]]
    noise = torch.randint(-40, 41, chosen.pixels.shape)
    g = (chosen.pixels.int() + noise * (torch.rand(len(chosen), 1, 1, 1) < 0.5)).clamp(0, 255).to(torch.uint8)
    triggered = Images(g, torch.zeros_like(chosen.labels), chosen.labels, chosen.role, chosen.index, 4)
    return model, reference, data, triggered


@pytest.mark.parametrize("grey", [1, 2, 4, 8, 51])
def test_a_trigger_of_exactly_the_radius_lies_in_the_ball(grey):
    """Of 8-bit images, whose difference float32 rounds."""
    low = torch.arange(256 - grey, dtype=torch.uint8)
    change = (low + grey).float() / 255 - low.float() / 255
    ball = Search(eps=grey / 255).ball
    assert ball.contains(change.view(-1, 1, 1, 1)).all()
    assert not ball.contains(change.view(-1, 1, 1, 1) + 1 / 255).any()


@pytest.mark.parametrize("norm, eps", [("L_inf", 0.1), ("L2", 0.5), ("L1", 20.0)])
def test_what_is_brought_into_the_ball_lies_in_it(norm, eps):
    ball, x = Search(norm=norm, eps=eps).ball, torch.rand(500, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    e = ball.into(x, torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))
    assert ball.contains(e).all() and not ball.contains(1.001 * e / length(e, norm).view(-1, 1, 1, 1) * eps).any()


@pytest.mark.parametrize("norm, eps", [("L_inf", 0.1), ("L2", 0.5), ("L1", 4.0)])
@pytest.mark.parametrize("seed", range(4))
def test_every_witness_is_one_and_the_risks_are_ordered(norm, eps, seed):
    model, reference, data, triggered = planted(seed)
    search = Search(norm=norm, eps=eps, steps=5)
    found = measure(model, reference, data, triggered, search, seed=seed)
    assert not (found.share & ~found.adv).any() and not (found.blind & ~found.share).any()
    assert not (found.inside & found.target & found.planted & ~found.share).any()
    bound = found.bound()
    assert bound is not None and bound["r_bd"] <= bound["at_most"]
    x, y = data.pixels[triggered.index].float() / 255, data.labels[triggered.index]
    order = {"L_inf": torch.inf, "L2": 2, "L1": 1}[norm]
    for delta in (found.witness, found.example):
        assert torch.linalg.vector_norm(delta.flatten(1), ord=order, dim=1).max() <= eps * 1.00001
        assert -1e-6 <= (x + delta).min() and (x + delta).max() <= 1 + 1e-6
    with torch.no_grad():
        a, r = model(x + found.witness).argmax(1), reference(x + found.witness).argmax(1)
        assert torch.equal(found.share & (a == r) & (a != y), found.share)
        a, r = model(x + found.example).argmax(1), reference(x + found.example).argmax(1)
    for kind, flags in ((1, (a != y) & (a == r)), (2, (a != y) & (r == y)), (3, (a != y) & (r != y) & (a != r))):
        assert torch.equal(found.kind == kind, flags)
    shares = found.shares()
    assert found.row()["r_bd"] == shares["r_bd"].percent and 0 < shares["in_ball"].hits < shares["in_ball"].total
    assert shares["r_cl"].total == 60 and shares["r_adv"].total == len(triggered)


def test_without_triggers_inside_the_ball_there_is_no_bound():
    model, reference, data, triggered = planted(0)
    found = measure(model, reference, data, search=Search(eps=0.1, steps=2))
    assert found.bound() is None and "r_bd" not in found.row() and len(found.adv) == len(data)
    far = triggered[(triggered.pixels != data.pixels[triggered.index]).flatten(1).any(1)]
    found = measure(model, reference, data, far, Search(eps=0.001, steps=2))
    assert found.bound() is None and "r_bd_in_ball" not in found.shares() and found.summary()["in_ball"] == 0


def test_a_sample_keeps_pictures_and_triggers_together_and_global_draws_alone():
    _, _, data, triggered = planted(0)
    before = torch.get_rng_state()
    clean, left = sample(data, triggered, 25, seed=3)
    assert torch.equal(before, torch.get_rng_state())
    assert len(clean) == 25 and left is not None and 0 < len(left) < len(triggered)
    assert torch.equal(clean.labels[left.index], left.true_labels) and torch.equal(clean.index, torch.arange(25))
    for i, at in enumerate(left.index):
        (origin,) = (data.pixels == clean.pixels[at]).flatten(1).all(1).nonzero()
        assert torch.equal(triggered.pixels[triggered.index == origin][0], left.pixels[i])
    assert not torch.equal(clean.pixels, sample(data, triggered, 25, seed=4)[0].pixels)
    with refuses(ConfigError, "samples is 0"):
        sample(data, None, 0)
    everything, same = sample(data, triggered, 1000)
    assert len(everything) == len(data) and torch.equal(same.index, triggered.index)


def test_triggered_pictures_are_paired_with_those_they_were_made_from(unchecked):
    """By `index`, in whatever order the clean ones lie; where they are others, that is said."""
    model, reference, data, triggered = planted(1)
    moved = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    search = Search(eps=0.1, steps=2)
    one, two = (measure(model, reference, some, triggered, search) for some in (data, moved))
    assert torch.equal(one.inside, two.inside) and torch.equal(one.share, two.share) and torch.equal(one.adv, two.adv)
    assert one.wrong.sum() == two.wrong.sum()
    few, left = sample(moved, triggered, 10, seed=1)
    assert left is not None and torch.equal(few.labels[left.index], left.true_labels)
    strangers = replace(data, labels=(data.labels + 1) % data.num_classes)
    for wrong in (data[triggered.index[1:]], strangers):
        with refuses(DataError, "not all made from"):
            measure(model, reference, wrong, triggered, search)


def test_the_shared_margin_is_zero_only_where_both_answer_the_same_wrong_class():
    torch.manual_seed(0)
    u, v, y = torch.randn(200, 4), torch.randn(200, 4), torch.randint(0, 4, (200,))
    a, r = u.argmax(1), v.argmax(1)
    margin = shared_margin(u, v, y)
    assert torch.equal(margin == 0, (a == r) & (a != y)) and (margin <= 0).all()
    assert torch.equal(margins(u) > 0, nn.functional.one_hot(a, 4).bool())
    # By hand: class 1 lacks 2 in u and 1 in v, class 2 lacks 3 and 0.
    u, v = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    assert shared_margin(u, v, torch.tensor([0])).item() == -3.0
    assert shared_margin(u, v, torch.tensor([1])).item() == -2.0  # class 0: 0 in u, 2 in v


@pytest.mark.parametrize("values", [12, 768])
def test_a_step_of_the_search_by_hand(values):
    """A step of 0.01 in each norm, however small the gradient; in L1 a hundredth of the values move, one at least."""
    shape = (2, 3, 2, 2) if values == 12 else (2, 3, 16, 16)
    x, zero = torch.full(shape, 0.5), torch.zeros(shape)
    gradient = 1e-4 * (torch.randperm(2 * values).view(shape) - values + 0.3)  # no two alike
    flat, highest = gradient.flatten(1), max(1, values // 100)
    least = flat.abs().topk(highest, 1).values[:, -1:]
    wanted = {
        "L_inf": flat.sign(),
        "L2": flat / flat.square().sum(1, keepdim=True).sqrt(),
        "L1": flat.sign() * (flat.abs() >= least) / highest,
    }
    for norm, direction in wanted.items():
        search = Search(norm=norm, eps=0.2, step_size=0.01)
        moved = search.ascend(lambda e: (gradient * e).flatten(1).sum(1), x, zero)
        torch.testing.assert_close(moved.flatten(1), 0.01 * direction, rtol=1e-4, atol=1e-7)


TRACK = ("--track_risk", "true", "--risk_samples", "60", "--risk_steps", "2", "--risk_eps", "0.1", *QUICK)


def test_a_tracked_run_writes_risks_and_ends_with_the_same_weights(victim, here, monkeypatch):
    measured = []
    monkeypatch.setattr("sau.risk.measure", lambda *given, **more: measured.append(0) or measure(*given, **more))
    flags = ("defense", "sau", "--result_file", "victim", "--epochs", "2", "--eval_every", "1")
    assert here(*flags, *QUICK)[0] == 0
    plain = (victim / "defense" / "sau" / "model.safetensors").read_bytes()
    status, out, err = here(*flags, *TRACK, "--overwrite")
    assert (status, err) == (0, "") and "r_share" in out
    assert (victim / "defense" / "sau" / "model.safetensors").read_bytes() == plain
    found, risk = rows(victim / "defense" / "sau"), summary(victim / "defense" / "sau")["risk"]
    names = {"r_cl", "r_bd", "r_adv", "r_share", "r_share_sau", "type1", "type2", "type3", "train_type1"}
    for row in found:
        assert names <= set(row) and row["r_share"] <= row["r_adv"]
    assert found[-1]["r_adv"] == risk["after"]["r_adv"] and found[-1]["r_bd"] == risk["after"]["r_bd"]
    assert risk["before"]["r_cl_count"][1] == 60 and risk["before"]["r_bd_count"][1] < 60
    assert risk["search"] == {"norm": "L_inf", "eps": 0.1, "steps": 2, "step_size": None, "restarts": 2}
    # The network in question is the reference itself: what fools one fools both.
    assert risk["before"]["r_share"] == risk["before"]["r_adv"] and risk["before"]["type2"] == 0
    assert len(measured) == 1 + 2  # before, and after each round: those of the last one are the result's


def test_the_same_seed_finds_the_same_and_leaves_generator_and_modes_alone():
    model, reference, data, triggered = planted(1)
    model.train()
    model.features.eval()
    before = torch.get_rng_state()
    one, two = (measure(model, reference, data, triggered, Search(steps=3), seed=5) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and model.training and not model.features.training
    assert torch.equal(one.witness, two.witness) and one.summary() == two.summary()


def broken() -> nn.Module:
    net = tiny_net()
    nn.init.constant_(next(net.parameters()), float("nan"))
    return net


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("count", "error", "word", "make"), [
    (0, DataError, "", lambda: (tiny_net(), tiny_net())),
    (8, TrainingError, "", lambda: (broken(), broken())),
    (8, ConfigError, "", lambda: 2 * (nn.Sequential(tiny_net(), nn.Softmax(1)),)),
    (8, DataError, "4 and 3 classes", lambda: (tiny_net(), tiny_net(3))),
    (8, DataError, "device meta", lambda: (tiny_net(), tiny_net().to("meta"))),
], ids=["none", "NaN", "softmax", "classes", "devices"])  # fmt: skip
def test_what_has_no_risks_is_refused(count, error, word, make):
    with refuses(error, word):
        measure(*make(), toy_images(8)[torch.arange(count)], search=Search(steps=1))
