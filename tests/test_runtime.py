"""CUDA graphs, micro-batches and batch norm with fixed statistics: the same updates as eager ones, or none of them."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from attack_rows import ready
from torch import Tensor, nn
from toys import pair, quiet, tiny_net, toy_images

from sau import device, graphs
from sau.attack import ATTACKS, Attack, BadNet, InputAware, WaNet
from sau.data.images import Augment, to_float
from sau.defense import AT, D3, FP, FST, FT, FTSAM, NAD, NC, SAU
from sau.defense.base import TrainingDefense
from sau.errors import OutOfMemory
from sau.graphs import FixedNorms, MicroBatchedStep, fixed_norms
from sau.loop import RunContext
from sau.models import Normalized, PreActResNet18
from sau.models.triggers import TriggerGenerators
from sau.optim import Descent, Method, Training

NOT = "note: the training step is not replayed as a CUDA graph: "
BATCHES = 8, 8, 5, 8, 8, 5, 8, 8, 5  # images
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def prepared(method: Method, where: torch.device, amp: bool = False, safe: bool = True) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Normalized(tiny_net(), (0.5,) * 3, (0.25,) * 3, amp).to(where)
    model.graph_safe, x = safe, torch.rand(1, 3, 16, 16, device=where)
    if isinstance(method, Attack):
        drawn = {"images": toy_images(40).to(where), "augment": Augment(2)}
        recipe = Training(lr_scheduler="OneCycleLR", epochs=28, lr=0.1)
        if isinstance(method, Masks):
            return method.prepare_masks(model, 3) | drawn
        return method.prepare(model.train(), recipe, 3) | drawn
    assert isinstance(method, TrainingDefense)
    return method.prepare(model, 3 * [(x, x.new_zeros(1).long())])


def microbatched(method: Method, state: dict[str, Any], lines: list[str], step: Any = None) -> MicroBatchedStep:
    compose = method.compose if isinstance(method, Attack) else None
    return MicroBatchedStep(method, step or method.step, state, RunContext(say=lines.append), compose)


def updates(
    method: Method, where: torch.device, amp: bool = False, safe: bool = True, count: int = len(BATCHES)
) -> tuple[list[float], MicroBatchedStep, list[str]]:
    """The losses of a few, of batches of two shapes."""
    images, lines = toy_images(sum(BATCHES)).to(where), list[str]()
    if isinstance(method, Attack):
        method = ready(method, images, lines)
    step = microbatched(method, prepared(method, where, amp, safe), lines)
    pairs = list(zip(to_float(images.pixels).split(BATCHES), images.labels.split(BATCHES), strict=True))
    return [float(step(x, y)["loss"].detach()) for x, y in pairs[:count]], step, lines


def networks(step: MicroBatchedStep) -> list[nn.Module]:
    """Those of which anything learns."""
    learning = {id(p) for one in step.state.values() if isinstance(one, Descent) for p in one.parameters}
    found = [thing for thing in step.state.values() if isinstance(thing, nn.Module)]
    parts = [part for one in found for part in (one.children() if isinstance(one, TriggerGenerators) else [one])]
    return [part for part in parts if any(id(parameter) in learning for parameter in part.parameters())]


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Stands in for CUDA: the work of a graph is done by Python when it is replayed. Counts replays."""
    replayed, capturing, begun = list[int](), Descent.capturing, list[Descent]()

    def begin(descent: Descent) -> Any:
        begun.append(descent)
        return capturing(descent)

    def capture(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], Callable[[], None]]:
        descents, report = [descent for descent in dict.fromkeys(begun) if descent.still], dict[str, Any]()
        assert descents
        assert all(group["capturable"] for descent in descents for group in descent.optimizer.param_groups)

        def replay() -> None:
            replayed.append(1)
            with contextlib.ExitStack() as stack:
                for descent in descents:
                    stack.enter_context(descent.capturing())
                    for group, rate in zip(descent.optimizer.param_groups, descent.rates, strict=True):
                        assert group["lr"] is rate
                report.update(work())

        return report, replay

    monkeypatch.setattr(Descent, "capturing", begin)
    monkeypatch.setattr(graphs, "has_graphs", lambda where: True)
    monkeypatch.setattr(graphs, "capture", capture)
    # Where shapes are checked at every call, beartype draws from `random` which items of a list it looks at.
    monkeypatch.setattr(graphs, "_cpu_rng_state", lambda: (RNG()[0], *RNG()[2:]))
    yield replayed


class Masks(InputAware):
    """Its first stage by itself."""

    step, compose, graph_safe = InputAware.mask_step, InputAware.compose_masks, True


