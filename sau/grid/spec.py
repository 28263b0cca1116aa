"""What a grid is asked: its YAML file, with the files it includes, as blocks whose axes are crossed."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sau.attack import ATTACKS
from sau.config import options
from sau.data.sources import source
from sau.defense import DEFENSES
from sau.errors import ConfigError
from sau.settings import config
from sau.settings.config import Setting, nearest
from sau.settings.run import RecipeName
from sau.settings.yamlfile import read_flat

Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Block:
    """Axes that are crossed, and what their cells have in common.

    Args:
        dataset: as in attack/NAME.py.
        dataset_path: as in attack/NAME.py.
        recipe: as in attack/NAME.py, fast on cuda only; auto would depend on the machine.
        device: cpu or cuda.
        amp: true is bf16, false is fp32; auto would depend on the machine.
        threads: CPU threads of a cell, which are part of its result; 1 and more.
        memory_gb: GiB that a cell needs.
        gpus: GPUs that a cell needs; below 1 is a share, so that several cells use one.
        attacks: names; `prototype` trains the clean network.
        defenses: names; none means the attacks alone.
        seeds: of attack and defense alike.
        ratios: poisoning ratios; none means each attack's own.
        clean_shares: shares of the clean pictures that the defender has; none means each defense's own.
        overrides: settings by method, those under `attack` and `defense` for all of them.
    """

    dataset: str = "cifar10"
    dataset_path: str = "./data"
    recipe: RecipeName = "cpu"
    device: Literal["cpu", "cuda"] = "cpu"
    amp: bool = False
    threads: int = 1
    memory_gb: float = 2.0
    gpus: float = 0.0
    attacks: tuple[str, ...] = ()
    defenses: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    ratios: tuple[float, ...] = ()
    clean_shares: tuple[float, ...] = ()
    overrides: Overrides = field(default_factory=dict)

    def __post_init__(self) -> None:
        source(self.dataset)
        for axis, known in (("attacks", ATTACKS), ("defenses", DEFENSES)):
            for name in getattr(self, axis):
                if name not in known:
                    raise ConfigError(f"{axis} has {name!r}{nearest(name, list(known))}; known: {', '.join(known)}")
        for axis in ("attacks", "defenses", "seeds", "ratios", "clean_shares"):
            twice = [value for value in getattr(self, axis) if getattr(self, axis).count(value) > 1]
            if twice:
                raise ConfigError(f"{axis} has {twice[0]} twice; give it once")
        least = {"threads": 1, "memory_gb": 0, "gpus": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}, allowed is {bound} and more")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ConfigError(f"gpus is {self.gpus:g}, allowed is a share up to 1 or a whole number")

    def agree(self) -> None:
        """ConfigError for settings that are not meant together; the top of a file may leave some to its blocks."""
        if not self.seeds:
            raise ConfigError("seeds names none, allowed is at least one")
        if (self.device == "cuda") != (self.gpus > 0):
            raise ConfigError(f"device is {self.device}, but gpus is {self.gpus:g}; cuda needs some, cpu needs none")


@dataclass(frozen=True, kw_only=True)
class Grid(Block):
    """A grid's file: what a block says, for all of its blocks, and what concerns the grid as a whole.

    Args:
        include: grid files that this one is laid over, relative to it.
        blocks: what differs between parts of the grid; none means one block.
        record_root: folder of the cells.
        published: files of summaries, relative to the file; a cell with a summary in one counts as finished.
        retries: how often a cell is tried again after a crash or a timeout; a mistake of the user is not tried again.
        cell_timeout: seconds that one try may take; none means no limit.
    """

    include: tuple[str, ...] = ()
    blocks: tuple[Any, ...] = ()
    record_root: str = "./record/grid"
    published: tuple[str, ...] = ()
    retries: int = 1
    cell_timeout: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.retries < 0:
            raise ConfigError(f"retries is {self.retries}, allowed is 0 and more")
        if self.cell_timeout is not None and not 0 < self.cell_timeout < math.inf:
            raise ConfigError(f"cell_timeout is {self.cell_timeout:g}, allowed is above 0, and none")


_GRID, _BLOCK = options(Grid), options(Block)
_PLAIN = ("overrides", "blocks")  # mappings, which have no type of a flag


def read(path: Path) -> tuple[Grid, list[Block]]:
    """The grid of a file and its blocks; ConfigError names the file, the line and what is allowed."""
    settings, own = _read(Path(os.path.realpath(path)), ())
    values = _values(settings)
    inner = values.pop("blocks", None) or [{}]
    if not isinstance(inner, list) or not all(isinstance(block, dict) for block in inner):
        raise ConfigError(f"{path}: blocks; allowed is a list of mappings")
    try:
        grid = config.build(Grid, values)
        blocks = [_block(settings, block, f"{path}: blocks[{number}]") for number, block in enumerate(inner)]
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not any(block.attacks for block in blocks):
        raise ConfigError(f"{path}: attacks names none; name some of {', '.join(ATTACKS)}")
    for name in _checked(own["overrides"]) if "overrides" in own else ():  # not those of files that it includes
        if not any(_runs(block, name) for block in blocks):
            raise ConfigError(f"{path}: overrides has {name}, which no block runs; leave it out")
    return grid, blocks


def _runs(block: Block, name: str) -> bool:
    return name in ("attack", *block.attacks, *block.defenses) or (name == "defense" and bool(block.defenses))


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[dict[str, Setting], dict[str, Setting]]:
    """The settings of a file laid over those that it includes, and its own alone."""
    if path in chain:
        way = " -> ".join(file.name for file in (*chain[chain.index(path) :], path))
        raise ConfigError(f"{path}: include goes in a circle ({way}); break it")
    own = read_flat(path, _GRID)
    found: dict[str, Setting] = {}
    for other in _several(own.pop("include", Setting(None, "")).value):
        found = _laid(found, _read(Path(os.path.realpath(path.parent / str(other))), (*chain, path))[0])
    _refuse_hidden(found, own)
    if "published" in own:
        places = [os.path.realpath(path.parent / str(place)) for place in _several(own["published"].value)]
        own["published"] = Setting(places, own["published"].origin)
    return _laid(found, own), own


def _refuse_hidden(included: Mapping[str, Setting], own: Mapping[str, Setting]) -> None:
    """Refuse, by a ConfigError, what has no effect since every block that is included says it itself."""
    blocks = included["blocks"].value if "blocks" in included and "blocks" not in own else None
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return  # there are none, or `read` says what is wrong with them
    for name in own:
        if name in _BLOCK and name != "overrides" and blocks and all(name in block for block in blocks):
            what = f"every block of the included file has {name} of its own, so this has no effect"
            raise ConfigError(f"{own[name].origin}: {what}; say it in blocks of this file")


def _several(value: Any) -> list[Any]:
    """One name, a list of names or none."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _laid(under: Mapping[str, Setting], over: Mapping[str, Setting]) -> dict[str, Setting]:
    """Settings over settings; overrides are joined method by method."""
    joined = {**under, **over}
    if "overrides" in under and "overrides" in over:
        merged = {name: dict(keys) for name, keys in _checked(under["overrides"]).items()}
        for name, keys in _checked(over["overrides"]).items():
            merged[name] = {**merged.get(name, {}), **keys}
        joined["overrides"] = Setting(merged, over["overrides"].origin)
    return joined


def _checked(setting: Setting) -> Overrides:
    value = setting.value if setting.value is not None else {}
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
    said = {name: Setting(value, f"{origin}.{name}") for name, value in own.items()}
    laid = _laid({name: setting for name, setting in common.items() if name in _BLOCK}, said)
    block: Block = config.build(Block, _values(laid))
    block.agree()
    for name in block.overrides:
        if not _runs(block, name) and name in (own.get("overrides") or {}):
            raise ConfigError(f"{origin}: overrides has {name}, which this block does not run; leave it out")
    return block


def _values(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Every setting by the type of its field."""
    found = config.values({name: said for name, said in settings.items() if name not in _PLAIN}, _GRID)
    for name in _PLAIN:
        if name in settings:
            found[name] = _checked(settings[name]) if name == "overrides" else settings[name].value
    return found
