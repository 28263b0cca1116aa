"""SAU: equal to the released order of work (its twin in `released_sau`), and each part right by itself."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from released_sau import ReleasedSAU
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sau.defense.sau import SAU, example_types, jensen_shannon, unsharing_loss
from sau.models import Normalized, PreActResNet18
from sau.pgd import Ball

CLASSES, BATCH, LR = 4, 16, 3e-3
OURS = {  # the release's options by our names
    "trigger_norm": "eps", "norm_type": "norm", "beta_1": "inner_adv", "beta_2": "inner_shared",
    "lmd_1": "weight_clean", "lmd_2": "weight_adv", "lmd_3": "weight_shared",
}  # fmt: skip


@pytest.fixture(autouse=True)
def small_multiple(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared images leave the small batches of these tests as they leave large ones elsewhere."""
    monkeypatch.setattr("sau.defense.sau.BATCH_MULTIPLE", 4)


@cache
def pictures(n: int = 64) -> tuple[Tensor, Tensor]:
    """A faint coarse pattern for each class under strong noise, so that networks err on some pictures."""
    random = torch.Generator().manual_seed(0)
    pattern = torch.randn(CLASSES, 3, 4, 4, generator=random).repeat_interleave(4, 2).repeat_interleave(4, 3)
    y = torch.randint(CLASSES, (n,), generator=random)
    x = 0.5 + 0.08 * pattern[y] + 0.25 * torch.randn(n, 3, 16, 16, generator=random)
    return x.clamp(0, 1).double(), y


def stamped(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., -3:, -3:] = 1
    return x


