"""What keeps a small pickle from making much: a file costs about what it holds, whatever it asks for."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import _weights_only_unpickler as torchs
from torch.overrides import TorchFunctionMode

CALLS = 40_000  # of torch's functions while it is read; a tensor takes 5, a parameter 6, and with Adam's state 21
DICTIONARIES = 1_000  # with attributes of their own in a file; a state dict is one


class Few(TorchFunctionMode):
    """Ends the reading of a pickle that makes tensors without end: five bytes of it are enough for one more."""

    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls > CALLS:
            raise ValueError(f"it makes more than {CALLS:,} calls to build its tensors")
        return func(*args, **(kwargs or {}))


class _Bytes:
    """In place of torch's classes of storages, which files name and must not make: they would hold whatever lay there
    in memory before.
    """

    dtype = torch.uint8


@contextmanager
def restrained(size: int) -> Iterator[None]:
    """torch's list without what makes much of little, while a file of `size` bytes is read.

    Copies of a file's own content (bytes, sets, dictionaries) have together as many items as it has bytes, for an
    honest one writes each of them down; and nothing is made of a number alone, like a tensor of so many values.
    """
    left, dictionaries = size, 0

    def copying(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            nonlocal left, dictionaries
            left -= sum(len(part) for part in given if hasattr(part, "__len__"))
            dictionaries += make is OrderedDict  # each may be given a copy of another one's attributes, too
            if left < 0 or dictionaries > DICTIONARIES:
                raise ValueError("it makes more of its content than there is of it")
            return make(*given)

        return made

    def encode(text: str, how: str) -> bytes:
        if how != "latin1":
            raise ValueError(f"bytes by {ascii(how)[:20]}, allowed is latin1")
        return text.encode(how)

    def refuse(*given: Any) -> None:
        raise ValueError("it asks for memory that it has no content for")

    names = dict(torchs._get_allowed_globals())
    for name, thing in names.items():
        if thing in (torch.storage.TypedStorage, torch.storage.UntypedStorage):
            names[name] = _Bytes
        elif thing in torch._tensor_classes or thing in (torch.Tensor, bytearray):
            names[name] = refuse
        elif thing in (OrderedDict, Counter, set, torch.Size):
            names[name] = copying(thing)
    names["_codecs.encode"] = copying(encode)
    with mock.patch.object(torchs, "_get_allowed_globals", lambda: names):
        yield
