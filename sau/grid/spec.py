"""The YAML file of a grid: axes to cross, in blocks, over those of the file that it includes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sau.attack import ATTACKS
from sau.config import check, nearest, options, param
from sau.data.sources import source
from sau.defense import DEFENSES
from sau.errors import ConfigError, require
from sau.run import RecipeName
from sau.yaml_file import Setting, build, read_flat, values

Overrides = dict[str, dict[str, Any]]
AXES = ("attacks", "defenses", "seeds", "ratios", "clean_shares")


@dataclass(frozen=True, kw_only=True)
class Block:
    """Axes to cross, and what their cells have in common; `dataset` to `recipe` as in attack/NAME.py."""

    dataset: str = param("cifar10", "the data set")
    dataset_path: str = param("./data", "folder of the data sets")
    recipe: RecipeName = param("cpu", "shipped settings to start from")  # auto would depend on the machine
    device: Literal["cpu", "cuda"] = param("cpu", "where every cell computes")
    amp: bool = param(False, "true is bf16, false is fp32")
    threads: int = param(1, "CPU threads of a cell, which are part of its result", ge=1)
    memory_gb: float = param(2.0, "GiB that a cell needs", gt=0)
    gpus: float = param(
        0.0, "GPUs that a cell needs; below 1 is a share, so that several cells use one; above 1 whole numbers", ge=0
    )
    attacks: tuple[str, ...] = param((), "names of attacks; prototype trains the clean network")
    defenses: tuple[str, ...] = param((), "names of defenses; none means the attacks alone")
    seeds: tuple[int, ...] = param((0,), "random seeds, of attack and defense alike", ge=0, lt=2**32)
    ratios: tuple[float, ...] = param((), "poisoning ratios; none means each attack's own")
    clean_shares: tuple[float, ...] = param(
        (), "shares of the clean training set that the defender has; none means each defense's own"
    )
    overrides: Overrides = field(
        default_factory=dict, metadata={"help": "settings by method, or for every `attack` and `defense`"}
    )

    def __post_init__(self) -> None:
        check(self)
        source(self.dataset)
        for axis, known in (("attacks", ATTACKS), ("defenses", DEFENSES)):
            for name in getattr(self, axis):
                require(axis, name, name in known, f"one of {', '.join(known)}")
        for axis in AXES:
            values = getattr(self, axis)
            require(axis, values, len(set(values)) == len(values), "each value once")
        require("seeds", self.seeds, len(self.seeds) > 0, "one seed or more")
        require("gpus", self.gpus, self.gpus <= 1 or self.gpus == int(self.gpus), "a share up to 1, or a whole number")
        require("gpus", self.gpus, (self.device == "cuda") == (self.gpus > 0), "above 0 with device cuda, 0 with cpu")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A whole file: its blocks, and what concerns all of them."""

    include: str | None = param(None, "grid file that this one replaces parts of, relative to this one")
    blocks: tuple[Block, ...] = param((), "each replaces some of the file's settings; none means one block")
    record_root: str = param("./record/grid", "folder of the cells, relative to where the command runs")
    published: tuple[str, ...] = param(
        (), "files of results (.jsonl), relative to this one, whose cells count as finished"
    )
    retries: int = param(1, "tries after a crash or a timeout; a mistake of the user is not tried again", ge=0)
    cell_timeout: float | None = param(None, "seconds that one try may take", gt=0)

    def __post_init__(self) -> None:
        check(self)


_BLOCK = options(Block)
_GRID = {**options(Grid), **_BLOCK}


def read(path: Path) -> Grid:
    """The grid of a file; ConfigError names the file and the key, and says what is allowed."""
    settings = _settings(path)
    if (include := settings.pop("include", None)) is not None:
        under = _settings(path.parent / str(include.value))
        if "include" in under:
            raise ConfigError(f"{under['include'].origin}: an included file cannot include another one")
        settings = _merged(under, settings)
    parts = settings.pop("blocks", Setting([{}], "")).value
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ConfigError(f"{path}: blocks; allowed is a list of mappings")
    common = {name: setting for name, setting in settings.items() if name in _BLOCK}
    try:
        blocks = tuple(_block(common, part, f"blocks[{number}]") for number, part in enumerate(parts))
        own = {name: setting for name, setting in settings.items() if name not in _BLOCK}
        grid: Grid = build(Grid, {**values(own, _GRID), "blocks": blocks})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not any(block.attacks for block in blocks):
        raise ConfigError(f"{path}: attacks names none; name some of {', '.join(ATTACKS)}")
    return grid


def _settings(path: Path) -> dict[str, Setting]:
    """The settings of one file, with the paths of published results as seen from here."""
    found = read_flat(path, _GRID)
    if (published := found.get("published")) is not None:
        names = published.value if isinstance(published.value, list) else [published.value]
        places = [str((path.parent / str(name)).resolve()) for name in names]
        found["published"] = Setting(places, published.origin)
    return found


def _block(common: Mapping[str, Setting], part: Mapping[str, Any], origin: str) -> Block:
    for name in part:
        if name not in _BLOCK:
            raise ConfigError(f"{origin} has {name!r}{nearest(str(name), list(_BLOCK))}")
    settings = _merged(common, {name: Setting(value, f"{origin}.{name}") for name, value in part.items()})
    overrides = settings.pop("overrides", Setting({}, "")).value
    block: Block = build(Block, {**values(settings, _BLOCK), "overrides": overrides})
    return block


def _merged(under: Mapping[str, Setting], over: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings that replace others; overrides are merged method by method."""
    found = {**under, **over}
    if "overrides" in found:
        both: Overrides = {}
        for setting in (one["overrides"] for one in (under, over) if "overrides" in one):
            for name, keys in _overrides(setting).items():
                both[name] = {**both.get(name, {}), **keys}
        found["overrides"] = Setting(both, found["overrides"].origin)
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
