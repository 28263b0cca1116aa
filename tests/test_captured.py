"""Updates that CUDA captures and repeats: the same as those that Python launches, or not captured, in a line."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from toys import tiny_net, toy_images

from sau.attack import BadNet
from sau.data.images import to_float
from sau.defense import AT, FP, FT, NAD, NC, SAU
from sau.machine import captured
from sau.machine.parts import InParts
from sau.method import Method
from sau.models import Normalized
from sau.optim import Training
from sau.optim.descent import Descent
from sau.session import Session

NOT = "note: updates are not captured and repeated by CUDA, so Python launches each: "
BATCHES = 8, 8, 5, 8, 8, 5, 8, 8, 5  # pictures


def prepared(method: Method, where: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Normalized(tiny_net(), (0.5,) * 3, (0.25,) * 3).to(where)
    if isinstance(method, BadNet):
        return method.prepare(model.train(), Training(lr_scheduler="OneCycleLR", epochs=3, lr=0.1), 3)
    assert isinstance(method, FT | SAU | AT)
    return method.prepare(model, 3)


def updates(method: Method, where: torch.device, **told: bool) -> tuple[list[float], nn.Module, InParts, list[str]]:
    """The losses and the network after a few, of batches of two shapes."""
    state, said = prepared(method, where), list[str]()
    for name, value in told.items():
        setattr(state["model"], name, value)
    step = InParts(method.step, state, method.splits(), Session(say=said.append), repeats=method.repeats())
    images = toy_images(sum(BATCHES)).to(where)
    pairs = zip(to_float(images.pixels).split(BATCHES), images.labels.split(BATCHES), strict=True)
    return [float(step(x, y)["loss"].detach()) for x, y in pairs], state["model"], step, said


@pytest.fixture
def capturer(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stands in for CUDA: what is captured is done when it is repeated, then as captured. Counts repetitions."""
    repeated, capturing, begun = list[int](), Descent.capturing, list[Descent]()

    def begin(descent: Descent) -> Any:
        begun.append(descent)
        return capturing(descent)

    def capture(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], Callable[[], None]]:
        descent, report = begun[-1], dict[str, Any]()
        assert descent.still and all(group["capturable"] for group in descent.optimizer.param_groups)

        def replay() -> None:
            repeated.append(1)
            with descent.capturing():
                for group, rate in zip(descent.optimizer.param_groups, descent.rates, strict=True):
                    assert group["lr"] is rate
                report.update(work())

        return report, replay

    monkeypatch.setattr(Descent, "capturing", begin)
    monkeypatch.setattr(captured, "capable", lambda where: True)
    monkeypatch.setattr(captured, "capture", capture)
    yield repeated


CPU = torch.device("cpu")
METHODS = [
    BadNet(),
    FT(lr_scheduler="OneCycleLR", epochs=3),
    SAU(lr=2**-10),
    SAU(lr=2**-10, train_mode=True),
    AT(lr=2**-10, client_optimizer="adamw"),
    NC(),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_repeated_updates_are_those_that_python_launches(method, capturer):
    """Two shapes, each captured after its first batch; rates of OneCycleLR move with every update. On the device rates
    are of fp32, in which those of SAU and AT here are exact: where a search follows, rounding grows."""
    losses, model, step, said = updates(method, CPU)
    assert len(capturer) == len(BATCHES) - 2 and len(step.captured.captures) == 2
    assert said == ["updates are captured and repeated by CUDA (a CUDA graph); --compile off has Python launch each"]
    wanted, plain, _, _ = updates(method, CPU, captured=False)
    assert len(capturer) == len(BATCHES) - 2
    assert losses == pytest.approx(wanted, rel=1e-4)
    for ours, theirs in zip(model.state_dict().values(), plain.state_dict().values(), strict=True):
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
    losses, model, step, said = updates(method, where, amp=amp)
    assert len(step.captured.captures) == 2 and len(said) == 1
    wanted, plain, _, _ = updates(method, where, amp=amp, captured=False)
    assert losses == pytest.approx(wanted, rel=0.2 if amp else 1e-2)  # sums come in another order each time
    begun, ours, theirs = (
        nn.utils.parameters_to_vector(one.parameters()) for one in (prepared(method, where)["model"], model, plain)
    )
    assert (ours - theirs).norm() < (0.5 if amp else 0.1) * (theirs - begun).norm()


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
        updates(METHODS[0], CPU, captured=wanted)[2].state["descent"].state_dict() for wanted in (True, False)
    )
    assert ours["optimizer"]["param_groups"] == plain["optimizer"]["param_groups"]
    assert ours["scheduler"]["last_epoch"] == plain["scheduler"]["last_epoch"] == len(BATCHES)


def test_what_draws_on_the_cpu_is_not_captured(capturer):
    """A repeated random start would always be the same one."""
    method = AT(lr=1e-3, pgd_init="random")
    torch.manual_seed(0)
    losses, _, step, said = updates(method, CPU)
    assert not capturer and step.captured.off and not step.captured.captures
    assert said == [NOT + "they draw random numbers on the CPU"]
    assert losses == updates(method, CPU, captured=False)[0]


def test_what_cannot_be_captured_is_launched(capturer, monkeypatch):
    """One line, and the update that was made before it is not made again."""

    def refuse(work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    monkeypatch.setattr(captured, "capture", refuse)
    losses, _, step, said = updates(SAU(lr=1e-3), CPU)
    assert losses == updates(SAU(lr=1e-3), CPU, captured=False)[0] and step.captured.off
    why = "operation not permitted when stream is capturing"
    assert said == [NOT + why]


@pytest.mark.parametrize("method", [SAU(outer_steps=2), FT(client_optimizer="muon"), FT(client_optimizer="adadelta")])
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


@pytest.mark.parametrize("where", ["model", "reference"])
def test_networks_with_graphs_of_their_own_are_not_captured(capturer, where):
    state = prepared(SAU(lr=1e-3), CPU)
    state[where].compiled = "reduce-overhead"
    step = InParts(lambda state, x, y: {"loss": x.mean()}, state, True, Session(say=print), repeats=True)
    images = toy_images(8)
    for _ in range(2):
        step(to_float(images.pixels), images.labels)
    assert not capturer and not step.captured.captures
