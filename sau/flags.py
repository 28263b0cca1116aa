"""Flags, help texts and YAML files: what is written by hand, to and from the parameters of `sau.config`."""

import argparse
import math
import re
import reprlib
import textwrap
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from sau.config import Option, convert, nearest, options
from sau.data.sources import SOURCES
from sau.errors import NO_YAML, ConfigError
from sau.files import read

SHORT = {"num_workers": "-n", "pin_memory": "-pm", "non_blocking": "-nb", "prefetch": "-pf"}
# Flags of BackdoorBench that have no effect here; accepted with one warning, so that old command lines keep working.
IGNORED = {
    **dict.fromkeys(SHORT, "images lie on the device, so nothing loads or copies them"),
    "git_hash": "the record has the commit in any case",
    "checkpoint_load": "an interrupted run resumes by repeating its command",
    "checkpoint_save": "the checkpoint lies in the record",
    "log": "the log lies in the record",
    "random_crop": "the attack crops as its data set says",
    "random_rotation": "the attack rotates nothing",
}
RecipeName = Literal["paper", "cpu", "fast"]
RECIPES: dict[str, str] = {
    "paper": "the published settings; the default on CUDA",
    "cpu": "a narrow network and few epochs; the default without CUDA",
    "fast": "an attack's network in a fraction of the time of paper, on CUDA",
}
# Needed before the recipe and the data set are known, so that they cannot depend on these.
EARLY = ("dataset", "recipe", "device", "record_root", "result_file", "model_file")
CASES = {"recipes", "datasets"}  # keys of settings for one recipe or one data set
# BackdoorBench's files of SAU, i-BAU (epochs) and NAD (weight_decay) hold both, and its code reads the second.
SUPERSEDED = {"epochs": "n_rounds", "weight_decay": "wd"}
_BRIEF = reprlib.Repr()  # prints a value from a file in a few words, however long it is
_BRIEF.maxlevel, _BRIEF.maxstring = 1, 100


@dataclass(frozen=True)
class Setting:
    """A value and where it was given, for error messages."""

    value: Any
    origin: str


def once(earlier: Setting | None, given: Setting) -> Setting:
    """The setting, unless it was given before: two names of one parameter may agree, but not differ."""
    if earlier is not None and earlier.origin == given.origin:
        raise ConfigError(f"{given.origin} is given twice; give it once")
    if earlier is not None and earlier.value != given.value:
        both = f"{earlier.origin} is {_BRIEF.repr(earlier.value)} and {given.origin} is {_BRIEF.repr(given.value)}"
        raise ConfigError(f"{both}, which are two names of one setting; give one of them")
    return given


def values(settings: Mapping[str, Setting], known: Mapping[str, Option]) -> dict[str, Any]:
    """Every setting as the type of its parameter; ConfigError names where a wrong one was given."""
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


class _Once(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given = Setting(" ".join(values) if isinstance(values, list) else values, str(option_string))
        setattr(namespace, self.dest, once(getattr(namespace, self.dest, None), given))


def parse_flags(
    groups: Mapping[str, Sequence[Option]], argv: Sequence[str], ignored: Mapping[str, str] = IGNORED
) -> dict[str, Setting]:
    """The flags of a command line, not yet converted; `--help` and its like stand under `help`."""
    reader = parser(groups, {}, ignored)
    known, unknown = reader.parse_known_args(argv)
    if "help" in known or not unknown:  # help also beside mistakes
        return vars(known)
    flag = unknown[0].split("=")[0]
    if not flag.startswith("-"):
        raise ConfigError(f"{unknown[0]!r} belongs to no flag; allowed is one value a flag, and a list like 10,20")
    every = [f"--{name}" for members in groups.values() for each in members for name in (each.name, *each.aliases)]
    raise ConfigError(f"unknown flag {unknown[0]!r}{nearest(flag, every)}; see --help")


def parser(
    groups: Mapping[str, Sequence[Option]], shown: Mapping[str, Any], ignored: Mapping[str, str] | None,
    usage: str | None = None, about: str | None = None,
) -> _Parser:  # fmt: skip
    """Of the parameters by heading. `shown` are the values in force; without `ignored` each has one name, for help."""
    made = _Parser(
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30),
        allow_abbrev=False, argument_default=argparse.SUPPRESS, add_help=False, usage=usage, description=about,
    )  # fmt: skip
    for title, members in groups.items():
        group = made.add_argument_group(title)
        for option in members:
            names = [f"--{name}" for name in (option.name, *(option.aliases if ignored is not None else ()))]
            how: dict[str, Any] = {"nargs": "?", "const": "true"} if option.hint is bool else {}
            if typing.get_origin(option.hint) is tuple:
                how = {"nargs": "+"}  # a list may also be written with spaces
            text = f"{option.about} [{written(shown.get(option.name, option.default), option.hint)}]"
            kind, text = _kind(option.hint), text.replace("%", "%%")  # argparse reads `%` as a placeholder
            group.add_argument(*names, dest=option.name, action=_Once, metavar=kind, help=text, **how)
    group = made.add_argument_group("help")
    for flags, wanted, text in (
        (["-h", "--help"], "brief", "these flags and their values here"),
        (["--help_all"], "all", "also other names of the flags, and flags of BackdoorBench without effect"),
        (["--print_config"], "config", "print all settings as a YAML file for --yaml_path"),
    ):
        group.add_argument(*flags, dest="help", action="store_const", const=Setting(wanted, flags[-1]), help=text)
    group = made.add_argument_group("accepted for old command lines, without effect")
    seen = {option.name for members in groups.values() for option in members}
    for name, reason in (ignored or {}).items():
        if name not in seen:
            short = [SHORT[name]] if name in SHORT else []
            group.add_argument(f"--{name}", *short, dest=name, action=_Once, nargs="*", metavar="X", help=reason)
    return made


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
    """A YAML file with these parameters and the values in force, `shown`, each below its help text."""
    lines = [f"# {about}"]
    for option in members:
        value = shown.get(option.name, option.default)
        lines += textwrap.wrap(option.about, 118, initial_indent="# ", subsequent_indent="# ")
        plain = list(value) if isinstance(value, tuple) else written(value, option.hint) if value is None else value
        text = yaml.safe_dump([plain], default_flow_style=True, width=math.inf)  # in a list nothing follows the value
        lines.append(f"{option.name}: {text.strip()[1:-1]}")
    return "\n".join(lines)


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4) and a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:  # plain YAML silently takes the last one
            raise yaml.YAMLError(f"{twice[0]} is given twice; give it once")
        return super().construct_mapping(node, deep)


