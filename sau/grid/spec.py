"""The YAML file of a grid, with the files that it includes: axes to cross, in blocks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sau.attack import ATTACKS
from sau.config import check, nearest, options, param
from sau.data.sources import source
from sau.defense import DEFENSES
from sau.errors import ConfigError, require
from sau.flags import RecipeName, Setting, build, read_flat, values

Overrides = dict[str, dict[str, Any]]
AXES = ("attacks", "defenses", "seeds", "ratios", "clean_shares")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Axes to cross, and what their cells have in common; `dataset` to `recipe` as in attack/NAME.py."""

    dataset: str = "cifar10"
    dataset_path: str = "./data"
    recipe: RecipeName = "cpu"  # auto would depend on the machine; so would it below
    device: Literal["cpu", "cuda"] = "cpu"
    amp: bool = False  # true is bf16, false is fp32
    threads: int = param(1, ge=1)  # CPU threads of a cell, which are part of its result
    memory_gb: float = param(2.0, gt=0)  # GiB that a cell needs
    gpus: float = param(0.0, ge=0)  # that a cell needs; below 1 is a share, so that several cells use one
    attacks: tuple[str, ...] = ()  # `prototype` trains the clean network
    defenses: tuple[str, ...] = ()  # none: the attacks alone
    seeds: tuple[int, ...] = param((0,), ge=0, lt=2**32)  # of attack and defense alike
    ratios: tuple[float, ...] = ()  # poisoning ratios; none: each attack's own
    clean_shares: tuple[float, ...] = ()  # of the clean images that the defender has; none: each defense's own
    overrides: Overrides = field(default_factory=dict)  # settings by method, or for every `attack` and `defense`

    def __post_init__(self) -> None:
        check(self)
        source(self.dataset)
        for axis, known in (("attacks", ATTACKS), ("defenses", DEFENSES)):
            for name in getattr(self, axis):
                if name not in known:
                    raise ConfigError(f"{axis} has {name!r}{nearest(name, list(known))}; known: {', '.join(known)}")
        for axis in AXES:
            values = getattr(self, axis)
            require(axis, values, len(set(values)) == len(values), "each value once")
        require("seeds", self.seeds, len(self.seeds) > 0, "one seed or more")
        require("gpus", self.gpus, self.gpus <= 1 or self.gpus == int(self.gpus), "a share up to 1, or a whole number")
        require("gpus", self.gpus, (self.device == "cuda") == (self.gpus > 0), "above 0 with device cuda, 0 with cpu")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A whole file: its blocks, and what concerns all of them. Paths are relative to the file."""

    include: tuple[str, ...] = ()  # grid files that this one replaces parts of
    blocks: tuple[Block, ...] = ()  # each replaces some of the file's settings; none: one block
    record_root: str = "./record/grid"  # folder of the cells, relative to where the command runs
    published: tuple[str, ...] = ()  # files of results (.jsonl); a cell with a result in one counts as finished
    retries: int = param(1, ge=0)  # tries after a crash or a timeout; a mistake of the user is not tried again
    cell_timeout: float | None = param(None, gt=0)  # seconds that one try may take

    def __post_init__(self) -> None:
        check(self)


_BLOCK = options(Block)
_GRID = {**options(Grid), **_BLOCK}
_NESTED = ("blocks", "overrides")


def read(path: Path) -> Grid:
    """The grid of a file; ConfigError names the file and the key, and says what is allowed."""
    settings = _settings(Path(os.path.realpath(path)), ())
    parts = settings["blocks"].value if "blocks" in settings else [{}]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{path}: blocks; allowed is a list of mappings")
    try:
        blocks = tuple(_block(settings, part, f"blocks[{number}]") for number, part in enumerate(parts))
        grid: Grid = build(Grid, {**_values(settings), "blocks": blocks})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not any(block.attacks for block in blocks):
        raise ConfigError(f"{path}: attacks names none; name some of {', '.join(ATTACKS)}")
    return grid


def _settings(path: Path, chain: tuple[Path, ...]) -> dict[str, Setting]:
    """The settings of a file over those of the files that it includes."""
    if path in chain:
        raise ConfigError(f"{path}: include goes in a circle; break it")
    own, included = read_flat(path, _GRID), dict[str, Setting]()
    for other in _names(own.pop("include", None)):
        included = _merged(included, _settings(Path(os.path.realpath(path.parent / other)), (*chain, path)))
    if "published" in own:
        places = [os.path.realpath(path.parent / place) for place in _names(own["published"])]
        own["published"] = Setting(places, own["published"].origin)
    return _merged(included, own)


def _names(setting: Setting | None) -> list[str]:
    """One name, a list of names, or none."""
    value = None if setting is None else setting.value
    return [] if value is None else [*map(str, value)] if isinstance(value, list) else [str(value)]


def _merged(under: Mapping[str, Setting], over: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings that replace others; overrides are merged method by method."""
    found = {**under, **over}
    if "overrides" in over:
        methods = _overrides(under["overrides"]) if "overrides" in under else {}
        merged = {name: {**methods.get(name, {}), **keys} for name, keys in _overrides(over["overrides"]).items()}
        found["overrides"] = Setting({**methods, **merged}, over["overrides"].origin)
    return found


def _overrides(setting: Setting) -> Overrides:
    value = setting.value or {}
    if not isinstance(value, dict) or not all(isinstance(keys, dict) for keys in value.values()):
        raise ConfigError(f"{setting.origin}; allowed is a mapping of methods to mappings of their settings")
    names = ["attack", "defense", *ATTACKS, *DEFENSES]
    for name in value:
        if name not in names:
            raise ConfigError(f"{setting.origin} has {name!r}{nearest(str(name), names)}")
    return value


def _block(common: Mapping[str, Setting], own: Mapping[str, Any], origin: str) -> Block:
    for name in own:
        if name not in _BLOCK:
            raise ConfigError(f"{origin} has {name!r}{nearest(str(name), list(_BLOCK))}")
    settings = {name: setting for name, setting in common.items() if name in _BLOCK}
    settings = _merged(settings, {name: Setting(value, f"{origin}.{name}") for name, value in own.items()})
    overrides = settings["overrides"].value if "overrides" in settings else {}
    block: Block = build(Block, {**_values(settings), "overrides": overrides})
    return block


def _values(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting by the type of its field."""
    return values({name: value for name, value in settings.items() if name not in _NESTED}, _GRID)
