"""The YAML file of a grid (axes to cross, in blocks, over those of the file that it includes), and its cells: each has
the digest of what determines its result, and a folder of its own.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

from sau.attack import ATTACKS
from sau.config import Option, Setting, load_yaml, mapping, nearest, options, param, settings_of, values, written
from sau.data.sources import DATA_FOLDER, source
from sau.defense import DEFENSES
from sau.errors import ConfigError, SauError, require
from sau.files import checksum
from sau.grid.engines import Cell
from sau.optim import Training
from sau.record.folder import digest
from sau.run import AttackRun, DefenseRun, RecipeName
from sau.settings import METHODS, Settings

Overrides = dict[str, Any]  # by `METHOD.NAME`
Part = dict[str, Setting]  # of a file or a block
# The grid sets these for all cells, by keys of its own or by itself.
_RESERVED = {
    "dataset", "dataset_path", "recipe", "device", "amp", "threads", "random_seed", "record_root", "result_file",
    "save_folder_name", "overwrite", "yaml_path", "bd_yaml_path", "attack", "max_minutes", "compile",
}  # fmt: skip
_FACTS = ("model", "width", "img_size", "ratio", "index")  # of a run: they determine a result
_MEASURED = ("trigger_radius", "track_risk")  # they add to what a summary holds, as risk_* do where risks are tracked


@dataclass(frozen=True, kw_only=True)
class Block:
    """Axes to cross, and what their cells have in common; `dataset` to `recipe` as in attack/NAME.py."""

    dataset: str = param("cifar10", "the data set")
    dataset_path: str = param(DATA_FOLDER, "folder of the data sets")
    recipe: RecipeName = param("cpu", "shipped settings to start from")  # auto would depend on the machine
    device: Literal["cpu", "cuda"] = param("cpu", "device of every cell")
    amp: bool = param(False, "true is bf16, false is fp32")
    threads: int = param(1, "CPU threads of a cell, which are part of its result", ge=1)
    gpus: float = param(1.0, "share of a GPU that a cell takes", gt=0, le=1)
    attacks: tuple[str, ...] = param((), "names of attacks; prototype trains the clean network")
    defenses: tuple[str, ...] = param((), "names of defenses; none means the attacks alone")
    seeds: tuple[int, ...] = param((0,), "random seeds, of attack and defense alike", ge=0, lt=2**32)
    ratios: tuple[float, ...] = param((), "poisoning ratios; none means each attack's own")
    clean_shares: tuple[float, ...] = param((), "shares of the clean images; none means each defense's own")
    overrides: Overrides = field(default_factory=dict, metadata={"help": "settings by method, `attack` or `defense`"})

    def __post_init__(self) -> None:
        source(self.dataset)
        for axis, known in (("attacks", ATTACKS), ("defenses", DEFENSES)):
            for name in getattr(self, axis):
                require(axis, name, name in known, f"one of {', '.join(known)}")
        require("seeds", self.seeds, len(self.seeds) > 0, "one seed or more")
        axes = {"pratio": self.ratios, "ratio": self.clean_shares, "index": self.clean_shares}
        for name, value in self.overrides.items():
            ours = (own := name.rpartition(".")[2]) in _RESERVED or axes.get(own)
            require(f"overrides.{name}", value, not ours, "what no key of the grid itself sets")


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A whole file: its blocks, and what concerns all of them."""

    include: str | None = param(None, "grid file that this one starts from, relative to this one")
    blocks: tuple[Block, ...] = param((), "each replaces some of the file's settings; none means one block")
    record_root: str = param("./record/grid", "folder of the cells, relative to where the command runs")
    published: tuple[str, ...] = param((), "files (.jsonl) of finished cells, relative to this one")
    retries: int = param(1, "tries after a crash or a timeout; a mistake of the user is not tried again", ge=0)
    cell_timeout: float | None = param(None, "seconds that one try may take", gt=0)
    memory_gb: float = param(2.0, "GiB that a cell needs", gt=0)


