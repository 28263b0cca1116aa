"""Updates that CUDA captures and repeats: the same as those that Python launches, or not captured, in a line."""

import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from toys import tiny_net, toy_images

from sau.attack import Attack, BadNet, InputAware, WaNet
from sau.config import Method
from sau.data.augment import Augment
from sau.data.images import to_float
from sau.defense import AT, D3, FP, FST, FT, FTSAM, NAD, NC, SAU
from sau.defense.base import Tuning
from sau.defense.hooks import classifier
from sau.errors import OutOfMemory
from sau.loop import Session
from sau.machine import captured
from sau.machine.parts import InParts
from sau.models import Normalized
from sau.models.frozen import FixedNorms, fixed_norms
from sau.models.generator import Artist
from sau.models.preact_resnet import PreActResNet18
from sau.optim import Training
from sau.optim.descent import Descent

NOT = "note: updates are not captured and repeated by CUDA, so Python launches each: "
BATCHES = 8, 8, 5, 8, 8, 5, 8, 8, 5  # pictures


def prepared(method: Method, where: torch.device, amp: bool = False, captured: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Normalized(tiny_net(), (0.5,) * 3, (0.25,) * 3, amp).to(where)
    model.captured, x = captured, torch.rand(1, 3, 16, 16, device=where)
    if isinstance(method, Attack):
        drawn = {"images": toy_images(40).to(where), "augment": Augment(2)}
        recipe = Training(lr_scheduler="OneCycleLR", epochs=28, lr=0.1)
        if isinstance(method, Masks):
            return method.prepare_masks(model, 3) | drawn
        return method.prepare(model.train(), recipe, 3) | drawn
    assert isinstance(method, Tuning)
    if isinstance(method, D3):
        return method.begin(model, method.driven(model, x), 3)
    return method.begin(model, classifier(model, x, "fst"), 3) if isinstance(method, FST) else method.prepare(model, 3)


def updates(
    method: Method, where: torch.device, amp: bool = False, captured: bool = True, count: int = len(BATCHES)
) -> tuple[list[float], InParts, list[str]]:
    """The losses of a few, of batches of two shapes."""
    images, said = toy_images(sum(BATCHES)).to(where), list[str]()
    if isinstance(method, Attack):
        method = method.forge(images, tiny_net(), Training(), session=Session(say=said.append))
    state, compose = prepared(method, where, amp, captured), method.compose if isinstance(method, Attack) else None
    session = Session(say=said.append)
    step = InParts(method.step, state, method.splits(), session, repeats=method.repeats(), compose=compose)
    pairs = list(zip(to_float(images.pixels).split(BATCHES), images.labels.split(BATCHES), strict=True))
    return [float(step(x, y)["loss"].detach()) for x, y in pairs[:count]], step, said


def networks(step: InParts) -> list[nn.Module]:
    """Those of which anything learns."""
    learning = {id(p) for one in step.state.values() if isinstance(one, Descent) for p in one.parameters}
    found = [thing for thing in step.state.values() if isinstance(thing, nn.Module)]
    parts = [part for one in found for part in (one.children() if isinstance(one, Artist) else [one])]
    return [part for part in parts if any(id(parameter) in learning for parameter in part.parameters())]


def weights(step: InParts) -> list[torch.Tensor]:
    """Of each network, in one vector."""
    return [torch.cat([one.detach().flatten() for one in network.parameters()]) for network in networks(step)]


@pytest.fixture
def capturer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stands in for CUDA: what is captured is done when it is repeated, then as captured. Counts repetitions."""
    repeated, capturing, begun = list[int](), Descent.capturing, list[Descent]()

    def begin(descent: Descent) -> Any:
        begun.append(descent)
        return capturing(descent)

    def capture(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], Callable[[], None]]:
        descents, report = [descent for descent in dict.fromkeys(begun) if descent.still], dict[str, Any]()
        assert descents
        assert all(group["capturable"] for descent in descents for group in descent.optimizer.param_groups)

        def replay() -> None:
            repeated.append(1)
            with contextlib.ExitStack() as stack:
                for descent in descents:
                    stack.enter_context(descent.capturing())
                    for group, rate in zip(descent.optimizer.param_groups, descent.rates, strict=True):
                        assert group["lr"] is rate
                report.update(work())

        return report, replay

    monkeypatch.setattr(Descent, "capturing", begin)
    monkeypatch.setattr(captured, "capable", lambda where: True)
    monkeypatch.setattr(captured, "capture", capture)
    # Where shapes are checked at every call, beartype draws from `random` which items of a list it looks at.
    monkeypatch.setattr(captured, "_draws", lambda: (DRAWS()[0], *DRAWS()[2:]))
    yield repeated


class Masks(InputAware):
    """Its first stage by itself."""

    step, compose = InputAware.mask_step, InputAware.compose_masks

    def repeats(self) -> bool:
        return True


CPU, DRAWS = torch.device("cpu"), captured._draws
METHODS = [
    BadNet(),
    FT(lr_scheduler="OneCycleLR", epochs=3),
    SAU(lr=2**-10),
    SAU(lr=2**-10, train_mode=True),
    AT(lr=2**-10, client_optimizer="adamw"),
    NC(),
    FTSAM(lr=2**-10),
    D3(lr=2**-10),
    FST(lr=2**-10),
    WaNet(pratio=0.25),
    InputAware(pratio=0.25, lr_G=2**-16),
    Masks(lr_M=2**-16),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_repeated_updates_are_those_that_python_launches(method, capturer):
    """Two shapes, each captured after its first batch; rates of OneCycleLR move with every update. On the device rates
    are of fp32, in which those of SAU and AT here are exact: where a search follows, rounding grows."""
    losses, step, said = updates(method, CPU)
    assert len(capturer) == len(BATCHES) - 2 and len(step.captured.captures) == 2
    assert said == ["updates are captured and repeated by CUDA (a CUDA graph)"]
    wanted, plain, _ = updates(method, CPU, captured=False)
    assert len(capturer) == len(BATCHES) - 2
    assert losses == pytest.approx(wanted, rel=1e-4)
    for one, other in zip(networks(step), networks(plain), strict=True):
        for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_methods_with_a_step_of_their_own_promise_nothing():
    """FP prunes and NAD looks into layers after every update: Python has to be there."""

    class Own(SAU):
        step = FT.step

    assert all(method.splits() and not method.repeats() for method in (FP(), NAD(), Own()))
    assert not SAU(outer_steps=2).repeats()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_cuda_repeats_them(method, amp):
    where = torch.device("cuda")
    losses, step, said = updates(method, where, amp=amp)
    assert len(step.captured.captures) == 2 and len(said) == 1
    wanted, plain, _ = updates(method, where, amp=amp, captured=False)
    # Sums come in another order each time; a search through statistics that move carries that further (0.03, once).
    carried = getattr(method, "train_mode", False)
    assert losses == pytest.approx(wanted, rel=0.2 if amp else 0.1 if carried else 1e-2)
    if "frozen" in step.state:
        assert step.state["frozen"].__self__.amp is amp
    # Adam goes by signs, also of a generator's gradients that are but rounding; of a weight that stays, it is 1.
    bound = 0.99 if isinstance(method, InputAware) else 0.5 if amp or carried else 0.1
    begun = updates(method, where, count=0)[1]
    for ours, theirs, before in zip(weights(step), weights(plain), weights(begun), strict=True):
        assert (ours - theirs).norm() < bound * (theirs - before).norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("amp", [False, True])
def test_fixed_norms_have_the_gradients_of_torch(amp, layout):
    """Of a network in eval mode with statistics and weights of its own."""
    where = torch.device("cuda")
    torch.manual_seed(0)
    model = Normalized(PreActResNet18(width=8), (0.5,) * 3, (0.25,) * 3).to(where, memory_format=layout).eval()
    model.amp = amp
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.3, 1.7), (module.bias.data, -0.1, 0.1),
            ):  # fmt: skip
                tensor.uniform_(low, high)
    x = torch.rand(16, 3, 32, 32, device=where).to(memory_format=layout).requires_grad_()
    found = []
    for context in (contextlib.nullcontext(), fixed_norms(model, x)):
        with context:
            z = model(x)
            named = type(model.net.layer1[0].bn1(model.net.conv1(x)).grad_fn).__name__
        assert ("FixedNorm" in named) is (len(found) == 1)
        norms = [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in (m.weight, m.bias)]
        found.append([z, *torch.autograd.grad(z.logsumexp(1).sum(), [x, *norms])])
    assert torch.equal(found[0][0], found[1][0])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (0.02 if amp else 1e-3) * theirs.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_cuda_refuses_leaves_stream_and_generator_as_they_were():
    """A network that reads the device and draws there: its ten updates are those that Python launches."""

    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x) * float(x.mean() > -1)

    found, where, said = [], torch.device("cuda"), list[str]()
    stream = torch.cuda.current_stream()
    for wanted in (True, False):
        torch.manual_seed(0)
        model = Normalized(nn.Sequential(nn.Flatten(), Reads(), nn.Linear(3 * 16 * 16, 4))).to(where)
        model.captured = wanted
        state = FT().prepare(model, 10)
        step = InParts(FT().step, state, True, Session(say=said.append), repeats=True)
        images = toy_images(8).to(where)
        found.append([float(step(to_float(images.pixels), images.labels)["loss"].detach()) for _ in range(10)])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and torch.cuda.current_stream() == stream
    assert len(said) == 1 and "so Python launches each" in said[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_starts_of_the_card_differ_when_repeated():
    method, where = AT(lr=1e-3, pgd_init="random"), torch.device("cuda")
    state = prepared(method, where)
    seen: list[torch.Tensor] = []

    def step(state: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**method.step(state, x, y), "start": method.pgd(state["model"], x, y)}

    images = toy_images(8).to(where)
    whole = InParts(step, state, True, Session(say=print), repeats=True)
    for _ in range(3):
        seen.append(whole(to_float(images.pixels), images.labels)["start"].clone())
    assert len(whole.captured.captures) == 1 and not torch.equal(seen[1], seen[2])


def test_the_optimiser_is_left_as_it_was(capturer):
    """Its groups have the schedule's numbers, so that a checkpoint knows nothing of captures."""
    ours, plain = (
        updates(METHODS[0], CPU, captured=wanted)[1].state["descent"].state_dict() for wanted in (True, False)
    )
    assert ours["optimizer"]["param_groups"] == plain["optimizer"]["param_groups"]
    assert ours["scheduler"]["last_epoch"] == plain["scheduler"]["last_epoch"] == len(BATCHES)


def test_what_draws_on_the_cpu_is_not_captured(capturer):
    """A repeated random start would always be the same one."""
    method = AT(lr=1e-3, pgd_init="random")
    torch.manual_seed(0)
    losses, step, said = updates(method, CPU)
    assert not capturer and step.captured.off and not step.captured.captures
    assert said == [NOT + "they draw random numbers on the CPU"]
    assert losses == updates(method, CPU, captured=False)[0]


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(1)])
def test_every_generator_of_the_cpu_is_watched(draw, capturer, monkeypatch):
    monkeypatch.setattr(captured, "_draws", DRAWS)
    state, method = prepared(FT(), CPU), FT()
    images, said = toy_images(8), list[str]()
    step = InParts(
        lambda state, x, y: (draw(), method.step(state, x, y))[1], state, True, Session(say=said.append), repeats=True
    )
    step(to_float(images.pixels), images.labels)
    assert step.captured.off and said == [NOT + "they draw random numbers on the CPU"]