_Yaml.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True)
class YamlFile:
    """The settings of a YAML file, and those of its `recipes:` and `datasets:`, by that word and the case."""

    settings: dict[str, Setting]
    cases: dict[tuple[str, str], dict[str, Setting]] = field(default_factory=dict)

    def overlaid(self, recipe: str, dataset: str) -> dict[str, Setting]:
        """The settings, over them the recipe's, over these the data set's, over these `DATASET.RECIPE`'s."""
        found = dict(self.settings)
        for case in (("recipes", recipe), ("datasets", dataset), ("datasets", f"{dataset}.{recipe}")):
            found.update(self.cases.get(case, {}))
        return found


def read_yaml(path: Path, known: Mapping[str, Option], ignored: Collection[str] = IGNORED) -> YamlFile:
    """Read a YAML file; ConfigError for unknown keys and for cases that do not exist.

    Args:
        path: the file.
        known: the parameters that it may set.
        ignored: keys without effect.
    """
    content = _load(path)
    cases = {kind: _mapping(content.pop(kind, {}), f"{path}: {kind}") for kind in CASES}
    file = YamlFile(_settings(content, path, known, ignored))
    datasets = [*SOURCES, *(f"{dataset}.{recipe}" for dataset in SOURCES for recipe in RECIPES)]
    for kind, allowed in (("recipes", [*RECIPES]), ("datasets", datasets)):
        for case, each in cases[kind].items():
            if case not in allowed:
                raise ConfigError(f"{path}: {kind} has no {case!r}{nearest(case, allowed)}")
            found = _settings(_mapping(each, f"{path}: {kind}: {case}"), path, known, ignored)
            if early := [found[name].origin for name in EARLY if name in found]:
                raise ConfigError(f"{early[0]} cannot depend on the recipe or the data set; set it for all")
            file.cases[kind, case] = found
    return file


def read_flat(path: Path, known: Mapping[str, Option]) -> dict[str, Setting]:
    """The settings of a YAML file without cases; values may be lists and mappings. Refuses unknown keys."""
    return _settings(_load(path), path, known, IGNORED)


def _load(path: Path) -> dict[str, Any]:
    try:
        return _mapping(_Yaml(read(path).decode()).get_single_data() or {}, str(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except ConfigError:
        raise
    except NO_YAML as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{what}: allowed is a mapping of names to values")
    return value


def _settings(
    content: Mapping[str, Any], path: Path, known: Mapping[str, Option], ignored: Collection[str]
) -> dict[str, Setting]:
    canonical = {other: option.name for option in known.values() for other in (option.name, *option.aliases)}
    found: dict[str, Setting] = {}
    for key, value in content.items():
        if SUPERSEDED.get(key) in content or (value is None and key in canonical):
            continue  # a key without a value sets nothing
        name = canonical.get(key, key if key in ignored else None)
        if name is None:
            raise ConfigError(f"{path}: {key}: unknown key{nearest(key, list(canonical))}")
        found[name] = once(found.get(name), Setting(value, f"{path}: {key}"))
    return found


def shipped(kind: str, name: str) -> Path | None:
    """The YAML that comes with the library, `configs/KIND/NAME.yaml`; in a wheel it lies inside the package."""
    here = Path(__file__).resolve().parent
    for root in (here / "configs", here.parent / "configs"):
        if (root / kind / f"{name}.yaml").is_file():
            return root / kind / f"{name}.yaml"
    return None
