"""One line a parameter: flag, help text, allowed range, other names, type check and YAML key all come from `param`;
and what attacks, defenses and the settings of their training have in common.

A parameter is a field of a dataclass. Its annotation is its type: bool, int, float, str, a `Literal`, a tuple of one of
these, or one of these `| None`.
"""

import difflib
import inspect
import os
import types
import typing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from sau.errors import ConfigError, DataError, require
from sau.files import checksum

WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
FLOAT32_END = 2.0**128  # 32 bits hold no number from here on
Bound = int | float


def param(
    default: Any, help: str = "", *, ge: Bound | None = None, gt: Bound | None = None, le: Bound | None = None,
    lt: Bound | None = None, aliases: tuple[str, ...] = (),
) -> Any:  # fmt: skip
    """A field of a dataclass that is a flag and a YAML key as well.

    What a subclass leaves out (or all, with a plain default) it takes from the field of its base.

    Args:
        default: its default.
        help: what it is, with units; the range and the default are added.
        ge: least value; of a tuple that of each entry, as for all bounds.
        gt: every value is above this.
        le: largest value.
        lt: every value is below this.
        aliases: further names of the flag and of the key.
    """
    given = {"help": help, "ge": ge, "gt": gt, "le": le, "lt": lt, "aliases": aliases}
    return field(default=default, metadata={key: value for key, value in given.items() if value not in (None, "", ())})


@dataclass(frozen=True)
class Option:
    """What `param` says of one parameter."""

    name: str
    hint: Any
    default: Any
    help: str = ""
    aliases: tuple[str, ...] = ()
    ge: Bound | None = None
    gt: Bound | None = None
    le: Bound | None = None
    lt: Bound | None = None

    @property
    def range(self) -> str:
        """The allowed range in words; empty where every value of the type is allowed."""
        if self.ge is not None and self.le is not None:
            return f"{self.ge} to {self.le}"
        low = f"above {self.gt}" if self.gt is not None else f"{self.ge}" if self.ge is not None else ""
        high = f"up to {self.le}" if self.le is not None else f"below {self.lt}" if self.lt is not None else ""
        if self.ge is not None:
            return f"{low} up to {high}" if high else f"{low} and more"
        return " and ".join(filter(None, (low, high)))

    @property
    def about(self) -> str:
        """The help text and the range."""
        return f"{self.help}; {self.range}" if self.range else self.help

    def misfit(self, value: Any) -> str | None:
        """What is allowed instead of `value`; None where it is of the right type and inside the range."""
        if (wrong := misfit(value, self.hint)) is not None:
            return wrong
        values = value if isinstance(value, list | tuple) else () if value is None else (value,)
        if all(self._inside(each) for each in values):
            return None
        return f"none, or {self.range}" if _optional(self.hint) else self.range

    def _inside(self, value: Any) -> bool:
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )


def options(cls: type) -> dict[str, Option]:
    """The parameters of a dataclass, by name."""
    hints, found = typing.get_type_hints(cls), {}
    for each in fields(cls):
        known: dict[str, Any] = {"aliases": ()}
        for base in reversed(cls.__mro__):
            if each.name in inspect.get_annotations(base):
                more = base.__dict__["__dataclass_fields__"][each.name].metadata
                known = {**known, **more, "aliases": known["aliases"] + more.get("aliases", ())}
        if each.init:
            default = None if each.default is MISSING else each.default
            found[each.name] = Option(each.name, hints[each.name], default, **known)
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


def describe(cls: type) -> str:
    """An `Args:` block of the parameters that a class itself declares, for its docstring; "" where it has none."""
    own = {name: each.metadata for name, each in vars(cls).items() if hasattr(each, "metadata")}
    lines = [f"    {name}: {more['help']}." for name, more in own.items() if "help" in more]
    return "\n".join(["\n\nArgs:", *lines]) + "\n" if lines else ""


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
        cls.__doc__ = (cls.__doc__ or "").rstrip() + describe(cls)

    def __post_init__(self) -> None:
        check(self)

    def params(self) -> dict[str, Any]:
        """The hyperparameters, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def contents(self) -> dict[str, str]:
        """The SHA-256 of each file that is given; of a record's folder, that of the weights. DataError if one cannot be
        read."""
        sums = {}
        for name in self.files:
            if (given := getattr(self, name)) is not None:
                path = Path(given) / "model.safetensors" if Path(given).is_dir() else Path(given)
                try:
                    sums[f"{name}_sha256"] = checksum(path)
                except DataError as error:
                    bare = path != Path(given) and not path.exists()
                    said = f"{given} is a folder without {path.name}" if bare else error
                    raise DataError(f"{name}: {said}; name a file that is there") from None
        return sums

    def identity(self) -> dict[str, Any]:
        """`params` as they determine a result: of a file that is given the content, for the place differs between
        machines."""
        sums = self.contents()
        return {name: value for name, value in self.params().items() if f"{name}_sha256" not in sums} | sums

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
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if _optional(hint):
        return None if value is None or text.lower() in ("none", "auto", "null") else convert(value, _inner(hint))
    if kind is tuple and not isinstance(value, dict):
        items = value if isinstance(value, list | tuple) else text.strip("[]() ").replace(",", " ").split()
        return tuple(convert(item, parts[0]) for item in items)
    if kind is Literal:
        choices = {str(choice).lower(): choice for choice in parts}
        if text.lower() in choices:
            return choices[text.lower()]
    if hint is bool and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    if hint is str and value is not None and not isinstance(value, bool | dict | list):
        return str(value)
    if hint in (int, float) and not isinstance(value, bool | dict | list):
        with suppress(ValueError, OverflowError):  # refused below, like every other wrong value
            number = float(value) if hint is float and isinstance(value, Real) else hint(text)
            if hint is int or abs(number) < FLOAT32_END:  # NaN is not
                return number
    raise ConfigError(f"allowed is {_words(hint)}")


def misfit(value: Any, hint: Any) -> str | None:
    """What is allowed instead of `value`, where it is not of the annotated type."""
    if not _settable(hint):
        return None
    given = tuple(value) if isinstance(value, list) else os.fspath(value) if isinstance(value, os.PathLike) else value
    with suppress(ConfigError):
        if (found := convert(value, hint)) == given and isinstance(found, bool) == isinstance(value, bool):
            return None
    return _words(hint)


def _settable(hint: Any) -> bool:
    """Whether a flag can have this type; a method of somebody's own may have fields of others."""
    if typing.get_origin(hint) is tuple or _optional(hint):
        return _settable(_inner(hint))
    return typing.get_origin(hint) is Literal or hint in WORDS


def _optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union)


def _inner(hint: Any) -> Any:
    return next(part for part in typing.get_args(hint) if part is not type(None))


def _words(hint: Any) -> str:
    """What a type allows."""
    if _optional(hint):
        return f"{_words(_inner(hint))}, or none"
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, parts))}"
    return f"a list, each {_words(parts[0])}" if kind is tuple else WORDS[hint]


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to a refusal of `name`: the known name that it resembles, if one does."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""