@cache
def _trained(kind: str) -> nn.Module:
    torch.manual_seed(0)
    net: nn.Module = PreActResNet18(CLASSES, width=4)
    steps = 20
    if kind == "conv":
        stem = (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        net = nn.Sequential(*stem, nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
        steps = 30
    model = Normalized(net, (0.5, 0.45, 0.4), (0.25, 0.3, 0.35)).double().train()
    x, y = pictures()
    x, y = torch.cat([x, stamped(x)]), torch.cat([y, torch.zeros_like(y)])
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        some = torch.randperm(len(x))[:48]
        optimizer.zero_grad()
        F.cross_entropy(model(x[some]), y[some]).backward()
        optimizer.step()
    return model.eval()


def backdoored(kind: str = "conv") -> nn.Module:
    """A network trained for a moment on clean and on stamped images; a new copy for every caller."""
    return copy.deepcopy(_trained(kind)).requires_grad_(True)


def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(*(tensor.split(BATCH)[:count] for tensor in pictures()), strict=True)


def apart(method: SAU, kind: str = "conv") -> dict[str, Any]:
    """The state of a run in which h has already left h_b."""
    state = method.prepare(backdoored(kind), range(4))
    for x, y in batches(2):
        method.step(state, x, y)
    return state


def search(method: SAU, state: dict[str, Any], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    h, h_b = state["model"], state["_reference"]
    return method.shared_pgd(h, h_b, x, y, h(x).argmax(1), h_b(x).argmax(1))


@pytest.mark.parametrize("stop_fooled", [True, False])
def test_the_search_in_chunks_is_the_search_of_the_batch(stop_fooled, monkeypatch):
    """Samples do not depend on each other; float64, bit for bit."""
    method = SAU(lr=LR, stop_fooled=stop_fooled)
    state = apart(method)
    x, y = pictures(50)
    whole = search(method, state, x, y)
    monkeypatch.setattr("sau.defense.sau.AT_ONCE_ON_CPU", 16)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(search(method, state, x, y), whole, strict=True))


class Line(nn.Module):
    """Two classes by the mean m of an image alone: logits (-k, k) with k = slope * (m - edge)."""

    def __init__(self, edge: float, slope: float = 10.0) -> None:
        super().__init__()
        self.edge, self.slope = nn.Parameter(torch.tensor(edge)), slope

    def forward(self, x: Tensor) -> Tensor:
        k = self.slope * (x.mean((1, 2, 3)) - self.edge)
        return torch.stack([-k, k], 1)


def lines(method: SAU, edge: float, edge_ref: float, slope_ref: float = 10.0) -> dict[str, Any]:
    state = method.prepare(Line(edge), range(1))
    state["_reference"] = Line(edge_ref, slope_ref).eval().requires_grad_(False)
    return state


def plain(value: float, n: int = 2) -> Tensor:
    return torch.full((n, 3, 2, 2), value)


@contextmanager
def seen(*modules: nn.Module) -> Iterator[list[list[int]]]:
    """How many images each forward pass of each module got."""
    sizes: list[list[int]] = [[] for _ in modules]
    counters = [lambda _, inputs, into=into: into.append(len(inputs[0])) for into in sizes]
    hooks = [module.register_forward_pre_hook(count) for module, count in zip(modules, counters, strict=True)]
    yield sizes
    for hook in hooks:
        hook.remove()


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "train_mode": {"train_mode": True},
    "outer_steps": {"outer_steps": 2},
    "L2": {"norm_type": "L2", "trigger_norm": 2.5, "adv_lr": 0.1, "adv_steps": 3},
    "L1": {"norm_type": "L1", "trigger_norm": 40.0, "adv_lr": 0.1, "adv_steps": 3},
    "Reg": {"norm_type": "Reg", "adv_lr": 0.07, "adv_steps": 3},
    "lmd_2": {"lmd_2": 0.5, "lmd_1": 0.7, "lmd_3": 1.3},
    "zero": {"pgd_init": "zero", "adv_lr": 0.05, "adv_steps": 6},
    "min": {"pgd_init": "min", "beta_1": 0.1, "beta_2": 0.5},
    "everything": {"train_mode": True, "outer_steps": 2, "lmd_2": 0.5, "pgd_init": "zero", "trigger_norm": 0.1},
}


def kept(monkeypatch: pytest.MonkeyPatch, cls: type, name: str) -> list[Any]:
    """What a method returns from now on."""
    results, original = [], getattr(cls, name)

    def keep(self: Any, *inputs: Any) -> Any:
        results.append(original(self, *inputs))
        return results[-1]

    monkeypatch.setattr(cls, name, keep)
    return results


@pytest.mark.parametrize(
    ("kind", "case"),
    [("conv", case) for case in CASES]
    + [("resnet", case) for case in ("default", "train_mode", "outer_steps", "L2", "lmd_2", "everything")],
)
def test_equals_the_release_in_float64(kind: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perturbations bit by bit; losses, weights and statistics up to the rounding of sums in another order.
    L1 and L2 shrink by a quotient of sums, so there the last bit may differ as well."""
    options: dict[str, Any] = {"lr": LR, **CASES[case]}
    ours = SAU(**{OURS.get(name, name): value for name, value in options.items()})
    state, twin = ours.prepare(backdoored(kind), range(4)), ReleasedSAU(backdoored(kind), backdoored(kind), **options)
    found, expected_found = kept(monkeypatch, SAU, "shared_pgd"), kept(monkeypatch, ReleasedSAU, "perturb")
    masked = 0
    for x, y in batches(3):
        report, losses = ours.step(state, x, y), twin.step(x, y)
        (delta, s), expected = found.pop(), expected_found.pop()
        if ours.norm in ("L1", "L2"):
            torch.testing.assert_close(delta, expected, rtol=0, atol=1e-12)
        else:
            assert torch.equal(delta, expected)
        masked += int(((s != y) & (s != twin.h_b(x).argmax(1))).sum())
        for name in ("loss", "clean_loss", "shared_loss", "adv_loss")[: 3 + bool(ours.weight_adv)]:
            torch.testing.assert_close(report[name].detach(), losses[name], rtol=0, atol=1e-9, check_dtype=False)
        for (name, value), other in zip(state["model"].state_dict().items(), twin.h.state_dict().values(), strict=True):
            torch.testing.assert_close(value, other, rtol=0, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    assert 0 < masked < 3 * BATCH  # otherwise the comparison would show nothing


@pytest.mark.parametrize("options", [
    {}, {"adv_steps": 1}, {"stop_fooled": False}, {"success": "label"}, {"clip_pixels": True}, {"norm": "L2"},
])  # fmt: skip
def test_answers_belong_to_the_perturbations(options: dict[str, Any]) -> None:
    method = SAU(lr=LR, **options)
    for kind in ("conv", "resnet"):
        state = apart(method, kind)
        for x, y in batches(4):
            delta, s = search(method, state, x, y)
            assert torch.equal(s, state["_reference"](x + delta).argmax(1))


def test_all_shared_ends_the_search() -> None:
    """m = 0.4 + 0.2 lies beyond both edges, so everything is shared before the first step.
    h: clean, one step, outer. h_b: clean, one step; its answers on the examples are then known."""
    method = SAU()
    state = lines(method, 0.5, 0.5)
    x, y = plain(0.4), torch.zeros(2, dtype=torch.long)
    with seen(state["model"], state["_reference"]) as sizes:
        method.step(state, x, y)
    assert sizes == [[2, 2, 2], [2, 2]]
    delta, s = search(method, state, x, y)
    assert torch.equal(delta, plain(0.2)) and s.tolist() == [1, 1]


@pytest.mark.parametrize(("multiple", "left"), [(1, 3), (2, 4), (3, 3), (4, 4), (32, 5)])
def test_shared_images_leave_the_batch(multiple: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """m = 0.4 is shared from the start and leaves; m = 0.1 cannot reach the edge, so three walk on through all steps.
    Some shared ones stay where that makes the batch such a multiple."""
    monkeypatch.setattr("sau.defense.sau.BATCH_MULTIPLE", multiple)
    method = SAU(adv_steps=3)
    state = lines(method, 0.5, 0.5)
    x = torch.cat([plain(value, 1) for value in (0.1, 0.4, 0.1, 0.4, 0.1)])
    with seen(state["model"], state["_reference"]) as sizes:
        method.step(state, x, torch.zeros(5, dtype=torch.long))
    assert sizes == [[5, 5, left, left, 5], [5, 5, left, left, left]]
    _, s = search(method, state, x, torch.zeros(5, dtype=torch.long))
    assert s.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.parametrize(("norm", "values"), [("L_inf", 1), ("L2", 192**0.5), ("L1", 192)])
def test_a_ball_contains_what_lies_in_it_up_to_rounding(norm: Any, values: float) -> None:
    """Of g - x, whose values may each be 2^-23 off, and not of what is a hundredth outside."""
    ball = Ball(norm=norm, eps=0.01)
    e = torch.full((1, 3, 8, 8), 0.01 / values)
    assert [bool(ball.contains(e + off)) for off in (0.0, 2**-24, 0.0001 / values)] == [True, True, False]


def test_jensen_shannon_by_hand() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4), m = (5/8, 3/8):
    JS = 1/2 [1/2 ln 4/5 + 1/2 ln 4/3] + 1/2 [3/4 ln 6/5 + 1/4 ln 2/3]
       = 1/2 [-0.1115718 + 0.1438410] + 1/2 [0.1367412 - 0.1013663] = 0.0161346 + 0.0176875 = 0.0338221
    Equal distributions are 0 apart, disjoint ones ln 2; the clamp keeps the latter finite. Of p = (1 - 1e-10, 1e-10)
    the small entry counts as 1e-8; with q = (1 - 1e-6, 1e-6), so m_2 = 5.05e-7,
    2 JS = [5e-7 + 1e-8 ln(1e-8 / 5.05e-7)] + [-5e-7 + 1e-6 ln(1e-6 / 5.05e-7)] = -3.922e-8 + 6.832e-7 = 6.440e-7."""
    p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[0.75, 0.25]]).double()
    assert jensen_shannon(p.log(), q.log() + 3).item() == pytest.approx(0.0338221, abs=1e-7)
    assert jensen_shannon(q.log(), p.log()).item() == pytest.approx(0.0338221, abs=1e-7)
    far = torch.tensor([[1000.0, 0.0], [1.0, 1.0]]).double()
    assert jensen_shannon(far, far.flip(1)).tolist() == pytest.approx([math.log(2), 0], abs=1e-6)
    p, q = torch.tensor([[1 - 1e-10, 1e-10], [1 - 1e-6, 1e-6]], dtype=torch.float64).log().split(1)
    assert jensen_shannon(p, q).item() == pytest.approx(3.220e-7, abs=2e-10)