BLOCK = options(Block)
GRID = options(Grid)


def read(path: Path) -> Grid:
    """The grid of a file; ConfigError names the file and the key, and says what is allowed."""
    settings = _file(path, {**BLOCK, **GRID})
    if (include := settings.pop("include", None)) is not None:  # which cannot include another one
        known = {name: option for name, option in {**BLOCK, **GRID}.items() if name != "include"}
        settings = {**_file(path.parent / str(include.value), known), **settings}
    parts = settings.pop("blocks", Setting([{}], "")).value
    if not isinstance(parts, list):
        raise ConfigError(f"{path}: blocks: allowed is a list of mappings")
    every = [_part(part, f"{path}: blocks[{number}]", BLOCK) for number, part in enumerate(parts)]
    try:
        blocks = tuple(_block({**settings, **part}) for part in every)
        require("attacks", "none", any(block.attacks for block in blocks), f"some of {', '.join(ATTACKS)}")
        return Grid(**values(settings, GRID), blocks=blocks)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _file(path: Path, known: Mapping[str, Option]) -> Part:
    """The settings of one file, with the paths of published results as seen from here."""
    found = _part(load_yaml(path), str(path), known)
    if (published := found.get("published")) is not None:
        names = published.value if isinstance(published.value, list) else [published.value]
        places = [str((path.parent / str(name)).resolve()) for name in names]
        found["published"] = Setting(places, published.origin)
    return found


def _part(content: Any, origin: str, known: Mapping[str, Option]) -> Part:
    """The settings of a file or a block, overrides one by one as `METHOD.NAME`, so that each replaces its like
    alone. ConfigError for unknown keys and methods."""
    found = settings_of(content, origin, known)
    overrides = found.pop("overrides", Setting({}, f"{origin}: overrides"))
    for group, settings in mapping(overrides.value, overrides.origin).items():
        where = f"{overrides.origin}: {group}"
        methods = [(kind, name) for kind in METHODS for name in METHODS[kind] if group in (kind, name)]
        if not methods:
            raise ConfigError(f"{where}: unknown method{nearest(group, [*METHODS, *ATTACKS, *DEFENSES])}")
        allowed = {name: option for each in methods for name, option in _request(*each).known.items()}
        own = settings_of(settings, where, allowed)
        found |= {f"{group}.{name}": setting for name, setting in own.items()}
    return found


def _block(settings: Part) -> Block:
    overrides = {name: each.value for name, each in settings.items() if "." in name}
    return Block(**values(settings, BLOCK), overrides=overrides)


def cells(blocks: Sequence[Block]) -> list[Cell]:
    """Every cell once, attacks before their defenses; ConfigError if a block cannot be."""
    return list({cell.digest: cell for block in blocks for cell in _crossed(block)}.values())


