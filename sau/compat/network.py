"""A network that somebody hands over: found by its weights, by a name, or made by code that the user trusts."""

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from sau.compat import weights
from sau.compat.guess import guess, unwrapped
from sau.errors import ConfigError, RecordError
from sau.models import has_width, layout
from sau.settings.run import OwnRun


def network(run: OwnRun, classes: int, found: weights.Weights | None = None) -> tuple[nn.Module, weights.Weights, str]:
    """The network with its weights, their file, and the network's name.

    `classes` are its outputs, where `arch` is a plain name; `found` is what the file holds, if it has been read.
    ConfigError for a network that cannot be found or trusted, RecordError for weights that are not its own.
    """
    found = weights.read(Path(str(run.model_file))) if found is None else found
    if run.model_prefix is not None:
        found = _part(found, run.model_prefix)
    if ":" in run.arch:
        imported = _imported(run)
        name, make = run.arch, lambda: imported
    elif run.arch == "auto":
        known = guess(found)
        if known is None:
            raise ConfigError(f"{found.path} holds no known network; name it with --arch NAME or module:function")
        name, make = known.name, partial(unwrapped, known.name, known.classes, known.width)
    else:
        name, make = run.arch, partial(unwrapped, run.arch, classes, _width(found) if has_width(run.arch) else None)
    own = make().state_dict() if ":" in run.arch else layout(make)  # the file may claim any width
    try:
        found.fitting(own)
    except RecordError as error:
        raise RecordError(f"{error}{_instead(found)}") from None
    net = make()
    net.load_state_dict(found.of(own))
    return net.eval(), found, name


def _part(found: weights.Weights, prefix: str) -> weights.Weights:
    """What lies under `prefix` alone; RecordError if that is nothing."""
    whole = f"{prefix.removesuffix('.')}."  # `state_dict` is not `state_dict_ema`
    start = whole if any(place.startswith(whole) for place in found.tensors) else prefix
    chosen = {place: value for place, value in found.tensors.items() if place.startswith(start)}
    if not chosen:
        raise RecordError(f"{found.path} has no tensor under {prefix!r}; scripts/inspect_checkpoint.py lists them")
    return replace(found, tensors=chosen)


def _instead(found: weights.Weights) -> str:
    """What to say of weights that are another network's than the one that was named."""
    known = guess(found)
    if known is None:
        return ""
    width = f", width {known.width}" if known.width else ""
    return f"; its tensors fit {known.name}{width}, which --arch auto finds"


def _imported(run: OwnRun) -> nn.Module:
    module, _, function = run.arch.partition(":")
    if not run.trust_code:
        raise ConfigError(f"--arch {run.arch} would run code of {module}; say --trust_code true if you trust it")
    try:
        with _modules_here():
            made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever foreign code raises
        raise ConfigError(f"--arch {run.arch} failed: {type(error).__name__}: {error}") from None
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--arch {run.arch} returned {type(made).__name__}, wanted is a torch.nn.Module")
    return made


@contextmanager
def _modules_here() -> Iterator[None]:
    """The current folder is searched for modules, too, as `python -m` does."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _width(found: weights.Weights) -> int:
    """Channels of the first convolution."""
    return next((len(value) for value in found.tensors.values() if value.ndim == 4), 64)
