"""What keeps a small pickle from making much: its tensors, bytes and sets take about the memory that the file has."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import _weights_only_unpickler as torchs
from torch.overrides import TorchFunctionMode

from sau.errors import quoted

MERE = {torch.Tensor, *torch._tensor_classes}  # tensors of whatever lay in memory, if they are called with a number
CALLS = 40_000  # of torch's functions while it is read; a tensor takes 5, a parameter 6, and with Adam's state 21


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


class _Called(list[Any]):
    """What may be called: no tensors, which would be made of a number alone and are named by those with attributes. Of
    what is no function torch would write an error with all of it, of tuples of tuples for hours.
    """

    def __contains__(self, thing: object) -> bool:
        if not callable(thing):
            raise ValueError(f"it calls {quoted(thing)}, which is no function")
        if isinstance(thing, type) and thing in MERE:
            raise ValueError("it asks for memory that it has no content for")
        return super().__contains__(thing)


class _Names(dict[str, Any]):
    """What a file may name; torch looks into `values` for what may be called."""

    def __init__(self, names: dict[str, Any]) -> None:
        super().__init__(names)
        self.called = _Called(names.values())

    def values(self) -> Any:
        """Those that may be called."""
        return self.called


@contextmanager
def restrained(size: int) -> Iterator[None]:
    """torch's list without what makes much of little, while a file of `size` bytes is read.

    Copies of a file's own content (bytes, sets, sizes) have together as many items as it has bytes, for an honest one
    writes each of them down; and nothing is made of a number alone, like a tensor of so many values.
    """
    left = size

    def copying(make: Callable[..., Any]) -> Callable[..., Any]:
        def made(*given: Any) -> Any:
            nonlocal left
            left -= sum(len(part) for part in given if hasattr(part, "__len__"))
            if left < 0:
                raise ValueError("it makes more of its content than there is of it")
            return make(*given)

        return made

    names = dict(torchs._get_allowed_globals())
    for name, thing in names.items():
        if thing in (torch.storage.TypedStorage, torch.storage.UntypedStorage):
            names[name] = _Bytes
        elif thing in (OrderedDict, Counter, set, torch.Size):
            names[name] = copying(thing)
    names["_codecs.encode"], names["builtins.bytearray"] = copying(_encoded), copying(_bytearray)
    names["torch._tensor._rebuild_from_type_v2"] = _with_attributes
    allowed = _Names(names)
    with mock.patch.object(torchs, "_get_allowed_globals", lambda: allowed):
        yield


def _encoded(text: Any, how: Any = "latin1") -> Any:
    if how not in ("latin1", "latin-1"):
        raise ValueError(f"bytes by {quoted(how)}, allowed is latin1")
    return text.encode("latin1")


def _bytearray(content: Any = b"", how: Any = "latin1") -> bytearray:
    if not isinstance(content, str | bytes):
        raise ValueError("it asks for memory that it has no content for")
    return bytearray(_encoded(content, how) if isinstance(content, str) else content)


def _with_attributes(build: Any, kind: Any, given: Any, state: Any) -> Any:
    """A tensor with attributes, of what builds tensors from storages alone."""
    if getattr(build, "__module__", "") != "torch._utils":
        raise ValueError("a tensor that is not built from a storage")
    return torch._tensor._rebuild_from_type_v2(build, kind, given, state)