def test_unsharing_loss_by_hand() -> None:
    """p_s = 1/2, 3/4 and 1/4, the last one masked, all others 0: (ln 2 + ln 4) / 3 = 0.6931472, up to 1e-6.
    Inside the logarithms 1e-6 is added to 1/2 and to 1/4: (0.6931452 + 1.3862904) / 3 = 0.6931452."""
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.25, 0.5, 0.25]]).double()
    s, mask = torch.tensor([0, 1, 0]), torch.tensor([True, True, False])
    assert unsharing_loss(p.log() - 2, s, mask).item() == pytest.approx(0.6931452, abs=1e-7)
    assert unsharing_loss(p.log(), s, torch.zeros(3, dtype=torch.bool)).item() == 0


def test_unsharing_loss_at_its_ends() -> None:
    """p_s = 0.0005 counts as 0.001: -ln(0.999 + 1e-6) = 0.0009995; p_s = 1 stays finite: -ln 1e-6 = 13.815511.
    Without the clamps -log(1 - p_s) of logits 80 and 0 is 80, its gradient 1; as released it is 13.8 and has none."""
    z = torch.tensor([[0.0005, 0.9995]]).double().log()
    s, mask = torch.tensor([0]), torch.tensor([True])
    assert unsharing_loss(z, s, mask).item() == pytest.approx(0.0009995, abs=1e-7)
    sure = torch.tensor([[80.0, 0.0]]).double()
    assert unsharing_loss(sure, s, mask).item() == pytest.approx(13.815511, abs=1e-6)
    assert unsharing_loss(sure.float(), s, mask).item() == pytest.approx(13.8, abs=0.1)
    for clamped, value, slope in ((True, 13.8, 0.0), (False, 80.0, 1.0)):
        sure = torch.tensor([[80.0, 0.0]], requires_grad=True)
        loss = unsharing_loss(sure, s, mask, clamped)
        assert loss.item() == pytest.approx(value, abs=0.1)
        (gradient,) = torch.autograd.grad(loss, sure)
        assert gradient.tolist()[0] == pytest.approx([slope, -slope], abs=1e-6)
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).double()  # where nothing is clamped
    s, mask = torch.arange(9) % 5, torch.arange(9) % 3 > 0
    assert unsharing_loss(z, s, mask, False).item() == pytest.approx(unsharing_loss(z, s, mask).item(), abs=1e-5)