@pytest.mark.parametrize("attack", [WaNet(pratio=0.25), InputAware(pratio=0.25, clean_train_epochs=1)])
def test_what_is_random_is_drawn_anew_for_each_repetition(attack, capturer, monkeypatch):
    """Whole training, in which every batch is composed, and repeated updates see other pictures each time."""
    images, composed = toy_images(40), list[torch.Tensor]()
    made = attack.forge(images, tiny_net(), Training(), session=Session(say=print))
    compose = type(made).compose

    def watched(self: Attack, state: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> Any:
        composed.append(compose(self, state, x, y)[0])
        return composed[-1], y

    monkeypatch.setattr(type(made), "compose", watched)
    recipe = Training(epochs=3, batch_size=8, lr_scheduler="constant")
    made.fit(Normalized(tiny_net()), images, recipe, augment=Augment(2), session=Session(say=lambda text: None))
    joint = made.classifier_epochs(recipe)
    assert len(composed) == 5 * joint and len(capturer) == 15 - (3 - joint > 0) - 1
    assert not any(torch.equal(one, other) for one in composed for other in composed if one is not other)


def test_fixed_norms_take_what_they_can():
    """Batch norm in eval mode, where a gradient is asked for; what uses the batch's statistics is torch's."""
    norm, x = nn.BatchNorm2d(3), torch.rand(4, 3, 2, 2)
    plain = norm.eval()(x)
    with FixedNorms():
        assert "FixedNorm" in type(norm(x).grad_fn).__name__ and torch.equal(norm(x), plain)
        assert "FixedNorm" not in type(norm.train()(x).grad_fn).__name__
        with torch.no_grad():
            assert norm.eval()(x).grad_fn is None
    assert isinstance(fixed_norms(norm, x), contextlib.nullcontext)


def test_what_cannot_be_captured_is_launched(capturer, monkeypatch):
    """One line, and the update that was made before it is not made again."""

    def refuse(work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    monkeypatch.setattr(captured, "capture", refuse)
    losses, step, said = updates(SAU(lr=1e-3), CPU)
    assert losses == updates(SAU(lr=1e-3), CPU, captured=False)[0] and step.captured.off
    why = "operation not permitted when stream is capturing"
    assert said == [NOT + why]


@pytest.mark.parametrize("method", [SAU(outer_steps=2), FT(client_optimizer="adadelta")])
def test_rates_that_python_reads_are_not_captured(method, capturer):
    assert updates(method, CPU) and not capturer


def test_shapes_keep_memory_so_few_are_captured(capturer):
    state = prepared(FT(), CPU)
    said = list[str]()
    step = InParts(FT().step, state, True, Session(say=said.append), repeats=True)
    images = toy_images(16)
    x, y = to_float(images.pixels), images.labels
    for _ in range(2):
        for n in range(2, 12):
            step(x[:n], y[:n])
    assert len(step.captured.captures) == captured.SHAPES == len(capturer)
    assert said[1:] == ["note: batches of 4 shapes are repeated by CUDA, Python launches those of others"]


def test_who_looks_on_sees_every_update(capturer):
    """A counter of operations would miss those of a repeated update."""
    from torch.utils.flop_counter import FlopCounterMode

    state = prepared(FT(), CPU)
    step = InParts(FT().step, state, True, Session(say=print), repeats=True)
    images = toy_images(8)
    x, y = to_float(images.pixels), images.labels
    step(x, y)
    counts = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            step(x, y)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0 and not capturer


def test_copies_keep_what_was_said():
    model = Normalized(tiny_net())
    assert model.captured
    model.captured = False
    assert not copy.deepcopy(model).captured


def test_memory_that_is_wanted_is_given_back_before_a_batch_is_split(capturer):
    """Recordings keep that of a step each, so that what fitted before may not beside them."""
    method, said, full = SAU(lr=1e-3), list[str](), [False]
    state = prepared(method, CPU)

    def step(state: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        if full[0] and len(x) == 8 and whole.captured.captures:
            raise torch.OutOfMemoryError("injected")
        return method.step(state, x, y)

    whole = InParts(step, state, True, Session(say=said.append), repeats=True)
    images = toy_images(8)
    x, y = to_float(images.pixels), images.labels
    whole(x[:5], y[:5])
    full[0] = True
    whole(x, y)
    assert whole.parts == 1 and whole.captured.off and not whole.captured.captures
    assert said[1:] == [NOT + "their memory is wanted"]


def test_memory_that_runs_out_while_a_batch_is_composed(capturer):
    """As in the step: what captures hold is given back first; where there are none, one line."""
    state, said, full = prepared(FT(), CPU), list[str](), [0]

    def compose(state: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if full[0] > 1 or (full[0] and whole.captured.captures):
            raise torch.OutOfMemoryError("injected")
        return x, y

    whole = InParts(FT().step, state, False, Session(say=said.append), repeats=True, compose=compose)
    images = toy_images(8)
    x, y = to_float(images.pixels), images.labels
    for full[0] in (0, 1):
        whole(x, y)
    assert whole.captured.off and said[1:] == [NOT + "their memory is wanted"]
    full[0] = 2
    with pytest.raises(OutOfMemory, match="out of memory with 8 pictures; try a smaller --batch_size"):
        whole(x, y)


def test_every_part_has_its_share_of_what_stands_in_front():
    """The batches of attacks begin with the triggered pictures."""
    state, seen, full = prepared(FT(), CPU), list[list[int]](), [True]

    def step(state: dict[str, Any], x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        if full[0] and len(x) > 3:
            raise torch.OutOfMemoryError("injected")
        seen.append(y.tolist())
        return FT().step(state, x, y)

    whole = InParts(step, state, True, Session(say=print))
    whole(torch.rand(9, 3, 16, 16), torch.tensor([3, 3, 3, 0, 0, 0, 1, 1, 1]))
    assert seen == [[3, 0, 1], [3, 0], [3, 1], [0, 1]] and whole.parts == 4
    seen.clear()
    whole(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    assert seen == [[0], [1]]


@pytest.mark.parametrize(("affine", "size"), [(True, (2, 2)), (True, ()), (False, (3,))])
def test_fixed_norms_by_hand(affine, size, monkeypatch):
    """The gradients of torch's batch norm, with the kernels of a card by their formulas."""

    def across(tensor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return tensor.view(-1, *[1] * (x.ndim - 2))

    def elemt(x: torch.Tensor, weight: None, bias: None, mean: torch.Tensor, inverse: torch.Tensor, eps: float) -> Any:
        return (x - across(mean, x)) * across(inverse, x)

    def reduce(gradient: torch.Tensor, x: torch.Tensor, mean: Any, inverse: Any, weight: Any, *asked: bool) -> Any:
        assert asked == (False, True, True)
        others = [n for n in range(x.ndim) if n != 1]
        return None, None, (gradient * elemt(x, None, None, mean, inverse, 0.0)).sum(others), gradient.sum(others)

    monkeypatch.setattr(torch, "batch_norm_elemt", elemt)
    monkeypatch.setattr(torch, "batch_norm_backward_reduce", reduce)
    torch.manual_seed(0)
    norm = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d}[len(size)](3, affine=affine).double().eval()
    for tensor in (norm.running_mean, norm.running_var, *norm.parameters()):
        tensor.data.uniform_(0.5, 2)
    x = torch.rand(5, 3, *size, dtype=torch.double, requires_grad=True)
    found = []
    for context in (contextlib.nullcontext(), FixedNorms()):
        with context:
            found.append(torch.autograd.grad(norm(x).square().sum(), [x, *norm.parameters()]))
    for theirs, ours in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12)