def select(every: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose label or method fits a pattern (`*` and `?` as in a shell), and the attacks that they need."""
    chosen = set[str | None]()
    for pattern in patterns:
        fitting = [cell for cell in every if pattern == cell.name or fnmatch.fnmatch(cell.label, pattern)]
        if not fitting:
            raise ConfigError(f"--only {pattern!r} fits no cell; labels are like {every[-1].label}")
        chosen |= {cell.digest for cell in fitting} | {cell.attack for cell in fitting}
    return [cell for cell in every if cell.digest in chosen]


def _crossed(block: Block) -> Iterator[Cell]:
    """Seed by seed, attack by attack, each followed by its defenses."""
    settle = cache(partial(_settle, block))
    for seed, name in product(block.seeds, block.attacks):
        for ratio in (block.ratios or (None,)) if "pratio" in _request("attack", name).known else (None,):
            attack = _cell(block, "attack", name, settle("attack", name, ratio), seed)
            yield attack
            for defense in block.defenses:
                shares = block.clean_shares or (None,)
                for share in shares if DEFENSES[defense].data_use != "none" else shares[:1]:
                    yield _cell(block, "defense", defense, settle("defense", defense, share), seed, attack)


def _cell(
    block: Block, kind: str, name: str, settled: tuple[str, str, Sequence[str]], seed: int, attack: Cell | None = None
) -> Cell:
    label, settings, flags = settled
    mark = digest({"settings": settings, "random_seed": seed, "attack": attack.digest if attack else None})
    own, flags = f"{label}_{mark[:10]}", (*flags, f"--random_seed={seed}")
    gpus = block.gpus if block.device == "cuda" else 0.0
    common = (block.threads, gpus, (block.dataset, block.dataset_path))
    if attack is None:
        label, own = f"{label}_s{seed}", f"{own}_s{seed}"
        return Cell(kind, name, mark, label, own, (*flags, f"--save_folder_name={own}"), None, *common)
    label, folder = f"{attack.label}/defense/{label}", f"{attack.folder}/defense/{own}"
    flags = (*flags, f"--save_folder_name={own}", f"--result_file={attack.folder}")
    return Cell(kind, name, mark, label, folder, flags, attack.digest, *common)


def _settle(block: Block, kind: str, name: str, amount: float | None) -> tuple[str, str, tuple[str, ...]]:
    """Label, digest of the settings and flags of a method, but for seed and attack."""
    axis, letter = ("pratio", "r") if kind == "attack" else ("ratio", "c")  # poisoning ratio, clean share
    known = _request(kind, name).known
    settings: dict[str, Any] = {key: getattr(block, key) for key in ("recipe", "device", "amp", "threads")}
    settings["dataset_path"] = str(Path(block.dataset_path).absolute())  # a worker elsewhere starts in another folder
    settings |= {"dataset": block.dataset} if kind == "attack" else {}
    settings |= {axis: amount} if amount is not None else {}
    for group in (kind, name):
        own = {key.removeprefix(f"{group}."): value for key, value in block.overrides.items()}
        settings |= {key: value for key, value in own.items() if key in known}
    for key in (*METHODS[kind][name].files, "index"):
        if settings.get(key) not in (None, "none"):
            settings[key] = str(Path(str(settings[key])).absolute())
    flags = tuple(f"--{key}={written(value)}" for key, value in settings.items())
    try:
        request = _request(kind, name, flags)
        run, *sections = request.settle(request.fitting(block.recipe), block.dataset)
        facts = _identity(sections, run, block, settings["dataset_path"])
    except SauError as error:
        raise ConfigError(f"{kind} {name}: {error}") from None
    label = f"{name}_{letter}{facts[axis]:g}" if axis in known else name
    label += "_oracle" if facts.get("select") == "oracle" else ""
    return label, digest({kind: name, **facts}), flags


def _identity(sections: Sequence[Any], run: AttackRun | DefenseRun, block: Block, dataset_path: str) -> dict[str, Any]:
    """All that determines a result but seed and attack. Published results are known by its digest: keep it.

    Files, and what else is measured, stand in it only where they are given.
    """
    settings = {key: value for section in sections for key, value in section.identity().items()}
    facts = {key: getattr(run, key) for key in _FACTS if hasattr(run, key)}
    where = {"dataset": block.dataset, "dataset_path": dataset_path if block.dataset == "folder" else None}
    machine = {"threads": block.threads, "device": block.device, "amp": block.amp}
    if facts.get("index"):
        facts["index_sha256"] = checksum(Path(facts.pop("index")))
    tracked = getattr(run, "track_risk", False)
    names = [field.name for field in fields(run) if field.name in _MEASURED or (tracked and field.name[:5] == "risk_")]
    more = {name: getattr(run, name) for name in names if getattr(run, name) != getattr(type(run), name)}
    return {**settings, **facts, **where, **machine, **more}


@cache
def _request(kind: str, name: str, flags: tuple[str, ...] = ()) -> Settings:
    """A method's command line on its way to objects; `known` has its settings by name."""
    method, asked = METHODS[kind][name], (AttackRun, Training) if kind == "attack" else (DefenseRun,)
    return Settings(f"{kind}/{name}.py", method, (*asked, method), flags)
