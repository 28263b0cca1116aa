"""Shapes as types. `pytest --jaxtyping-packages=sau,beartype.beartype` checks them at every call."""

from collections.abc import Iterable
from typing import Any

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

Pixels = Float[Tensor, "batch channel height width"]  # in [0, 1]
Change = Float[Tensor, "batch channel height width"]  # added to pixels, in their units
Universal = Float[Tensor, "1 channel height width"]  # a change of pixels for every picture
Bytes = UInt8[Tensor, "batch channel height width"]  # in 0..255
Labels = Int[Tensor, " batch"]
Logits = Float[Tensor, "batch classes"]
PerImage = Float[Tensor, " batch"]
Flags = Bool[Tensor, " batch"]
Scalar = Float[Tensor, ""]
Loader = Iterable[Any]  # yields (pixels, labels, ...); can be iterated again and again
