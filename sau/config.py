"""One line a parameter: flag, help text, allowed range, other names, type check and YAML key all come from `param`;
and what attacks, defenses and the settings of their training have in common.

A parameter is a field of a dataclass. Its annotation is its type: bool, int, float, str, a `Literal`, a tuple of one of
these, or one of these `| None`.
"""

import difflib
import inspect
import operator
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from sau.errors import ConfigError, DataError, require
from sau.files import checksum

BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "ge": ("at least", operator.ge), "gt": ("above", operator.gt),
    "le": ("up to", operator.le), "lt": ("below", operator.lt),
}  # fmt: skip
WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
FLOAT32_END = 2.0**128  # 32 bits hold no number from here on
Bound = int | float


def param(default: Any, help: str = "", *, aliases: tuple[str, ...] = (), **bounds: Bound) -> Any:
    """A field of a dataclass that is a flag and a YAML key as well.

    What a subclass leaves out (or all, with a plain default) it takes from the field of its base.

    Args:
        default: its default.
        help: what it is, with units; the range and the default are added.
        aliases: further names of the flag and of the key.
        bounds: `ge`, `gt`, `le` or `lt`: each value is at least, above, at most, below this; of a tuple each entry.
    """
    assert bounds.keys() <= BOUNDS.keys()
    return field(default=default, metadata={**({"help": help} if help else {}), "aliases": aliases, **bounds})


@dataclass(frozen=True)
class Option:
    """What `param` says of one parameter."""

    name: str
    hint: Any
    default: Any
    help: str = ""
    aliases: tuple[str, ...] = ()
    bounds: Mapping[str, Bound] = field(default_factory=dict)

    @property
    def range(self) -> str:
        """The allowed range in words; empty where every value of the type is allowed."""
        return " and ".join(f"{BOUNDS[name][0]} {bound}" for name, bound in self.bounds.items())

    @property
    def about(self) -> str:
        """The help text and the range."""
        return f"{self.help}; {self.range}" if self.range else self.help

    def misfit(self, value: Any) -> str | None:
        """What is allowed instead of `value`; None where it is of the right type and inside the range."""
        words = _words(self.hint)
        if not words:  # a method of somebody's own may have a field that cannot be a flag
            return None
        if not _is_a(value, self.hint):
            return words
        values = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if all(BOUNDS[name][1](each, bound) for name, bound in self.bounds.items() for each in values):
            return None
        return f"none, or {self.range}" if _optional(self.hint) else self.range

    def parse(self, value: Any) -> Any:
        """A flag's text or a YAML value as this parameter; ConfigError says what is allowed."""
        found = convert(value, self.hint)
        if (allowed := self.misfit(found)) is not None:
            raise ConfigError(f"allowed is {allowed}")
        return found


def options(cls: type) -> dict[str, Option]:
    """The parameters of a dataclass, by name."""
    hints, found = typing.get_type_hints(cls), {}
    for each in (one for one in fields(cls) if one.init):
        known: dict[str, Any] = {"help": "", "aliases": ()}
        for base in reversed(cls.__mro__):
            if each.name in inspect.get_annotations(base):
                more = base.__dict__["__dataclass_fields__"][each.name].metadata
                known |= {**more, "aliases": known["aliases"] + more.get("aliases", ())}
        default = None if each.default is MISSING else each.default
        bounds = {name: known[name] for name in BOUNDS if name in known}
        found[each.name] = Option(each.name, hints[each.name], default, known["help"], known["aliases"], bounds)
    return found