CPU, RNG = torch.device("cpu"), graphs._cpu_rng_state
METHODS = [
    BadNet(), FT(lr_scheduler="OneCycleLR", epochs=3), SAU(lr=2**-10), SAU(lr=2**-10, train_mode=True),
    AT(lr=2**-10, client_optimizer="adamw"), NC(), FTSAM(lr=2**-10), D3(lr=2**-10), FST(lr=2**-10),
    WaNet(pratio=0.25), InputAware(pratio=0.25, lr_G=2**-16), Masks(lr_M=2**-16),
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_replayed_updates_are_the_eager_ones(method, replays):
    """Two shapes, each captured after its first batch; rates of OneCycleLR move with every update. On the device rates
    are of fp32, in which those of SAU and AT here are exact: where a search follows, rounding grows."""
    losses, step, lines = updates(method, CPU)
    assert len(replays) == len(BATCHES) - 2 and len(step.graphed.graphs) == 2
    assert lines == ["the training step is replayed as a CUDA graph"]
    wanted, plain, _ = updates(method, CPU, safe=False)
    assert len(replays) == len(BATCHES) - 2 and losses == pytest.approx(wanted, rel=1e-4)
    for one, other in zip(networks(step), networks(plain), strict=True):
        for ours, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
    for one, other in zip(step.state.values(), plain.state.values(), strict=True):
        if isinstance(one, Descent):  # a checkpoint knows nothing of graphs
            ours, theirs = one.state_dict(), other.state_dict()
            assert ours["optimizer"]["param_groups"] == theirs["optimizer"]["param_groups"]
            assert ours["scheduler"] == theirs["scheduler"]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", [pytest.param(one, marks=gpu, id=one.name) for one in METHODS])
def test_cuda_replays_them(method, amp):
    where = torch.device("cuda")
    losses, step, lines = updates(method, where, amp=amp)
    assert len(step.graphed.graphs) == 2 and len(lines) == 1
    wanted, plain, _ = updates(method, where, amp=amp, safe=False)
    # Sums come in another order each time; a search through statistics that move carries that further (0.03, once).
    carried = getattr(method, "train_mode", False)
    assert losses == pytest.approx(wanted, rel=0.2 if amp else 0.1 if carried else 1e-2)
    if "frozen" in step.state:
        assert step.state["frozen"].__self__.amp is amp
    # Adam goes by signs, also of a generator's gradients that are but rounding; of a weight that stays, it is 1.
    bound = 0.99 if isinstance(method, InputAware) else 0.5 if amp or carried else 0.1
    begun = updates(method, where, count=0)[1]
    for one, other, first in zip(*map(networks, (step, plain, begun)), strict=True):
        ours, theirs, before = (torch.cat([p.flatten() for p in net.parameters()]) for net in (one, other, first))
        assert (ours - theirs).norm() < bound * (theirs - before).norm()


@pytest.mark.parametrize("draws", [pytest.param(True, marks=gpu), pytest.param(False, marks=gpu)])
def test_what_cuda_refuses_leaves_stream_and_generator_as_they_were(draws):
    """A network that reads the device and draws there: its ten updates are the eager ones."""

    class Reads(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (nn.functional.dropout(x) if draws else x) * float(x.mean() > -1)

    found, where, lines = [], torch.device("cuda"), list[str]()
    stream = torch.cuda.current_stream()
    for safe in (True, False):
        torch.manual_seed(0)
        model = Normalized(nn.Sequential(nn.Flatten(), Reads(), nn.Linear(3 * 16 * 16, 4))).to(where)
        model.graph_safe = safe
        step = microbatched(FT(), FT().prepare(model, range(10)), lines)
        images = toy_images(8).to(where)
        found.append([float(step(to_float(images.pixels), images.labels)["loss"].detach()) for _ in range(10)])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and torch.cuda.current_stream() == stream
    assert len(lines) == 1 and lines[0].startswith(NOT)


@pytest.mark.parametrize("draw", [random.random, np.random.random, lambda: torch.rand(1)])
def test_a_step_that_draws_on_the_cpu_is_not_captured(draw, replays, monkeypatch):
    monkeypatch.setattr(graphs, "_cpu_rng_state", RNG)
    lines = list[str]()
    step = microbatched(FT(), prepared(FT(), CPU), lines, lambda *batch: (draw(), FT().step(*batch))[1])
    step(*pair(8))
    assert not step.graphed.enabled and lines == [NOT + "it draws random numbers on the CPU"]


def test_graphs_keep_memory_so_few_shapes_have_one(replays):
    step = microbatched(FT(), prepared(FT(), CPU), [])
    for n in [*range(2, 12)] * 2:
        step(*pair(n))
    assert len(step.graphed.graphs) == graphs.MAX_GRAPHS == len(replays)


@pytest.mark.parametrize(("method", "reason"), [
    (SAU(outer_steps=2), "it updates the weights more than once"),
    (AT(lr=1e-3, pgd_init="random"), "it draws random numbers on the CPU"),
    (FT(client_optimizer="adadelta"), None),  # its rate is read by Python
])  # fmt: skip
def test_other_steps_run_eagerly(method, reason, replays):
    losses, _, lines = updates(method, CPU)
    assert lines == ([NOT + reason] if reason else []) and not replays
    assert losses == updates(method, CPU, safe=False)[0]


def test_methods_with_a_step_of_their_own_promise_nothing():
    """FP prunes and NAD looks into layers after every update: Python has to be there."""

    class Own(SAU):
        step = FT.step

    assert all(method.supports_microbatch() and not method.graph_safe for method in (FP(), NAD(), Own()))
    assert {name for name, attack in ATTACKS.items() if attack().supports_microbatch()} == {*ATTACKS} - {"inputaware"}
    assert all(attack.graph_safe for attack in ATTACKS.values())


def test_a_refused_capture_is_one_line_and_the_update_before_it_counts_once(replays, monkeypatch):
    def refuse(work: Callable[[], Any]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long story")

    monkeypatch.setattr(graphs, "capture", refuse)
    losses, step, lines = updates(SAU(lr=1e-3), CPU)
    assert losses == updates(SAU(lr=1e-3), CPU, safe=False)[0] and not step.graphed.enabled
    assert lines == [NOT + "operation not permitted when stream is capturing"]


@pytest.mark.parametrize("attack", [WaNet(pratio=0.25), InputAware(pratio=0.25, clean_train_epochs=1)])
def test_what_is_random_is_drawn_anew_for_each_replay(attack, replays, monkeypatch):
    """Whole training, in which every batch is composed, and replayed updates see other images each time."""
    images, composed = toy_images(40), list[Tensor]()
    made = ready(attack, images)
    compose = type(made).compose

    def watched(self: Attack, state: dict[str, Any], x: Tensor, y: Tensor) -> Any:
        composed.append(compose(self, state, x, y)[0])
        return composed[-1], y

    monkeypatch.setattr(type(made), "compose", watched)
    recipe = Training(epochs=3, batch_size=8, lr_scheduler="constant")
    made.fit(Normalized(tiny_net()), images, recipe, augment=Augment(2), session=quiet())
    joint = made.classifier_epochs(recipe)
    assert len(composed) == 5 * joint and len(replays) == 15 - (3 - joint > 0) - 1
    assert not any(torch.equal(one, other) for one in composed for other in composed if one is not other)


def test_memory_of_graphs_is_freed_before_a_batch_is_split(replays):
    method, lines, full = FT(), list[str](), [False]

    def step(state: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if full[0] and len(x) == 8 and whole.graphed.graphs:
            raise torch.OutOfMemoryError("injected")
        return method.step(state, x, y)

    whole = microbatched(method, prepared(method, CPU), lines, step)
    whole(*pair(5))
    full[0] = True
    whole(*pair(8))
    assert whole.parts == 1 and not whole.graphed.enabled and not whole.graphed.graphs
    assert lines[1:] == [NOT + "its memory is needed"]


def test_every_part_has_its_share_of_the_triggered_images():
    seen, full = list[list[int]](), [True]

    def step(state: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if full[0] and len(x) > 3:
            raise torch.OutOfMemoryError("injected")
        seen.append(y.tolist())
        return FT().step(state, x, y)

    whole = microbatched(FT(), prepared(FT(), CPU), [], step)
    whole(torch.rand(9, 3, 16, 16), torch.tensor([3, 3, 3, 0, 0, 0, 1, 1, 1]))
    assert seen == [[3, 0, 1], [3, 0], [3, 1], [0, 1]] and whole.parts == 4
    seen.clear()
    whole(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    assert seen == [[0], [1]]


class Full(nn.Module):
    """Runs out of memory with more than so many images, as often as they come."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most, self.sizes = net, most, []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: injected")  # as the CPU says it
        return self.net(x)


def in_memory_of(method: TrainingDefense, most: int, count: int = 3) -> tuple[Full, list[dict[str, Tensor]], list[str]]:
    """A network after `count` updates from 15 images, what they reported and printed."""
    torch.manual_seed(0)
    full, lines = Full(Normalized(PreActResNet18(4, width=4), (0.5,) * 3, (0.25,) * 3).double(), 1000), list[str]()
    step = microbatched(method, method.prepare(full, range(count)), lines)
    full.most = most
    return full, [step(*pair(15, torch.float64)) for _ in range(count)], lines


@pytest.mark.parametrize("most", [8, 4, 1])
def test_a_batch_that_memory_does_not_hold_makes_the_same_update(most):
    """Batch norm frozen, float64: weights, losses and counts are those of the whole batch."""
    method = SAU(lr=1e-3, weight_adv=0.3)
    whole, wanted, _ = in_memory_of(method, 1000)
    parts, found, lines = in_memory_of(method, most)
    assert len(lines) == {8: 1, 4: 2, 1: 4}[most] and all(line.startswith("out of memory: ") for line in lines)
    for ours, theirs in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys() and all(one[name].dtype == other[name].dtype for name in one)
        assert all(torch.allclose(one[name].double(), other[name].double(), atol=1e-9) for name in one)


@pytest.mark.parametrize("most", [20, 8], ids=["in the outer step", "in the search"])
def test_memory_that_runs_out_in_train_mode_leaves_the_search_in_eval_mode(most):
    """Batch norm counts the outer passes alone, one for each part: 15 and 15 images go through it together."""
    full, _, lines = in_memory_of(SAU(train_mode=True), most, count=1)
    norm = next(module for module in full.modules() if isinstance(module, nn.BatchNorm2d))
    assert len(lines) == 1 + (most == 8) and int(norm.num_batches_tracked) == 2 * len(lines)


@pytest.mark.parametrize(("method", "most"), [(SAU(outer_steps=2), 8), (SAU(), 0)])
def test_what_cannot_be_divided_says_so(method, most):
    with pytest.raises(OutOfMemory, match="--batch_size"):
        in_memory_of(method, most)


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("layout", [pytest.param(f, marks=gpu) for f in (torch.contiguous_format, torch.channels_last)])
def test_fixed_norms_have_the_gradients_of_torch(amp, layout):
    where = torch.device("cuda")
    torch.manual_seed(0)
    model = Normalized(PreActResNet18(width=8), (0.5,) * 3, (0.25,) * 3).to(where, memory_format=layout).eval()
    model.amp = amp
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
            tensor.uniform_(0.5, 1.5)
    x = torch.rand(16, 3, 32, 32, device=where).to(memory_format=layout).requires_grad_()
    found = []
    for context in (contextlib.nullcontext(), fixed_norms(model, x)):
        with context:
            z = model(x)
            named = type(model.net.layer1[0].bn1(model.net.conv1(x)).grad_fn).__name__
        assert ("FixedNorm" in named) is (len(found) == 1)
        weights = [p for norm in norms for p in (norm.weight, norm.bias)]
        found.append([z, *torch.autograd.grad(z.logsumexp(1).sum(), [x, *weights])])
    assert torch.equal(found[0][0], found[1][0])
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (0.02 if amp else 1e-3) * theirs.norm()


def test_fixed_norms_are_for_batch_norm_in_eval_mode_with_gradients():
    norm, x = nn.BatchNorm2d(3), torch.rand(4, 3, 2, 2)
    plain = norm.eval()(x)
    with FixedNorms():
        assert "FixedNorm" in type(norm(x).grad_fn).__name__ and torch.equal(norm(x), plain)
        assert "FixedNorm" not in type(norm.train()(x).grad_fn).__name__
        with torch.no_grad():
            assert norm.eval()(x).grad_fn is None
    assert isinstance(fixed_norms(norm, x), contextlib.nullcontext)


@pytest.mark.parametrize(("affine", "size"), [(True, (2, 2)), (True, ()), (False, (3,))])
def test_fixed_norms_by_hand(affine, size, monkeypatch):
    """The gradients of torch's batch norm, with the kernels of a card by their formulas."""

    def across(tensor: Tensor, x: Tensor) -> Tensor:
        return tensor.view(-1, *[1] * (x.ndim - 2))

    def elemt(x: Tensor, weight: None, bias: None, mean: Tensor, inverse: Tensor, eps: float) -> Any:
        return (x - across(mean, x)) * across(inverse, x)

    def reduce(gradient: Tensor, x: Tensor, mean: Any, inverse: Any, weight: Any, *asked: bool) -> Any:
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


@pytest.mark.parametrize(("flags", "wanted"), [
    ("fpu avx512_bf16 avx", True), ("amx_bf16 amx_tile", True), ("asimd bf16", True), ("avx512f avx2", False),
])  # fmt: skip
def test_the_precision_is_that_of_the_processor(monkeypatch, tmp_path, flags, wanted):
    """By what the processor says of itself, so that the same machine always decides the same; else fp32."""
    (tmp_path / "cpuinfo").write_text(f"model name : one\nflags : {flags}\n")
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "cpuinfo")
    assert device.has_bf16(CPU) is wanted
    monkeypatch.setattr(device, "CPU_INFO", tmp_path / "absent")
    assert device.has_bf16(CPU) is False


@pytest.mark.parametrize(
    ("variable", "earlier", "wanted"), [(None, None, 3), ("5", 2, 5), ("4,2", None, 4), (None, 2, 2), ("0", None, 3)]
)
def test_threads_follow_the_environment_or_the_interrupted_run_or_the_cores(variable, earlier, wanted, monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    assert device.set_threads(0, earlier) == wanted and device.set_threads(1, earlier) == 1
