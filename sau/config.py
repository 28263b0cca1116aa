"""One line a parameter: flag, help text, allowed range, other names, type check and YAML key all come from `param`.

A parameter is a field of a dataclass. Its annotation is its type: bool, int, float, str, a `Literal`, a tuple of one of
these, or one of these `| None`.
"""

import difflib
import inspect
import os
import reprlib
import typing
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from decimal import ROUND_DOWN, Context
from functools import cache
from numbers import Real
from operator import ge, gt, le, lt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from sau.errors import NO_YAML, ConfigError, require
from sau.files import read

BOUNDS = {"ge": ("at least", ge), "gt": ("above", gt), "le": ("up to", le), "lt": ("below", lt)}
WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
SWITCH = {"true": True, "1": True, "false": False, "0": False}
FLOAT32_END = 2.0**128  # 32 bits hold no number from here on
# BackdoorBench's files of SAU, i-BAU (epochs) and NAD (weight_decay) hold both, and its code reads the second.
SUPERSEDED = {"epochs": "n_rounds", "weight_decay": "wd"}
_BRIEF = reprlib.Repr()  # prints a value from a file in a few words, however long it is
_BRIEF.maxlevel, _BRIEF.maxstring = 1, 100
Bound = int | float


def param(default: Any, help: str = "", *, aliases: tuple[str, ...] = (), **bounds: Bound) -> Any:
    """A field of a dataclass that is a flag and a YAML key as well. What a subclass leaves out (or all, with a plain
    default) it takes from the field of its base.

    `help` says what it is, with units; range and default are added. `aliases` are further names of flag and key.
    `bounds` (`ge`, `gt`, `le`, `lt`) hold for each value, of a tuple for each entry."""
    assert bounds.keys() <= BOUNDS.keys()
    return field(default=default, metadata={**({"help": help} if help else {}), "aliases": aliases, **bounds})


def at_most(bound: float) -> str:
    """The largest number of four digits that is not above `bound`, which is 0 or more."""
    return f"{float(Context(4, ROUND_DOWN).create_decimal(str(bound))):g}"


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
        return f"{self.help}; {self.range}" if self.range else self.help

    def parse(self, value: Any) -> Any:
        """A flag's text or a YAML value as this parameter; ConfigError says what is allowed."""
        found = convert(value, self.hint)
        each = found if isinstance(found, tuple) else () if found is None else (found,)
        if all(BOUNDS[name][1](one, bound) for name, bound in self.bounds.items() for one in each):
            return found
        raise _misfit(f"none, or {self.range}" if split_hint(self.hint)[2] else self.range)


@cache
def options(cls: type) -> Mapping[str, Option]:
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


def ordered(cls: type) -> list[Option]:
    """The parameters of a dataclass: its own first, then those of its bases, the most general last."""
    line = cls.__mro__

    def introduced(name: str) -> int:
        return max(at for at, each in enumerate(line) if name in inspect.get_annotations(each))

    return sorted(options(cls).values(), key=lambda option: introduced(option.name))


def check(settings: Any, of: str = "") -> None:
    """ConfigError if a field of the dataclass has the wrong type or is out of its range; `of` says whose it is."""
    for name, option in options(settings.__class__).items():  # for mypy `type(settings)` has no hash
        if not (words := _words(option.hint)):  # a method of somebody's own may have a field that cannot be a flag
            continue
        value = getattr(settings, name)
        same = tuple(value) if isinstance(value, list) else str(value) if isinstance(value, os.PathLike) else value
        try:
            found = option.parse(value)
            ok = found == same and isinstance(found, bool) == isinstance(value, bool)  # a flag's text is no value
        except ConfigError as error:
            ok, words = False, str(error.allowed)
        require(name + of, value, ok, words)


