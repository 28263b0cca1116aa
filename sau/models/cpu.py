"""bf16 on the CPU: what torch's kernels take long for there, done by faster ones, for any wide network.

`Shortcuts` is the context in which a network answers. ReLU gives the same bits; a convolution to narrow maps the same
sums in another order.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

UNITS = bool(torch.cpu._is_amx_tile_supported())  # for matrices of bf16 (Intel's AMX); torch 2.10 has no public name

WIDE = 256  # channels of a convolution; in narrower networks Python takes as long here as the kernels spare
WIDE_LEARNT = 64 if UNITS else WIDE  # in train mode, for the gradients of weights are what takes longest
LARGE = 2**19  # values of a map, from which on the same holds of ReLU
NARROW = 4  # columns of a map: matrix units take 16 pixels of a row at once

BITS = torch.int16  # of a bf16 number: as whole numbers those above 0 are in the same order, and 0 is 0
INFINITE = -128  # minus infinity; smaller ones are -0 and the finite numbers below 0, those from here to -1 are NaN
LAST = torch.channels_last


class Shortcuts(TorchFunctionMode):
    """Inside, ReLU of bf16 takes less time and, on matrix units, a convolution to narrow maps."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return FASTER.get(func, func)(*args, **(kwargs or {}))


def shortcuts(x: Tensor, net: nn.Module, widest: int) -> AbstractContextManager[Any]:
    """`Shortcuts` where `net`, whose convolutions have up to `widest` channels, gains from them on `x`.

    Not inside torch.func's transforms, which know no views of bits, nor in a program for export, which is to hold
    torch's own operations.
    """
    learns = net.training and torch.is_grad_enabled()  # a search in eval mode asks for no gradients of weights
    if x.device.type != "cpu" or widest < (WIDE_LEARNT if learns else WIDE):
        return nullcontext()
    plain = torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()
    return nullcontext() if plain else Shortcuts()


def widest(net: nn.Module) -> int:
    """Most channels that a convolution of `net` takes."""
    return max((module.in_channels for module in net.modules() if isinstance(module, nn.Conv2d)), default=0)


def _relu(input: Tensor, inplace: bool = False) -> Tensor:
    """`F.relu`, by its signature."""
    # The compiler makes one kernel of it and what stands around it.
    if input.dtype != torch.bfloat16 or input.numel() < LARGE or torch.compiler.is_compiling():
        return F.relu(input, inplace)
    if torch.is_grad_enabled() and input.requires_grad:
        return _ReLU.apply(input, inplace)
    return _cut(input, inplace)


def _cut(x: Tensor, inplace: bool) -> Tensor:
    """ReLU of the bits, for which nothing is widened to fp32 and narrowed again. NaN stays NaN."""
    bits = F.threshold(x.view(BITS), INFINITE, 0, inplace)
    return x if inplace else bits.view(x.dtype)


class _ReLU(torch.autograd.Function):
    """`_cut`, with the derivative of torch's ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        answer = _cut(x, inplace)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(answer)
        return answer

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (answer,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradients[0], answer, 0), None


class _Grid(NamedTuple):
    """Where the windows of a convolution lie, in rows and columns."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def pitch(self, width: int) -> int:
        """Columns from one picture to the next where several lie side by side: no window may see two of them, and each
        must be met by windows at the same places."""
        apart = width + self.padding[1]
        return apart + -apart % self.stride[1]

    def columns(self, width: int, kernel: int) -> int:
        """Of the answer."""
        return (width + 2 * self.padding[1] - self.dilation[1] * (kernel - 1) - 1) // self.stride[1] + 1


def _conv2d(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Tensor:  # fmt: skip
    """`F.conv2d`, by its signature."""
    wide = weight.shape[1] >= (WIDE_LEARNT if torch.is_grad_enabled() and weight.requires_grad else WIDE)
    usual = wide and weight.shape[-1] > 1 and groups == 1 and not isinstance(padding, str)
    alike = input.dtype == torch.bfloat16 and input.ndim == 4 and input.is_contiguous(memory_format=LAST)
    if usual and alike and len(input) > 1 and UNITS:
        grid = _Grid(*((n, n) if isinstance(n, int) else tuple(n) for n in (stride, padding, dilation)))
        row, kernel = len(input) * grid.pitch(input.shape[3]), weight.shape[3]
        fits = grid.columns(row, kernel) == row // grid.stride[1]
        if fits and grid.columns(input.shape[3], kernel) <= NARROW:
            # Autocast knows convolutions, but not this one.
            return _InARow.apply(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype), grid)
    return F.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _InARow(torch.autograd.Function):
    """A convolution of a batch as of one long picture, in which its pictures lie side by side, zeros between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, grid: _Grid) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grid, width = grid, x.shape[3]
        row = F.conv2d(_row(x, grid.pitch(width)), weight, bias, *grid)
        return _apart(row, len(x), grid.columns(width, weight.shape[3]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), grid, asked = ctx.saved_tensors, ctx.grid, ctx.needs_input_grad[:3]
        pitch, width = grid.pitch(x.shape[3]), x.shape[3]
        of_row, of_weight, of_bias = torch.ops.aten.convolution_backward(
            _row(gradients[0], pitch // grid.stride[1]), _row(x, pitch), weight, [len(weight)], *grid, False, [0, 0], 1,
            asked,
        )  # fmt: skip
        return None if of_row is None else _apart(of_row, len(x), width), of_weight, of_bias, None


def _row(x: Tensor, pitch: int) -> Tensor:
    """[N, C, H, W] side by side, a picture every `pitch` columns and zeros between them: [1, C, H, N * pitch]."""
    n, channels, height, width = x.shape
    row = x.new_zeros(height, n, pitch, channels)
    row[:, :, :width] = x.permute(2, 0, 3, 1)
    return row.flatten(1, 2).permute(2, 0, 1)[None]


def _apart(row: Tensor, n: int, width: int) -> Tensor:
    """The `n` pictures of a row, each the first `width` of its columns."""
    pictures = row[0].unflatten(2, (n, -1))[..., :width].permute(2, 0, 1, 3)
    return pictures.contiguous(memory_format=LAST)


FASTER: dict[Callable[..., Any], Callable[..., Any]] = {F.relu: _relu, F.conv2d: _conv2d}
