"""Tables of parameters from the code: `<!-- api: sau.score -->` on a page is replaced by one when the site is built.

A mark of attacks or defenses, `<!-- api: sau.defense.DEFENSES -->`, becomes a section for each.
"""

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from sau.config import Option, options, ordered

MARK = re.compile(r"^<!-- api: ([\w.]+) -->$", re.MULTILINE)
HEAD = ("name", "default", "meaning")


def filled(text: str) -> str:
    """A page with its marks replaced."""
    return MARK.sub(lambda mark: "\n\n".join(heading(*one) + described(one[1]) for one in named(mark[1])), text)


def named(path: str) -> list[tuple[str, Any]]:
    """What a mark names: a thing without a page, or each method with the path of its page without the ending."""
    thing = resolve_name(path)
    if not isinstance(thing, Mapping):
        return [("", thing)]
    folder = path.split(".")[1] + "s"
    return [(f"{folder}/{name}", method) for name, method in thing.items()]


def heading(page: str, thing: Any) -> str:
    """A method's name with a link to its page."""
    if not page:
        return ""
    linked = page if (Path(__file__).parent / f"{page}.md").is_file() else f"{page.split('/')[0]}/README"
    return f"### [{thing.__name__}]({linked}.md)\n\n"


def unbroken(text: str) -> str:
    """A page whose tables keep figures like `81.1 / 2.3 (3)` on one line."""
    gap = re.compile(r"(?<=[\d-]) (?=/ [+\d-]|\(\d+\))|(?<=[\d-] /) (?=[+\d-])")
    return re.sub(r"^\|.*", lambda row: gap.sub("\u2060\u00a0", row[0]), text, flags=re.MULTILINE)


def described(thing: Any) -> str:
    """Its docstring, with the arguments in a table; of a class of settings all parameters, inherited ones included."""
    before, listed, after = sections(inspect.getdoc(thing) or "")
    if is_settings(thing):
        rows = [(f"`{each.name}`", f"`{each.default!r}`", meaning(each)) for each in ordered(thing)]
        return f"{before}\n\n{table(HEAD, rows)}"
    given = inspect.signature(thing).parameters
    rows = [(f"`{name}`", default(given[name]) if name in given else "", text) for name, text in listed.items()]
    return f"{before}\n\n{table(HEAD, rows) if rows else ''}\n\n{after}"


def is_settings(thing: Any) -> bool:
    """Whether its fields are parameters of `sau.config.param`."""
    return is_dataclass(thing) and any(option.help for option in options(thing).values())  # type: ignore[arg-type]


def values(hint: Any, limits: str = "") -> str:
    """The type of a parameter and its range."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        named = [values(part, limits) for part in parts if part is not types.NoneType]
        return " or ".join([*named, "None"])
    if kind is Literal:
        return ", ".join(f"`{part!r}`" for part in parts)
    word = f"tuple of {parts[0].__name__}" if kind is tuple and parts else kind.__name__
    return f"{word}, {limits}" if limits else word


def meaning(option: Option) -> str:
    """The help text, the allowed values and the other names of the flag."""
    others = f"; also `{'`, `'.join(option.aliases)}`" if option.aliases else ""
    return f"{plain(option.help)} ({values(option.hint, option.range)}{others})"


def default(parameter: inspect.Parameter) -> str:
    """The default of an argument as Python writes it; "" where it has none or no short one."""
    text = repr(parameter.default)
    return "" if parameter.default is parameter.empty else "`...`" if text.startswith("<") else f"`{text}`"


def sections(doc: str) -> tuple[str, dict[str, str], str]:
    """A docstring as the text before `Args:`, the arguments with their texts, and the text behind them."""
    before, _, rest = doc.partition("\nArgs:\n")
    block, _, after = rest.partition("\n\n")
    listed: dict[str, str] = {}
    for line in block.splitlines():
        if start := re.match(r"    (\w+): (.*)", line):
            listed[start[1]] = plain(start[2])
        elif listed:
            listed[[*listed][-1]] += " " + plain(line.strip())
    return prose(before), listed, prose(after)


def prose(text: str) -> str:
    """A docstring's paragraphs as Markdown; indented ones stay as they are."""
    return "\n".join(line if line.startswith("    ") else plain(line) for line in text.strip().splitlines())


def plain(text: str) -> str:
    """Text whose signs mean themselves in Markdown, but for `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<|$\[])", r"\\\1", part) for part in parts)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