def test_clamp_loss() -> None:
    """h answers 1 with logits (-100, 100) under e. Only without the clamps does it move away from there."""
    x, y = plain(0.5), torch.zeros(2, dtype=torch.long)
    for clamp, moves in ((True, False), (False, True)):
        method = SAU(weight_clean=0.0, clamp_loss=clamp)
        state = lines(method, 0.6, 0.6)
        state["model"].slope = 1000.0
        method.step(state, x, y)
        assert (state["model"].edge.item() > 0.60005) == moves


def test_distill() -> None:
    state, (x, y) = apart(method := SAU(lr=LR, distill=0.7)), next(batches(1))
    z, q = state["model"](x).log_softmax(1), state["_reference"](x).softmax(1)
    expected = -(0.3 * z[torch.arange(BATCH), y] + 0.7 * (q * z).sum(1)).mean()
    torch.testing.assert_close(method.step(state, x, y)["clean_loss"], expected)


@pytest.mark.parametrize(("p_s", "clamped", "moves"), [
    (0.0009, True, False), (0.0011, True, True), (0.5, True, True), (0.0009, False, True), (0.5, False, True),
])  # fmt: skip
def test_unsharing_gradient_is_cut(p_s: float, clamped: bool, moves: bool) -> None:
    """Nothing is gained by pushing p_s below 0.001, if `clamped`; else the gradient with respect to z_s is p_s."""
    z = torch.tensor([[p_s, 1 - p_s]]).double().log().requires_grad_()
    gradient = torch.autograd.grad(unsharing_loss(z, torch.tensor([0]), torch.tensor([True]), clamped), z)[0]
    assert gradient[0, 0].item() == (pytest.approx(p_s, rel=1e-5) if moves else 0.0)


def test_types_of_adversarial_examples() -> None:
    """y = 0 throughout: right, right though h_b errs, type I (twice), type II (three times), type III."""
    answer, s = torch.tensor([0, 0, 1, 2, 1, 2, 1, 2]), torch.tensor([0, 1, 1, 2, 0, 0, 0, 1])
    assert example_types(answer, s, torch.zeros(8, dtype=torch.long)).tolist() == [0, 0, 1, 1, 2, 2, 2, 3]


def test_the_types_that_are_reported() -> None:
    """Of the examples found, before the update; the losses are compared with the release's above."""
    method = SAU(lr=LR)
    state, (x, y) = apart(method), pictures()
    delta, s = search(method, state, x, y)
    types = example_types(state["model"](x + delta).argmax(1), s, y)
    report = method.step(state, x, y)
    assert [int(report[f"train_type{kind}"]) for kind in (1, 2, 3)] == types.bincount(minlength=4)[1:].tolist()


