"""From signatures to flags, help and YAML, and back to objects: a flag exists because a parameter exists.

Precedence: explicit flag > YAML named by the user > what the record says > shipped YAML > signature.
"""

import argparse
import difflib
import math
import reprlib
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import yaml

from sau.config import Option, convert, options
from sau.errors import ConfigError

# Flags of the benchmark that cannot act here; accepted with one warning so that old command lines keep working.
IGNORED = {
    "num_workers": "pictures lie on the device, nothing loads them",
    "pin_memory": "pictures lie on the device, nothing copies them",
    "non_blocking": "pictures lie on the device, nothing copies them",
    "prefetch": "pictures lie on the device, nothing fetches them",
    "git_hash": "the record writes the commit by itself",
    "checkpoint_load": "an interrupted run resumes by repeating its command",
    "checkpoint_save": "the checkpoint lies in the record",
    "log": "the log lies in the record",
    "random_crop": "the attack crops as its data set says",
    "random_rotation": "the attack rotates nothing",
}
# Flags of ours that are gone, and what to do instead.
REMOVED = {
    "devices": "a run uses one device; a grid runs a cell on each (docs/grid.md)",
    "sides": "images keep their size; for a shorter run give fewer --epochs or a smaller --width",
    "unaugmented": "images are augmented as their data set says",
}
_BRIEF = reprlib.Repr()  # prints a value from a file in a few words, however it unfolds
_BRIEF.maxlevel, _BRIEF.maxstring = 1, 100
_SHORT = {"num_workers": "-n", "pin_memory": "-pm", "non_blocking": "-nb", "prefetch": "-pf"}


@dataclass(frozen=True)
class Setting:
    """A value and where it was said, for error messages."""

    value: Any
    origin: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        said = Setting(" ".join(values) if isinstance(values, list) else values, str(option_string))
        setattr(namespace, self.dest, once(getattr(namespace, self.dest, None), said))


def once(earlier: Setting | None, said: Setting) -> Setting:
    """What was said, unless it was said before: under another name it may be repeated, but not differ."""
    if earlier is not None and earlier.origin == said.origin:
        raise ConfigError(f"{said.origin} is given twice; give it once")
    if earlier is not None and earlier.value != said.value:
        both = f"{earlier.origin} is {_BRIEF.repr(earlier.value)} and {said.origin} is {_BRIEF.repr(said.value)}"
        raise ConfigError(f"{both}, which are two names of one setting; give one of them")
    return said


def flags(
    groups: Mapping[str, Sequence[Option]], argv: Sequence[str], ignored: Mapping[str, str] = IGNORED
) -> dict[str, Setting]:
    """The explicit flags of a command line, not yet converted; `--help` and its like stand under `help`.

    `groups` are parameters by heading, `ignored` the flags without effect, and why they have none.
    """
    parser = _parser(groups, {}, ignored)
    known, unknown = parser.parse_known_args(argv)
    if "help" in known:  # also beside mistakes
        return vars(known)
    if unknown and not unknown[0].startswith("-"):
        raise ConfigError(f"{unknown[0]!r} belongs to no flag; allowed is one value a flag, and a list like 10,20")
    if unknown and (name := unknown[0].split("=")[0].removeprefix("--")) in REMOVED:
        raise ConfigError(f"--{name} is gone: {REMOVED[name]}")
    if unknown:
        every = [text for action in parser._actions for text in action.option_strings]
        raise ConfigError(f"unknown flag {unknown[0]!r}{nearest(unknown[0].split('=')[0], every)}; see --help")
    return vars(known)


def help_text(
    usage: str, about: str, groups: Mapping[str, Sequence[Option]], shown: Mapping[str, Any],
    ignored: Mapping[str, str] | None = None,
) -> str:  # fmt: skip
    """The help of a command.

    Args:
        usage: how it is called.
        about: what it does.
        groups: its parameters by heading.
        shown: values in force, by parameter; of others the default is shown.
        ignored: flags without effect, and why they have none; None leaves them and all second names out.
    """
    return _parser(groups, shown, ignored, usage, about).format_help()


