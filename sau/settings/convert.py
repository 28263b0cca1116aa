"""A flag's text, or a value from YAML, as the type of its parameter, and whether a value from Python is of it."""

import os
import types
import typing
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, Literal

from sau.errors import ConfigError, require

WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text"}
FAR = 2.0**128  # 32 bits hold no number from here on
KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (Integral,), float: (Real,), str: (str, os.PathLike)}


def convert(value: Any, hint: Any) -> Any:
    """A flag's text or a YAML value as the annotated type; ConfigError says what is allowed."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None or _text(value).lower() in ("none", "auto", "null"):
            return None
        return convert(value, next(part for part in parts if part is not type(None)))
    if origin is Literal:
        for choice in parts:
            if _text(value).lower() == str(choice).lower():
                return choice
        raise ConfigError(f"allowed is one of {', '.join(map(str, parts))}")
    if origin is tuple:
        if isinstance(value, dict):
            raise ConfigError("allowed is a list")
        items = value if isinstance(value, list | tuple) else str(value).strip("[]() ").replace(",", " ").split()
        return tuple(convert(item, parts[0]) for item in items)
    return _scalar(value, hint)


def _text(value: Any) -> str:
    """The text of a plain value; of lists and mappings, which YAML can make of any length from a few bytes, none."""
    return "" if isinstance(value, dict | list | tuple) else str(value).strip()


def _scalar(value: Any, hint: Any) -> Any:
    text = _text(value)
    if hint is bool and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    if hint is str and value is not None and not isinstance(value, bool | dict | list):
        return text
    if hint in (int, float) and not isinstance(value, bool | dict | list):
        try:
            number = hint(text)
            if hint is int or abs(number) < FAR:  # NaN is not
                return number
        except ValueError:
            pass  # said below, together with every other wrong value
    raise ConfigError(f"allowed is {WORDS[hint]}")


def check_types(settings: Any, of: str = "") -> None:
    """ConfigError if a field of a dataclass is not of its annotated type; `of` is what it is a setting of."""
    hints = typing.get_type_hints(type(settings))
    for field in fields(settings):
        value = getattr(settings, field.name)
        allowed = misfit(value, hints[field.name])
        require(field.name + of, value, allowed is None, str(allowed))


def misfit(value: Any, hint: Any) -> str | None:
    """What is allowed instead of `value`, which no flag gave, where the annotated type is another one."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        every = [misfit(value, part) for part in parts if part is not type(None)]
        return None if value is None or None in every else f"{every[0]}, or None"
    if origin is Literal:
        return None if value in parts else f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return "a tuple"
        return next((f"a tuple, each {wrong}" for item in value if (wrong := misfit(item, parts[0]))), None)
    if hint not in KINDS:  # of a method of somebody's own, which no flag sets
        return None
    fits = isinstance(value, KINDS[hint]) and (hint is bool) == isinstance(value, bool)
    return None if fits and (hint is not float or abs(value) < FAR) else WORDS[hint]
