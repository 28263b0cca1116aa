"""What is done faster in bf16 on the CPU: the same answers and derivatives as by torch's own kernels."""

import copy
import itertools
import subprocess
import sys
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sau.models import Normalized, PreActResNet18, cpu
from sau.models.cpu import Shortcuts

EVERY = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # number of 16 bits
GRIDS = [  # kernel, stride, padding, dilation, height, width, side by side
    (3, 1, 1, 1, 4, 4, True), (3, 1, 1, 1, 2, 3, True), (3, 2, 1, 1, 8, 8, True), (3, 2, 1, 1, 7, 7, True),
    (5, 1, 2, 1, 4, 4, True), (3, 1, 2, 2, 4, 4, True), (3, (2, 1), (0, 1), 1, 5, 3, True), (3, 1, 1, 1, 1, 1, True),
    (3, 1, 1, 1, 4, 5, False), (3, 1, 0, 1, 4, 4, False), (1, 1, 0, 1, 4, 4, False), (3, 1, "same", 1, 4, 4, False),
]  # fmt: skip


def wide(monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """A convolution of so many channels is wide, whether it learns or not."""
    for name in ("WIDE", "WIDE_LEARNT"):
        monkeypatch.setattr(cpu, name, channels)


@pytest.fixture
def units(monkeypatch):
    """A processor with matrix units, and networks that need few channels to be deep."""
    monkeypatch.setattr(cpu, "UNITS", True)
    wide(monkeypatch, 3)


@pytest.fixture
def small(monkeypatch):
    """Maps need few values to be large."""
    monkeypatch.setattr(cpu, "LARGE", 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_gives_the_same_bits(inplace, small):
    """Of every number that there is, with NaN and both infinities; zeros of either sign are 0."""
    wanted = F.relu(EVERY)
    with Shortcuts():
        given = EVERY.clone()
        found = F.relu(given, inplace)
    assert torch.equal(found.isnan(), EVERY.isnan()) and found.isnan().any()
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert (found is given) is inplace and torch.equal(given.isneginf(), EVERY.isneginf() & (not inplace))


@pytest.mark.parametrize("inplace", [False, True])
def test_relu_has_the_same_derivatives(inplace, small):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5).bfloat16().requires_grad_()
    found = []
    for context, named in ((nullcontext(), "Relu"), (Shortcuts(), "_ReLU")):
        with context:
            y = F.relu(x * 2, inplace)
        assert named in type(y.grad_fn).__name__
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        found.append([y, slope, *torch.autograd.grad(slope.square().sum(), x)])
    assert all(map(torch.equal, *found))


def test_large_maps_in_bf16_alone_are_cut_by_their_bits():
    x = torch.randn(2**19, requires_grad=True)
    with Shortcuts():
        names = [type(F.relu(part).grad_fn).__name__ for part in (x, x.bfloat16(), x.bfloat16()[1:])]
    assert names == ["ReluBackward0", "_ReLUBackward", "ReluBackward0"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "height", "width", "row"), GRIDS)
