"""Shapes as types. `pytest --jaxtyping-packages=sau,beartype.beartype` checks them at every call."""

from collections.abc import Iterable, Sized
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Pixels = Float[Tensor, "batch channel height width"]  # in [0, 1]
Change = Float[Tensor, "batch channel height width"]  # added to pixels, in their units
Universal = Float[Tensor, "1 channel height width"]  # a change of pixels for every image
Bytes = UInt8[Tensor, "batch channel height width"]  # in 0..255
Labels = Int[Tensor, " batch"]
Logits = Float[Tensor, "batch classes"]
PerImage = Float[Tensor, " batch"]
Flags = Bool[Tensor, " batch"]
Scalar = Float[Tensor, ""]
Loader = Iterable[Any]  # yields (pixels, labels, ...); can be iterated again and again


@runtime_checkable
class Batched(Iterable[Any], Sized, Protocol):
    """Batches of (pixels, labels, ...), as many as its length says; can be iterated again and again."""