def work(function: Any, x: Tensor, y: Tensor, model: nn.Module) -> float:
    """Multiplications of `function(x, y)` in units of a forward pass of `model` on `x`, backward passes included."""
    with FlopCounterMode(display=False) as unit, torch.no_grad():
        model(x)
    with FlopCounterMode(display=False) as all_of_it:
        function(x, y)
    return all_of_it.get_total_flops() / unit.get_total_flops()


@pytest.mark.parametrize("steps", [2, 5])
def test_cost_without_leaving(steps: int) -> None:
    """4T + 8 forward passes where nothing is shared: the specified 4T + 7 and h_b's answers on the clean batch.
    The release takes 8T + 8. First layers need no gradient of an image in the outer step, hence the small slack."""
    x, y = next(batches(1))
    options = {"adv_steps": steps, "lr": LR, "pgd_init": "zero", "adv_lr": 1e-9, "trigger_norm": 1e-9}
    state = SAU().prepare(backdoored("resnet"), range(1))
    twin = ReleasedSAU(backdoored("resnet"), backdoored("resnet"), **options)  # type: ignore[arg-type]
    ours = SAU(**{OURS.get(name, name): value for name, value in options.items()})
    with seen(state["model"], state["_reference"]) as sizes:
        cost = work(lambda a, b: ours.step(state, a, b), x, y, backdoored("resnet"))
    assert sizes == [[BATCH] * (steps + 2)] * 2 and 4 * steps + 7.9 < cost <= 4 * steps + 8
    assert 8 * steps + 7.9 < work(twin.step, x, y, twin.h) <= 8 * steps + 8


def test_clip_pixels() -> None:
    state = apart(SAU(lr=LR))
    x, y = pictures()
    free, clipped = (x + search(SAU(clip_pixels=clip), state, x, y)[0] for clip in (False, True))
    assert float(free.min()) < -0.1 and float(free.max()) > 1.1
    assert float(clipped.min()) >= -1e-12 and float(clipped.max()) <= 1 + 1e-12
    assert (clipped - x).abs().max() <= 0.2 + 1e-12


@pytest.mark.parametrize("stop_fooled", [True, False])
def test_clipped_answers_belong_to_the_perturbations(stop_fooled: bool) -> None:
    """m = 0.9 + 0.2 lies beyond the edges at 1.05, but the image that is left after clipping does not."""
    method = SAU(clip_pixels=True, stop_fooled=stop_fooled)
    state = lines(method, 1.05, 1.05)
    delta, s = search(method, state, plain(0.9), torch.zeros(2, dtype=torch.long))
    assert torch.allclose(delta, plain(0.1)) and s.tolist() == [0, 0]


@pytest.mark.parametrize(("switches", "moved"), [
    ({"success": "label"}, 0.0), ({"success": "prediction"}, 0.2), ({"success": "label", "stop_fooled": False}, 0.2),
])  # fmt: skip
def test_success_by_prediction_or_label(switches: dict[str, Any], moved: float) -> None:
    """Both networks wrongly answer 1 on the clean image: a success by the label, which ends the search, but nothing has
    moved yet. Without the stop, cross-entropy drives m further up."""
    method, y = SAU(pgd_init="zero", **switches), torch.zeros(2, dtype=torch.long)
    assert torch.equal(search(method, lines(method, 0.5, 0.5), plain(0.6), y)[0], plain(moved))


def test_stop_fooled() -> None:
    """h, already fooled, pulls m up strongly; h_b, not yet fooled, pulls it down weakly and alone once h is dropped."""
    x, y = plain(0.6), torch.zeros(2, dtype=torch.long)
    for stop, moved in ((True, -0.2), (False, 0.2)):
        method = SAU(success="label", stop_fooled=stop, pgd_init="zero", inner_shared=0.0)
        state = lines(method, 0.5, 0.3, slope_ref=-10.0)
        assert torch.equal(search(method, state, x, y)[0], plain(moved))


def test_outer_mask() -> None:
    """h_b answers 1 with and without perturbation, and y = 0: it errs but has not moved.
    m = 0.6 + 0.2 gives logits (-3, 3), so the loss is -ln p_0 = ln(1 + e^6) = 6.0025, a little less by the offset."""
    x, y = plain(0.6), torch.zeros(2, dtype=torch.long)
    for mask, expected in (("moved", 0.0), ("wrong", 6.0025)):
        method = SAU(outer_mask=mask)  # type: ignore[arg-type]
        assert method.step(lines(method, 0.5, 0.5), x, y)["shared_loss"].item() == pytest.approx(expected, abs=1e-3)
