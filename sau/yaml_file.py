"""YAML files of settings: the user's, BackdoorBench's, and the shipped ones with cases for recipes and data sets."""

import math
import reprlib
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from sau.config import Option, nearest, options
from sau.data.sources import SOURCES
from sau.errors import NO_YAML, ConfigError
from sau.files import read
from sau.run import RECIPES

SHORT = {"num_workers": "-n", "pin_memory": "-pm", "non_blocking": "-nb", "prefetch": "-pf"}  # flags of BackdoorBench
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
# Needed before the recipe and the data set are known, so that they cannot depend on these.
EARLY = ("dataset", "recipe", "device", "record_root", "result_file", "model_file")
# BackdoorBench's files of SAU, i-BAU (epochs) and NAD (weight_decay) hold both, and its code reads the second.
SUPERSEDED = {"epochs": "n_rounds", "weight_decay": "wd"}
_BRIEF = reprlib.Repr()  # prints a value from a file in a few words, however long it is
_BRIEF.maxlevel, _BRIEF.maxstring = 1, 100


class Setting(NamedTuple):
    """A value and where it was given, for error messages."""

    value: Any
    origin: str


Layers = dict[str, dict[str, Setting]]  # of a YAML file by case: "" is every one, then recipes and data sets


def values(settings: Mapping[str, Setting], known: Mapping[str, Option]) -> dict[str, Any]:
    """Every setting as the type of its parameter; ConfigError names where a wrong one was given."""
    found = {}
    for name, (value, origin) in settings.items():
        if name in known:
            try:
                found[name] = known[name].parse(value)
            except ConfigError as error:
                raise ConfigError(f"{origin} is {_BRIEF.repr(value)}; {error}") from None
    return found


def build(cls: type, found: Mapping[str, Any]) -> Any:
    """The object that the values describe."""
    return cls(**{name: found[name] for name in options(cls) if name in found})


def once(earlier: Setting | None, given: Setting) -> Setting:
    """The setting, unless another value was given before under this name or another one of the parameter."""
    if earlier is not None and earlier.value != given.value:
        both = f"{earlier.origin} is {_BRIEF.repr(earlier.value)} and {given.origin} is {_BRIEF.repr(given.value)}"
        raise ConfigError(f"{both}, for one setting; give one of them")
    return given


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which a key may stand once."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:  # plain YAML silently takes the last one
            raise yaml.YAMLError(f"{twice[0]} is given twice; give it once")
        return super().construct_mapping(node, deep)


def read_flat(path: Path, known: Mapping[str, Option], ignored: Collection[str] = IGNORED) -> dict[str, Setting]:
    """The settings of a YAML file without cases; values may be lists and mappings. Refuses unknown keys."""
    return _settings(_load(path), path, known, ignored)


def read_yaml(path: Path, known: Mapping[str, Option], ignored: Collection[str] = IGNORED) -> Layers:
    """The settings of a YAML file that may set `known`, those below `recipes:` and `datasets:` by case; `ignored` are
    keys without effect. ConfigError for unknown keys and for cases that do not exist."""
    content, found = _load(path), Layers()
    datasets = [*SOURCES, *(f"{dataset}.{recipe}" for dataset in SOURCES for recipe in RECIPES)]
    for kind, allowed in (("recipes", [*RECIPES]), ("datasets", datasets)):
        for case, each in _mapping(content.pop(kind, {}), f"{path}: {kind}").items():
            if case not in allowed:
                raise ConfigError(f"{path}: {kind} has no {case!r}{nearest(case, allowed)}")
            found[case] = _settings(_mapping(each, f"{path}: {kind}: {case}"), path, known, ignored)
            if early := [found[case][name].origin for name in EARLY if name in found[case]]:
                raise ConfigError(f"{early[0]} cannot depend on the recipe or the data set; set it for all")
    return {"": _settings(content, path, known, ignored), **found}


def overlaid(file: Layers, recipe: str, dataset: str) -> dict[str, Setting]:
    """The settings of a file, over them the recipe's, over these the data set's, over these `DATASET.RECIPE`'s."""
    cases = ("", recipe, dataset, f"{dataset}.{recipe}")
    return {name: setting for case in cases for name, setting in file.get(case, {}).items()}


def shipped(kind: str, name: str, known: Mapping[str, Option]) -> Layers:
    """The YAML that comes with the library, `configs/KIND/NAME.yaml`; in a wheel it lies inside the package."""
    here = Path(__file__).resolve().parent
    for root in (here / "configs", here.parent / "configs"):
        if (path := root / kind / f"{name}.yaml").is_file():
            return read_yaml(path, known)
    return {}


def _load(path: Path) -> dict[str, Any]:
    try:
        content = _Yaml(read(path).decode()).get_single_data() or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except NO_YAML as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return _mapping(content, str(path))


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


def written(value: Any, hint: Any = None) -> str:
    """A value as a flag takes it."""
    if value is None:
        return "auto" if hint == bool | None else "none"
    if isinstance(value, tuple):
        return ",".join(map(written, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


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
