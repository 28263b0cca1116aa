"""CUDA without a card: tensors of the CPU that say they are on cuda:0 and refuse to meet others, as those of CUDA do.

What is computed is what the CPU computes. Kernels, streams, graphs and autocast are not stood in for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from sau.runtime import batchnorm, graphs

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
FREE = (torch.device, torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type)  # they read, and make nothing
INDEXING = (Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_)  # CUDA fetches indices by itself


class OnCuda(Tensor):
    """A tensor of the CPU that says it is on cuda:0."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = nn.Parameter(copied, self.requires_grad) if is_parameter else copied
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> Any:  # what is written is read on the CPU
        return _placed(self, CPU).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


class Everywhere(TorchFunctionMode):
    """Takes the calls that no tensor on the device takes part in, like `torch.zeros(2, device="cuda")`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return called(func, args, kwargs or {})


def called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`func` of these, on the device that CUDA would do it on; RuntimeError or TypeError where CUDA would refuse."""
    if func in FREE:
        return _done(func, args, kwargs)
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, OnCuda)]
    if func is Tensor.to or func is Tensor.cpu:
        to = CPU if func is Tensor.cpu else _destination(args[1:], kwargs) or args[0].device
        return _sent(func, args, kwargs, to)
    if func is Tensor.module_load:  # of `load_state_dict`, which copies from any device
        return _placed(_done(Tensor.clone, (args[1].detach(),), {}), args[0].device)
    if there and func in (Tensor.numpy, Tensor.__array__, Tensor.pin_memory):
        raise TypeError(f"{func.__name__} of a tensor on cuda:0; move it to the CPU")
    if func is Tensor.pin_memory:
        return args[0]
    device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else CUDA if there else None
    if device is not None and device.type == "cuda" and kwargs.get("generator") is not None:
        raise RuntimeError("expected a generator of cuda:0, got one of the CPU")
    apart = [tensor for tensor in tensors if not isinstance(tensor, OnCuda) and tensor.dim()]
    fetched = func is Tensor.copy_ or (func in INDEXING and isinstance(args[0], OnCuda))
    if there and apart and not fetched and "device" not in kwargs:
        raise RuntimeError(f"{getattr(func, '__name__', func)}: expected all tensors on one device, got cuda:0 and cpu")
    out = _done(func, args, kwargs)
    changed = bool(tensors) and out is tensors[0]  # in place
    if device is None or changed or isinstance(out, torch.Size):
        return out
    return tree_map(lambda value: _placed(value, device), out)


def _destination(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device | None:
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.device | Tensor | str):
            return value.device if isinstance(value, Tensor) else torch.device(value)
    return None


def _sent(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], to: torch.device) -> Tensor:
    plain = tree_map(lambda value: _placed(value, CPU), (args, kwargs))
    out = _done(func, *plain)
    moved = to.type != args[0].device.type
    shared = moved and out.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
    return _placed(_done(Tensor.clone, (out,), {}) if shared else out, to)


def _placed(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnCuda) == (device.type == "cuda"):
        return value
    with torch._C.DisableTorchFunction():
        return value.as_subclass(OnCuda if device.type == "cuda" else Tensor)


def _done(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    def here(value: Any) -> Any:
        cuda = isinstance(value, torch.device | str) and str(value).startswith("cuda")
        return CPU if cuda and func not in FREE else value

    with torch._C.DisableTorchFunction():
        return func(*tree_map(here, args), **tree_map(here, kwargs))


@contextmanager
def stand_in() -> Iterator[None]:
    """Inside, torch has one CUDA device."""
    patch, fork = pytest.MonkeyPatch(), torch.random.fork_rng
    answers = {"is_available": True, "device_count": 1, "is_initialized": False, "get_device_name": "a stand-in"}
    answers |= {"synchronize": None, "empty_cache": None, "max_memory_allocated": 0, "get_rng_state_all": []}
    answers |= {"set_device": None, "reset_peak_memory_stats": None}
    for name, answer in answers.items():
        patch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    patch.setattr(graphs, "has_graphs", lambda where: False)
    patch.setattr(batchnorm, "FixedNorms", nullcontext)
    patch.setattr(torch.random, "fork_rng", lambda devices: fork(devices=[]))
    for device in ("cuda", "accelerator"):  # what it is called up to torch 2.10, and later
        check = f"_{device}_graph_capture_health_check"
        patch.setattr(torch.optim.Optimizer, check, lambda self: None, raising=False)
    torch.__future__.set_swap_module_params_on_conversion(True)  # or parameters would stay plain tensors
    try:
        with Everywhere():
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        patch.undo()