def _parser(
    groups: Mapping[str, Sequence[Option]],
    shown: Mapping[str, Any],
    ignored: Mapping[str, str] | None,
    usage: str | None = None,
    about: str | None = None,
) -> _Parser:
    """Without `ignored` it has one name for each parameter, for help alone."""
    parser = _Parser(
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, usage=usage, description=about,
    )  # fmt: skip
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for option in members:
            names = [f"--{name}" for name in (option.name, *(option.aliases if ignored is not None else ()))]
            _add(group, names, option, shown.get(option.name, option.default))
    group = parser.add_argument_group("help")
    group.add_argument(
        "-h", "--help", action="store_const", const=Setting("brief", "--help"), help="these flags and their values here"
    )
    group.add_argument(
        "--print_config", dest="help", action="store_const", const=Setting("config", "--print_config"),
        help="print all settings as a YAML file for --yaml_path",
    )  # fmt: skip
    about = "also other names of the flags, and flags of BackdoorBench without effect"
    group.add_argument("--help_all", dest="help", action="store_const", const=Setting("all", "--help_all"), help=about)
    if ignored is not None:
        seen = {option.name for members in groups.values() for option in members}
        group = parser.add_argument_group("accepted for old command lines, without effect")
        for name in (name for name in ignored if name not in seen):
            names = [f"--{name}", *([_SHORT[name]] if name in _SHORT else [])]
            group.add_argument(*names, dest=name, action=_Once, nargs="*", metavar="X", help=ignored[name])
    return parser


def _add(group: Any, names: Sequence[str], option: Option, value: Any) -> None:
    allowed = f"; {option.range}" if option.range else ""
    text = f"{option.help}{allowed} [{written(value, option.hint)}]".replace("%", "%%")  # `%` would be a placeholder
    how: dict[str, Any] = {"nargs": "?", "const": "true"} if option.hint is bool else {}
    if typing.get_origin(option.hint) is tuple:
        how = {"nargs": "+"}  # a list may also be written with spaces
    group.add_argument(*names, dest=option.name, action=_Once, metavar=_kind(option.hint), help=text, **how)


def written(value: Any, hint: Any = None) -> str:
    """A value as a flag takes it."""
    if value is None:
        return "auto" if hint == bool | None else "none"
    if isinstance(value, tuple):
        return ",".join(map(written, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _kind(hint: Any) -> str:
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "{" + ",".join(map(str, parts)) + "}"
    if origin in (tuple, types.UnionType, typing.Union):
        return _kind(parts[0])
    return str(hint.__name__).upper()


def config_text(about: str, members: Iterable[Option], shown: Mapping[str, Any]) -> str:
    """A YAML file with these parameters, each below its help text.

    Args:
        about: comment at the top.
        members: what to write.
        shown: values in force, by parameter; of others the default is written.
    """
    lines = [f"# {about}"]
    for option in members:
        value = shown.get(option.name, option.default)
        about = f"{option.help}; {option.range}" if option.range else option.help
        lines += textwrap.wrap(about, 118, initial_indent="# ", subsequent_indent="# ")
        plain = list(value) if isinstance(value, tuple) else written(value, option.hint) if value is None else value
        text = yaml.safe_dump([plain], default_flow_style=True, width=math.inf)  # in a list nothing follows the value
        lines.append(f"{option.name}: {text.strip()[1:-1]}")
    return "\n".join(lines)


def nearest(name: str, known: Sequence[str]) -> str:
    """What to add to a refusal of `name`: the known name that it resembles, if one does."""
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def values(settings: Mapping[str, Setting], known: Mapping[str, Option]) -> dict[str, Any]:
    """Every setting converted to its parameter's type; ConfigError says where the wrong one was given."""
    found = {}
    for name, setting in settings.items():
        if name in known:
            try:
                found[name] = convert(setting.value, known[name].hint)
                if (allowed := known[name].misfit(found[name])) is not None:
                    raise ConfigError(f"allowed is {allowed}")
            except ConfigError as error:
                raise ConfigError(f"{setting.origin} is {_BRIEF.repr(setting.value)}; {error}") from None
    return found


def build(cls: type, found: Mapping[str, Any]) -> Any:
    """The object that the values describe."""
    return cls(**{name: found[name] for name in options(cls) if name in found})
