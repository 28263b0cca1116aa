"""Settings from YAML files: safe, with the line of every mistake, and with cases for recipes and data sets."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from sau.config import Option
from sau.data.sources import SOURCES
from sau.errors import NO_YAML, ConfigError
from sau.files import read
from sau.settings.config import IGNORED, REMOVED, Setting, nearest, once
from sau.settings.run import RecipeName

OVERLAYS = ("recipes", "datasets")  # keys that hold settings for one recipe or one data set
# BackdoorBench's files of SAU, i-BAU (epochs) and NAD (weight_decay) hold both, and its code reads the second.
SUPERSEDED = {"epochs": "n_rounds", "weight_decay": "wd"}
EMPTY = "tag:yaml.org,2002:null"  # a key without a value sets nothing
RECIPES = get_args(RecipeName)


class _Yaml(yaml.SafeLoader):
    """Safe YAML in which 1e-4 is a number (YAML 1.1 wants 1.0e-4)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that is given twice, which plain YAML would silently take from its last place."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"{twice[0]} is given twice; give it once")
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Refuses NUL, which YAML can write and no name of a file may have."""
        if "\0" in node.value:
            raise yaml.YAMLError("it has the character NUL; leave it out")
        return super().construct_scalar(node)


_Yaml.yaml_implicit_resolvers = {key: list(rules) for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(
    path: Path, known: Mapping[str, Option], *, recipe: str | None, dataset: str | None,
    ignored: Collection[str] = IGNORED,
) -> dict[str, Setting]:  # fmt: skip
    """The settings of a YAML file, those under `recipes:` and `datasets:` laid over the rest; refuses unknown keys.

    A case under `datasets:` is the name of a data set, or name.recipe where it holds for that recipe alone.
    Keys in `ignored` have no effect.
    """
    plain = _nodes(path)
    found = _settings({key: node for key, node in plain.items() if key not in OVERLAYS}, path, known, ignored)
    for overlay, chosen in zip(OVERLAYS, (recipe, dataset), strict=True):
        cases = _mapping(plain[overlay], path) if overlay in plain else {}
        allowed = (
            RECIPES
            if overlay == "recipes"
            else [d + r for d in SOURCES for r in ("", *(f".{name}" for name in RECIPES))]
        )
        for case, node in cases.items():
            if case not in allowed:
                line = next(key.start_mark.line + 1 for key, _ in plain[overlay].value if key.value == case)
                raise ConfigError(f"{path}:{line}: {overlay} has no {case!r}{nearest(case, allowed)}")
            inner = _settings(_mapping(node, path), path, known, ignored)
            found.update(inner if case in (chosen, f"{chosen}.{recipe}") else {})
    return found


def read_flat(path: Path, known: Mapping[str, Option]) -> dict[str, Setting]:
    """The settings of a YAML file that knows no cases; values may be lists and mappings. Refuses unknown keys."""
    return _settings(_nodes(path), path, known, IGNORED)


def _nodes(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.compose(read(path).decode(), Loader=_Yaml)  # no pipe, which could be read once alone
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; name a YAML file") from None
    except NO_YAML as error:
        raise ConfigError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    return _mapping(tree, path) if tree is not None else {}


def _mapping(node: Any, path: Path) -> dict[str, Any]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path}:{node.start_mark.line + 1}: allowed is a mapping of names to values")
    found: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: a key is no plain name")
        if key.value in found:
            raise ConfigError(f"{path}:{key.start_mark.line + 1}: {key.value} is given twice; give it once")
        found[key.value] = value
    return found


def _settings(
    nodes: Mapping[str, Any], path: Path, known: Mapping[str, Option], ignored: Collection[str]
) -> dict[str, Setting]:
    canonical = {other: option.name for option in known.values() for other in (option.name, *option.aliases)}
    found: dict[str, Setting] = {}
    for key, node in nodes.items():
        if SUPERSEDED.get(key) in nodes or (node.tag == EMPTY and key in canonical):
            continue
        origin = f"{path}:{node.start_mark.line + 1}: {key}"
        name = canonical.get(key, key if key in ignored else None)
        if key in REMOVED and name is None:
            raise ConfigError(f"{origin} is gone: {REMOVED[key]}")
        if name is None:
            raise ConfigError(f"{origin}: unknown key{nearest(key, list(canonical))}")
        try:
            # Tags that would build objects are refused by the safe loader; a bad value of a known tag raises anything.
            value = _Yaml("").construct_object(node, deep=True)
        except NO_YAML as error:
            raise ConfigError(f"{origin}: {' '.join(str(error).split())}") from None
        found[name] = once(found.get(name), Setting(value, origin))
    return found


def shipped(kind: str, name: str) -> Path | None:
    """The YAML that comes with the library, `configs/KIND/NAME.yaml`; in a wheel it lies inside the package."""
    here = Path(__file__).resolve().parents[1]
    for root in (here / "configs", here.parent / "configs"):
        if (root / kind / f"{name}.yaml").is_file():
            return root / kind / f"{name}.yaml"
    return None