def test_a_convolution_in_a_row_is_one_of_each_picture(
    kernel, stride, padding, dilation, height, width, row, bias, units
):
    """Answers, gradients and the gradient of a gradient, beside those of torch in fp32 on the same numbers."""
    torch.manual_seed(0)
    grid: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    x = torch.randn(5, 4, height, width).bfloat16().to(memory_format=torch.channels_last)
    net = nn.Conv2d(4, 6, kernel, bias=bias, **grid).bfloat16()
    found = []
    for context, kind in ((nullcontext(), torch.float32), (Shortcuts(), torch.bfloat16)):
        net, x = copy.deepcopy(net).to(kind), x.detach().to(kind).requires_grad_()
        with context:
            y = net(x)
        slopes = torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), [x, *net.parameters()])
        with context:
            (first,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        found.append([y, *slopes, *torch.autograd.grad(first.sum(), [x, net.weight])])
    assert ("InARow" in type(y.grad_fn).__name__) is row
    assert not row or y.is_contiguous(memory_format=torch.channels_last)
    for theirs, ours in zip(*found, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).norm() <= 0.02 * theirs.norm()


def test_pictures_in_a_row_do_not_see_each_other(units):
    """Another second picture changes no bit of the first one's answer and gradient."""
    torch.manual_seed(0)
    weight, found = torch.randn(6, 4, 3, 3).bfloat16(), []
    first, *others = torch.randn(3, 1, 4, 4, 4).bfloat16()
    for other in others:
        x = torch.cat([first, 9 * other]).contiguous(memory_format=torch.channels_last).requires_grad_()
        with Shortcuts():
            y = F.conv2d(x, weight, padding=1)
        (slope,) = torch.autograd.grad(y.square().sum(), x)
        found.append([y[0], slope[0]])
    assert all(map(torch.equal, *found))


def test_what_gains_nothing_stays_with_torch(units, monkeypatch):
    """fp32, other layouts, groups, a single picture, few channels, and processors without matrix units."""
    x, weight = torch.randn(5, 4, 4, 4).bfloat16(), torch.randn(4, 4, 3, 3).bfloat16().requires_grad_()
    last = x.to(memory_format=torch.channels_last)

    def rows(x: torch.Tensor, weight: torch.Tensor, groups: int = 1) -> bool:
        with Shortcuts():
            return "InARow" in type(F.conv2d(x, weight, padding=1, groups=groups).grad_fn).__name__

    assert rows(last, weight)
    assert not rows(last.float(), weight.float()) and not rows(x, weight) and not rows(last[:1], weight)
    assert not rows(last, weight[:, :2], groups=2)
    wide(monkeypatch, 5)
    assert not rows(last, weight)
    wide(monkeypatch, 4)
    monkeypatch.setattr(cpu, "UNITS", False)
    assert not rows(last, weight)


def network(width: int, amp: bool = True) -> Normalized:
    torch.manual_seed(0)
    return Normalized(PreActResNet18(width=width), (0.5,) * 3, (0.25,) * 3, amp).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("train", [False, True])
def test_a_wide_network_answers_and_learns_as_before(train, small, monkeypatch):
    """With what is faster and without, in bf16; and it is used."""
    monkeypatch.setattr(cpu, "UNITS", True)
    wide(monkeypatch, 256)
    model, x, found, names = network(32).train(train), torch.rand(6, 3, 32, 32), [], []
    for ours in (cpu._ReLU, cpu._InARow):
        apply = ours.apply
        monkeypatch.setattr(
            ours, "apply", lambda *given, apply=apply, name=ours.__name__: (names.append(name), apply(*given))[1]
        )
    for faster in (False, True):
        assert not names
        net = copy.deepcopy(model)
        net.widest *= faster
        z = net(x)
        z.logsumexp(1).sum().backward()
        found.append([z, *(parameter.grad for parameter in net.parameters())])
    assert {name: names.count(name) for name in names} == {"_ReLU": 16, "_InARow": 3}
    for theirs, ours in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()


@pytest.mark.parametrize(("width", "amp"), [(16, True), (32, False)])
def test_other_networks_go_their_own_ways(width, amp, monkeypatch):
    """Narrow ones and those in fp32."""
    wide(monkeypatch, 256)
    model = network(width, amp).eval()
    monkeypatch.setattr(Shortcuts, "__torch_function__", lambda *given: pytest.fail("was used"))
    with torch.no_grad():
        model(torch.rand(2, 3, 16, 16))


ALONE = """
import copy
import torch
from torch import nn
from sau.models import Normalized, PreActResNet18, cpu

cpu.UNITS, cpu.WIDE, cpu.WIDE_LEARNT, cpu.LARGE = True, 256, 256, 1
torch.manual_seed(0)
model = Normalized(PreActResNet18(width=32), (0.5,) * 3, (0.25,) * 3, True).to(memory_format=torch.channels_last)
x = torch.rand(6, 3, 32, 32)
"""
COMPILED = """
graphs, found = [], []

def taken(graph, given):
    graphs.append([str(node.target) for node in graph.graph.nodes])
    return graph.forward

def compile(net, **how):
    net._compiled_call_impl = torch.compile(net._call_impl, backend=taken, dynamic=False)

nn.Module.compile = compile
for compiled in (None, "default"):
    net = copy.deepcopy(model)
    net.compiled, net.widest = compiled, net.widest if compiled else 0
    z = net(x)
    z.logsumexp(1).sum().backward()
    found.append([z, *(parameter.grad for parameter in net.parameters())])
assert len(graphs) == 1, len(graphs)
assert [target for target in graphs[0] if "autograd" in target] == 3 * ["autograd_function_apply"], graphs
for theirs, ours in zip(*found, strict=True):
    assert (ours - theirs).norm() <= 0.02 * theirs.norm()
"""
EXPORTED = """
for strict in (False, True):
    code = str(torch.export.export(model.eval(), (x,), strict=strict))
    assert "relu" in code and "conv2d" in code and "new_zeros" not in code and "int16" not in code
"""


@pytest.mark.parametrize("work", [COMPILED, EXPORTED], ids=["compiled", "exported"])
def test_programs_that_torch_takes_of_a_wide_network(work):
    """In a process of its own, where nothing checks types, which would break a graph into parts. A compiled network has
    its rows in one graph, with ReLU left to the compiler, and the answers and gradients of before; a program for others
    has neither views of bits nor rows in it."""
    done = subprocess.run([sys.executable, "-c", ALONE + work], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_transforms_of_torch_have_their_derivatives(small, units):
    """Inside of vmap what is seen of a tensor says nothing of its gradients."""
    model, x = network(32).eval(), torch.rand(2, 3, 3, 16, 16)
    given = [x.clone().requires_grad_() for _ in range(2)]
    with warnings.catch_warnings(action="ignore"):  # pooling is slow there
        torch.vmap(model)(given[0]).square().sum().backward()
    torch.stack([model(part) for part in given[1]]).square().sum().backward()
    assert (given[0].grad - given[1].grad).norm() <= 0.05 * given[1].grad.norm() > 0


def test_wide_networks_gain_and_narrower_ones_where_they_learn(monkeypatch):
    """Of 256 channels and, in train mode, of 64; not without gradients, on other devices and with `widest` 0."""
    monkeypatch.setattr(cpu, "WIDE_LEARNT", 64)
    x = torch.rand(2, 3, 8, 8)

    def gains(width: int, learns: bool = True, given: torch.Tensor = x, widest: int | None = None) -> bool:
        net = PreActResNet18(width=width).train(learns)
        found = cpu.shortcuts(given, net, cpu.widest(net) if widest is None else widest)
        return isinstance(found, Shortcuts)

    assert [gains(width) for width in (4, 8, 16, 32)] == [False, True, True, True]
    assert [gains(width, learns=False) for width in (8, 31, 32)] == [False, False, True]
    assert not gains(32, given=x.to("meta")) and not gains(32, widest=0) and cpu.widest(nn.Linear(999, 999)) == 0
    with torch.no_grad():
        assert [gains(width) for width in (16, 32)] == [False, True]


def test_narrow_convolutions_are_in_a_row_for_their_weights_alone(monkeypatch):
    wide(monkeypatch, 256)
    monkeypatch.setattr(cpu, "UNITS", True)
    monkeypatch.setattr(cpu, "WIDE_LEARNT", 64)
    x = torch.randn(2, 64, 4, 4).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 64, 3, 3).bfloat16()
    with Shortcuts():
        names = [type(F.conv2d(x, w, padding=1).grad_fn).__name__ for w in (weight, weight.clone().requires_grad_())]
    assert ["InARow" in name for name in names] == [False, True]


def test_places_of_pictures_in_a_row():
    """No window reaches two pictures, and each picture is met as it would be alone, for all small grids."""
    for stride, padding, dilation, kernel, width in itertools.product(
        (1, 2, 3), range(4), (1, 2), (2, 3, 5), range(1, 9)
    ):
        grid = cpu._Grid((1, stride), (0, padding), (1, dilation))
        pitch, columns = grid.pitch(width), grid.columns(width, kernel)
        seen = [at * stride - padding + dilation * tap for at in range(columns) for tap in range(kernel)]
        assert pitch % stride == 0 and all(width - pitch <= column < pitch for column in seen)
        if grid.columns(5 * pitch, kernel) == 5 * pitch // stride:
            assert columns <= pitch // stride