@cache
def split_hint(hint: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """(type, its parts, whether None is allowed): of `tuple[int, ...] | None` that is (tuple, (int, ...), True)."""
    parts = typing.get_args(hint)
    if type(None) in parts:
        return *split_hint(next(part for part in parts if part is not type(None)))[:2], True
    return typing.get_origin(hint) or hint, parts, False


def convert(value: Any, hint: Any) -> Any:
    """A flag's text or a YAML value as the annotated type; ConfigError says what is allowed."""
    kind, parts, optional = split_hint(hint)
    text = "" if isinstance(value, dict | list | tuple) else str(value).strip()
    if optional and (value is None or text.lower() in ("none", "auto", "null")):
        return None
    if kind is tuple and not isinstance(value, dict):
        items = value if isinstance(value, list | tuple) else text.strip("[]() ").replace(",", " ").split()
        return tuple(convert(item, parts[0]) for item in items)
    named = {str(choice).lower(): choice for choice in parts} if kind is Literal else SWITCH if kind is bool else {}
    if text.lower() in named:
        return named[text.lower()]
    if kind is str and value is not None and not isinstance(value, bool | dict | list):
        return str(value)
    if kind in (int, float) and not isinstance(value, bool | dict | list):
        with suppress(ValueError, OverflowError):  # refused below, like every other wrong value
            number = float(value) if kind is float and isinstance(value, Real) else kind(text)
            if kind is int or abs(number) < FLOAT32_END:  # NaN is not
                return number
    raise _misfit(_words(hint))


def _misfit(allowed: str) -> ConfigError:
    return ConfigError(f"allowed is {allowed}", allowed=allowed)


@cache
def _words(hint: Any) -> str:
    """What a type allows; "" for one that no flag can have."""
    kind, parts, optional = split_hint(hint)
    if kind is Literal:
        words = f"one of {', '.join(map(str, parts))}"
    elif kind is tuple:
        words = _words(parts[0]) and f"a list, each {_words(parts[0])}"
    else:
        words = WORDS.get(kind, "")
    return f"{words}, or none" if words and optional else words


def written(value: Any, hint: Any = None) -> str:
    """A value as a flag takes it."""
    if value is None:
        return "auto" if hint == bool | None else "none"
    if isinstance(value, list | tuple):
        return ",".join(map(written, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to a refusal of `name`: the known name that it resembles, if one does."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {near[0]}?)" if near else ""


# Settings from flags and YAML files


class Setting(NamedTuple):
    """A value and where it was given, for error messages."""

    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.origin} is {_BRIEF.repr(self.value)}"


def values(settings: Mapping[str, Setting], known: Mapping[str, Option]) -> dict[str, Any]:
    """Every setting as the type of its parameter; ConfigError names where a wrong one was given."""
    found = {}
    for name, setting in settings.items():
        try:
            if name in known:
                found[name] = known[name].parse(setting.value)
        except ConfigError as error:
            raise ConfigError(f"{setting}; {error}") from None
    return found


def once(settings: dict[str, Any], name: str, given: Setting) -> None:
    """Add a setting; ConfigError if another value was given before under this name or another one of the parameter."""
    earlier = settings.setdefault(name, given)
    if earlier.value != given.value:
        raise ConfigError(f"{earlier} and {given}, for one setting; give one of them")


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:  # plain YAML silently takes the last one
            raise yaml.YAMLError(f"{twice[0]} is given twice; give it once")
        return super().construct_mapping(node, deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The content of a YAML file; ConfigError if it is no mapping of names to values."""
    try:
        content = _Yaml(read(path).decode()).get_single_data() or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except NO_YAML as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return mapping(content, str(path))


def mapping(value: Any, what: str) -> dict[str, Any]:
    """`value`; ConfigError, about `what`, if it is no mapping of names to values."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what}: allowed is a mapping of names to values")
    return value


def settings_of(
    content: Any, path: Path | str, known: Mapping[str, Option], ignored: Collection[str] = ()
) -> dict[str, Setting]:
    """The settings of a mapping from `path`, by the names of their parameters; values may be lists and mappings.
    ConfigError for anything but a mapping, and for unknown keys."""
    canonical = {other: option.name for option in known.values() for other in (option.name, *option.aliases)}
    found: dict[str, Setting] = {}
    for key, value in mapping(content, str(path)).items():
        if SUPERSEDED.get(key) in content or (value is None and key in canonical):
            continue  # a key without a value sets nothing
        if key not in canonical and key not in ignored:
            raise ConfigError(f"{path}: {key}: unknown key{nearest(key, [*canonical, *ignored])}")
        once(found, canonical.get(key, key), Setting(value, f"{path}: {key}"))
    return found