def check(settings: Any, of: str = "") -> None:
    """ConfigError if a field of a dataclass has the wrong type or is out of its range.

    Args:
        settings: an object of a dataclass.
        of: what its fields belong to, for the message.
    """
    for name, option in options(type(settings)).items():
        value = getattr(settings, name)
        allowed = option.misfit(value)
        require(name + of, value, allowed is None, str(allowed))


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method is a frozen set of hyperparameters; whatever changes while it runs lives in the state of `prepare`.

    `ignored` maps flags of the benchmark that have no effect here to the reason, `training_aliases` the benchmark's
    names for settings of the victim's training to ours, where only this method has them.
    """

    name: ClassVar[str] = ""
    compiles: ClassVar[bool] = False  # whether torch.compile may run its network, which has no hooks and steady sizes
    training_aliases: ClassVar[dict[str, str]] = {}
    ignored: ClassVar[dict[str, str]] = {}
    unread: ClassVar[tuple[str, ...]] = ()  # keys of the benchmark's own file of the method that its code does not read
    # Whether `step` has the device do the same each time, with one update of each `Descent` in its state: CUDA may then
    # replay it as a graph, and its Python does not run again. A subclass with a step of its own has to say it anew.
    graph_safe: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ()  # parameters that name files, whose content is part of what a run is

    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        if "graph_safe" not in vars(cls) and "step" in vars(cls):
            cls.graph_safe = False
        helps = {name: each.metadata.get("help") for name, each in vars(cls).items() if hasattr(each, "metadata")}
        if lines := [f"    {name}: {text}." for name, text in helps.items() if text]:
            cls.__doc__ = "\n".join([(cls.__doc__ or "").rstrip(), "", "Args:", *lines, ""])

    def __post_init__(self) -> None:
        check(self)

    def params(self) -> dict[str, Any]:
        """The hyperparameters, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def identity(self) -> dict[str, Any]:
        """`params` as they determine a result: of a file the SHA-256 of its content, for the place differs between
        machines; of a record's folder that of its weights. DataError if one cannot be read."""
        found = self.params()
        for name in self.files:
            if (given := found[name]) is not None:
                path = Path(given) / "model.safetensors" if Path(given).is_dir() else Path(given)
                try:
                    found[f"{name}_sha256"] = checksum(path)
                except DataError as error:
                    raise DataError(f"{name}: {error}; name an existing file") from None
                del found[name]
        return found

    def step(self, state: dict[str, Any], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """One update from a batch (x [B, C, H, W] in [0, 1], y [B]); returns what to report: scalars, averaged by
        epoch, or integer counts, summed."""
        raise TypeError(f"{type(self).__name__} has no step of its own; it must define one or override the caller")

    def end_epoch(self, state: dict[str, Any], losses: dict[str, float]) -> bool | None:
        """After each epoch, with its mean losses: move the learning-rate schedule. True ends the training early."""
        state["descent"].end_epoch(losses["loss"])
        return None

    def supports_microbatch(self) -> bool:
        """Whether `step` makes one update, of `state["descent"]`, from a mean over the images of its batch; the batch
        may then go through in parts where memory does not hold it."""
        return False

    def require(self, name: str, ok: bool, allowed: str) -> None:
        """Refuse a hyperparameter: ConfigError with its name, its value and what is allowed."""
        require(name, getattr(self, name), ok, allowed)


def convert(value: Any, hint: Any) -> Any:
    """A flag's text or a YAML value as the annotated type; ConfigError says what is allowed."""
    text = "" if isinstance(value, dict | list | tuple) else str(value).strip()
    if _optional(hint):
        return None if value is None or text.lower() in ("none", "auto", "null") else convert(value, _plain(hint))
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is tuple and not isinstance(value, dict):
        items = value if isinstance(value, list | tuple) else text.strip("[]() ").replace(",", " ").split()
        return tuple(convert(item, parts[0]) for item in items)
    named = {str(choice).lower(): choice for choice in parts} if kind is Literal else {}
    named = {"true": True, "1": True, "false": False, "0": False} if kind is bool else named
    if text.lower() in named:
        return named[text.lower()]
    if kind is str and value is not None and not isinstance(value, bool | dict | list):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool | dict | list):
        with suppress(ValueError, OverflowError):  # refused below, like every other wrong value
            number = float(value) if kind is float and isinstance(value, Real) else kind(text)
            if kind is int or abs(number) < FLOAT32_END:  # NaN is not
                return number
    raise ConfigError(f"allowed is {_words(hint)}")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether `value` is of the annotated type already."""
    given = tuple(value) if isinstance(value, list) else os.fspath(value) if isinstance(value, os.PathLike) else value
    try:
        found = convert(value, hint)
    except ConfigError:
        return False
    return bool(found == given) and isinstance(found, bool) == isinstance(value, bool)


def _optional(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _plain(hint: Any) -> Any:
    """A type without `| None`."""
    return next(part for part in typing.get_args(hint) if part is not type(None)) if _optional(hint) else hint


def _words(hint: Any) -> str:
    """What a type allows; "" for one that no flag can have."""
    kind, parts = typing.get_origin(_plain(hint)), typing.get_args(_plain(hint))
    if kind is Literal:
        words = f"one of {', '.join(map(str, parts))}"
    elif kind is tuple:
        words = _words(parts[0]) and f"a list, each {_words(parts[0])}"
    else:
        words = WORDS.get(_plain(hint), "")
    return f"{words}, or none" if words and _optional(hint) else words


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to a refusal of `name`: the known name that it resembles, if one does."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""
