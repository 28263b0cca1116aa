"""A network that is searched through but not trained."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class _FixedNorm(torch.autograd.Function):
    """Batch norm with fixed statistics: torch's forward pass, and of its backward pass the gradient of the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Any, bias: Any, eps: float) -> Tensor:
        scale = (var + eps).rsqrt()
        ctx.save_for_backward(scale if weight is None else scale * weight)
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (scale,) = gradients, ctx.saved_tensors
        shape = (-1, *[1] * (gradient.ndim - 2))
        return (torch.mul(gradient, scale.view(shape), out=torch.empty_like(gradient)), *[None] * 5)


class InputGradients(TorchFunctionMode):
    """Inside, batch norms with fixed statistics have a gradient for their input alone, as a search needs: torch's own
    backward pass of these is slow on CUDA, where it took a fifth of an update of SAU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.batch_norm:
            return _norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _norm(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """`F.batch_norm`, by its signature."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return _FixedNorm.apply(input, running_mean, running_var, weight, bias, eps)


def searching(network: Any, x: Tensor) -> AbstractContextManager[Any]:
    """The context of a search through networks like `network` for changes of `x`: on CUDA `InputGradients`, unless the
    networks are compiled, which makes fast code of its own."""
    quick = x.is_cuda and not getattr(network, "compiled", None)
    return InputGradients() if quick else nullcontext()


def searched(model: Any) -> dict[str, Any]:
    """What the state of a step needs to search through `model`, which it also trains: nothing unless it is compiled.

    The search then goes through a twin, on CUDA graphs if those were asked for. `model` itself is compiled without
    them, for what it has answered must outlive the search, and the memory of a graph is used again by the next pass.
    """
    if not getattr(model, "compiled", None):
        return {}
    twin = frozen(model.eval())
    model.compiled = "default"
    return {"frozen": twin.forward}


def frozen(model: nn.Module) -> nn.Module:
    """`model` over again on the same weights and statistics in memory, without gradients of weights.

    Compiled code forms all gradients that there may be, asked for or not, and is compiled anew when `requires_grad`
    changes; so a search through a network that is being trained goes through this.
    """
    twin = copy.deepcopy(model).requires_grad_(False)
    theirs = (*model.parameters(), *model.buffers())
    for ours, other in zip((*twin.parameters(), *twin.buffers()), theirs, strict=True):
        ours.data = other.data
    return twin
