"""Batch norm with fixed statistics, fast on CUDA, and a twin of a network to search through."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _FixedNorm(torch.autograd.Function):
    """Batch norm with fixed statistics: torch's forward pass, and a backward pass by the kernels of SyncBatchNorm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        learns = any(ctx.needs_input_grad[3:5])
        ctx.save_for_backward(x if learns else None, mean, (var + eps).rsqrt(), weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, mean, inverse, weight) = gradients, ctx.saved_tensors
        wants_x, _, _, *learns, _ = ctx.needs_input_grad
        of_x = of_weight = of_bias = None
        if wants_x:
            scale = inverse if weight is None else inverse * weight
            of_x = torch.batch_norm_elemt(gradient, None, None, torch.zeros_like(scale), scale, 0.0)
        if any(learns):
            last = x.is_contiguous(memory_format=torch.channels_last)
            alike = gradient.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            _, _, of_weight, of_bias = torch.batch_norm_backward_reduce(alike, x, mean, inverse, weight, False, *learns)
        return of_x, None, None, of_weight, of_bias, None


class FixedNorms(TorchFunctionMode):
    """Inside, batch norms with fixed statistics have a first derivative that is fast on CUDA: torch's own took a fifth
    of an update of SAU there, and the copies around it another."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_norm if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.batch_norm`, by its signature."""
    if training or running_mean is None or running_var is None or not torch.is_grad_enabled():
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _FixedNorm.apply(input, running_mean, running_var, weight, bias, eps)


def fixed_norms(network: Any, x: Tensor) -> AbstractContextManager[Any]:
    """The context of an update that needs first derivatives of `network` at `x`: `FixedNorms` on CUDA, unless the
    network is compiled, which makes fast code of its own."""
    return FixedNorms() if x.is_cuda and not getattr(network, "compiled", False) else nullcontext()


def search_twin(model: Any) -> dict[str, Any]:
    """State entry with a weight-sharing, gradient-free twin of `model` for the inner search (CUDA or compiled only)."""
    if not getattr(model, "compiled", False) and not next(model.parameters()).is_cuda:
        return {}
    return {"frozen": shared_weight_twin(model.eval()).forward}


def shared_weight_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its weights and statistics in memory and forms no gradients of weights.

    Compiled code and `FixedNorms` form all gradients that there may be, used or not, and the former is compiled anew
    when `requires_grad` changes; so a search through a network that is being trained goes through this.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    theirs = (*model.parameters(), *model.buffers())
    for ours, other in zip((*twin.parameters(), *twin.buffers()), theirs, strict=True):
        ours.data = other.data
    return twin
