"""A network that somebody hands over: found by its weights, by a name, or made by code that the user trusts."""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import nn

from sau.compat import weights
from sau.compat.weights import guess, unwrapped
from sau.errors import ConfigError, RecordError
from sau.models import has_width, state_dict_spec
from sau.settings import OwnRun


def network(run: OwnRun, classes: int, found: weights.Weights | None = None) -> tuple[nn.Module, weights.Weights, str]:
    """The network with its weights, the content of their file, and the network's name.

    Args:
        run: the file and the architecture.
        classes: logits, where `arch` is a plain name.
        found: the content of the file, if it has been read.

    Raises:
        ConfigError: the network cannot be found or trusted.
        RecordError: the weights are of another network.
    """
    found = weights.read(Path(str(run.model_file))) if found is None else found
    if run.model_prefix is not None:
        found = _below(found, run.model_prefix)
    name, make = _architecture(run, classes, found)
    own = make().state_dict() if ":" in name else state_dict_spec(make)  # no memory yet: the file may claim any width
    try:
        state = found.of(own)
    except RecordError as error:
        advice = f"; its tensors fit {known.name}, which --arch auto finds" if (known := guess(found)) else ""
        raise RecordError(f"{error}{advice}") from None
    net = make()
    net.load_state_dict(state)
    return net.eval(), found, name


def _architecture(run: OwnRun, classes: int, found: weights.Weights) -> tuple[str, Callable[[], nn.Module]]:
    """The network's name and what makes it."""
    if ":" in run.arch:
        net = _imported(run)
        return run.arch, lambda: net
    if run.arch != "auto":
        # The width is that of the first convolution.
        width = next((len(value) for value in found.tensors.values() if value.ndim == 4), 64)
        return run.arch, partial(unwrapped, run.arch, classes, width if has_width(run.arch) else None)
    known = guess(found)
    if known is None:
        raise ConfigError(f"{found.path} holds no known network; name it with --arch NAME or module:function")
    return known.name, partial(unwrapped, known.name, known.classes, known.width)


def _below(found: weights.Weights, prefix: str) -> weights.Weights:
    """The tensors under `prefix` alone; RecordError if there are none."""
    whole = f"{prefix.removesuffix('.')}."  # `state_dict` is not `state_dict_ema`
    start = whole if any(place.startswith(whole) for place in found.tensors) else prefix
    chosen = {place: value for place, value in found.tensors.items() if place.startswith(start)}
    if not chosen:
        raise RecordError(f"{found.path} has no tensor under {prefix!r}; sau inspect lists them")
    return replace(found, tensors=chosen)


def _imported(run: OwnRun) -> nn.Module:
    module, _, function = run.arch.partition(":")
    if not run.trust_code:
        raise ConfigError(f"--arch {run.arch} would run code of {module}; say --trust_code true if you trust it")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        net = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever that code raises
        raise ConfigError(f"--arch {run.arch} failed: {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--arch {run.arch} returned {type(net).__name__}, wanted is a torch.nn.Module")
    return net
