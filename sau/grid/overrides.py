"""What a grid's file says to single methods: settings by the names of their flags, and what may not be said there."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from sau.attack import ATTACKS
from sau.command.request import Request
from sau.config import Method, nearest
from sau.defense import DEFENSES
from sau.errors import ConfigError
from sau.grid.spec import Overrides
from sau.optim import Training
from sau.settings.run import AttackRun, DefenseRun

METHODS: Mapping[str, Mapping[str, type[Method]]] = {"attack": ATTACKS, "defense": DEFENSES}

# What the grid says itself, and where.
_OWN = {
    "dataset": "dataset", "dataset_path": "dataset_path", "recipe": "recipe", "device": "device", "amp": "amp",
    "threads": "threads", "random_seed": "seeds", "record_root": "record_root", "result_file": "attacks",
}  # fmt: skip
_NEVER = ("save_folder_name", "overwrite", "yaml_path", "bd_yaml_path", "attack", "max_minutes", "compile")
_AXES = {"pratio": "ratios", "ratio": "clean_shares"}


def refuse_unknown(overrides: Overrides) -> None:
    """Refuse, by a ConfigError, a setting that its method, or every one of its kind, has not: also of methods that no
    cell is of, as included files have such."""
    for group, settings in overrides.items():
        known = _known(group)
        for key in settings:
            if key not in known:
                who = f"no {group} has" if group in METHODS else f"{group} has no"
                raise ConfigError(f"overrides.{group}.{key}: {who} such setting{nearest(str(key), sorted(known))}")


@cache
def _known(group: str) -> frozenset[str]:
    """The names of settings that may stand under a method's name, or under `attack` or `defense`."""
    kinds = [group] if group in METHODS else [kind for kind in METHODS if group in METHODS[kind]]
    names = [(kind, name) for kind in kinds for name in METHODS[kind] if group in (kind, name)]
    return frozenset(key for kind, name in names for key in canonical(kind, name))


def overridden(overrides: Overrides, kind: str, name: str, group: str, axis: str) -> dict[str, Any]:
    """What stands under `group` for a method, by its parameters' own names.

    Args:
        overrides: what the file says, without unknown settings.
        kind: attack or defense.
        name: the method.
        group: its name, or its kind.
        axis: the parameter that an axis of the grid sets; empty where none does.
    """
    known, found = canonical(kind, name), dict[str, Any]()
    for key, value in overrides.get(group, {}).items():
        origin = f"overrides.{group}.{key}"
        if key not in known:
            continue  # a setting for all of them, which this one does not have
        if known[key] in _OWN:
            raise ConfigError(f"{origin}: the grid itself says {_OWN[known[key]]}; say it there")
        if known[key] in _NEVER:
            raise ConfigError(f"{origin}: the grid chooses this itself; leave it out")
        if known[key] == axis:
            raise ConfigError(f"{origin} contradicts {_AXES[axis]}, which says the same; keep one of them")
        if known[key] in found:
            raise ConfigError(f"{origin}: {known[key]} is given twice, under two of its names; give it once")
        found[known[key]] = value
    return found


def request(kind: str, name: str, flags: Sequence[str]) -> Request:
    """A method's command line on its way to objects."""
    method, asked = METHODS[kind][name], (AttackRun, Training) if kind == "attack" else (DefenseRun,)
    return Request(f"{kind}/{name}.py", method, (*asked, method), flags)


@cache
def canonical(kind: str, name: str) -> dict[str, str]:
    """Every name of a method's settings, to the parameter behind it."""
    options = request(kind, name, ()).known.values()
    return {other: option.name for option in options for other in (option.name, *option.aliases)}


def text(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
