"""From a grid's blocks to its cells: each has the digest of what determines its result, and a folder of its own."""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

from sau.attack import ATTACKS
from sau.config import Method, nearest
from sau.defense import DEFENSES
from sau.errors import ConfigError, SauError
from sau.files import checksum
from sau.grid.spec import Block
from sau.grid.store import Cell
from sau.optim import Training
from sau.record.folder import digest
from sau.run import AttackRun, DefenseRun
from sau.settings import Settings

METHODS: Mapping[str, Mapping[str, type[Method]]] = {"attack": ATTACKS, "defense": DEFENSES}
_AXIS = {"attack": "pratio", "defense": "ratio"}
_LETTER = {"attack": "r", "defense": "c"}  # poisoning ratio, clean share
# The grid sets these for all cells, by keys of its own or by itself.
_RESERVED = {
    "dataset", "dataset_path", "recipe", "device", "amp", "threads", "random_seed", "record_root", "result_file",
    "save_folder_name", "overwrite", "yaml_path", "bd_yaml_path", "attack", "max_minutes", "compile",
}  # fmt: skip
_FACTS = ("model", "width", "img_size", "ratio", "index")  # of a run: they determine a result
_MEASURED = ("trigger_radius", "track_risk")  # they add to what a summary holds, as risk_* do where risks are tracked


def cells(blocks: Sequence[Block]) -> list[Cell]:
    """Every cell once, attacks before their defenses; ConfigError if a block cannot be."""
    found: dict[str, Cell] = {}
    for block in blocks:
        _check_overrides(block)
        for cell in _crossed(block):
            found.setdefault(cell.digest, cell)
    return list(found.values())


def select(every: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """The cells whose label or method fits a pattern (`*` and `?` as in a shell), and the attacks that they need."""
    chosen = set[str]()
    for pattern in patterns:
        fitting = {cell.digest for cell in every if pattern == cell.name or fnmatch.fnmatch(cell.label, pattern)}
        if not fitting:
            raise ConfigError(f"--only {pattern!r} fits no cell; labels are like {every[-1].label}")
        chosen |= fitting
    chosen |= {cell.attack for cell in every if cell.digest in chosen and cell.attack}
    return [cell for cell in every if cell.digest in chosen]


@dataclass(frozen=True)
class _Settled:
    """A method with all of its settings, but for seed and attack."""

    kind: str
    name: str
    flags: tuple[str, ...]
    digest: str
    label: str


def _crossed(block: Block) -> Iterator[Cell]:
    """Seed by seed, attack by attack, each followed by its defenses."""
    settle = cache(partial(_settle, block))
    for seed, name in product(block.seeds, block.attacks):
        for ratio in (block.ratios or (None,)) if "pratio" in _names("attack", name) else (None,):
            attack = _cell(block, settle("attack", name, ratio), seed, None)
            yield attack
            for defense in block.defenses:
                shares = block.clean_shares or (None,)
                for share in shares if DEFENSES[defense].data_use != "none" else shares[:1]:
                    yield _cell(block, settle("defense", defense, share), seed, attack)


def _cell(block: Block, method: _Settled, seed: int, attack: Cell | None) -> Cell:
    on = attack.digest if attack else None
    mark = digest({"settings": method.digest, "random_seed": seed, "attack": on})
    own = f"{method.label}_{mark[:10]}" + ("" if attack else f"_s{seed}")
    target = (f"--result_file={attack.folder}",) if attack else ()
    flags = (*method.flags, f"--random_seed={seed}", f"--save_folder_name={own}", *target)
    folder = f"{attack.folder}/defense/{own}" if attack else own
    needs, data = (block.threads, block.memory_gb, block.gpus), (block.dataset, block.dataset_path)
    return Cell(method.kind, method.name, mark, folder, flags, on, *needs, data)


def _settle(block: Block, kind: str, name: str, amount: float | None) -> _Settled:
    axis = _AXIS[kind]
    settings: dict[str, Any] = {key: getattr(block, key) for key in ("recipe", "device", "amp", "threads")}
    settings["dataset_path"] = str(Path(block.dataset_path).absolute())  # a worker elsewhere starts in another folder
    settings |= {"dataset": block.dataset} if kind == "attack" else {}
    settings |= {axis: amount} if amount is not None else {}
    reserved = _RESERVED | ({axis, "index"} if amount is not None else set())
    known = _names(kind, name)
    for group in (kind, name):
        for key in (given := block.overrides.get(group, {})):
            if key in reserved:
                raise ConfigError(f"overrides.{group}.{key}: the grid sets it, by a key of its own; leave it out")
        settings |= {key: value for key, value in given.items() if key in known}
    for key in (*METHODS[kind][name].files, "index"):
        if settings.get(key) not in (None, "none"):
            settings[key] = str(Path(str(settings[key])).absolute())
    flags = tuple(f"--{key}={_text(value)}" for key, value in settings.items())
    try:
        request = _request(kind, name, flags)
        run, *sections = request.settle(request.fitting(block.recipe), block.dataset)
        facts = _identity(sections, run, block, settings["dataset_path"])
    except SauError as error:
        raise ConfigError(f"{kind} {name}: {error}") from None
    label = f"{name}_{_LETTER[kind]}{facts[axis]:g}" if axis in known else name
    label += "_oracle" if facts.get("select") == "oracle" else ""
    return _Settled(kind, name, flags, digest({kind: name, **facts}), label)


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


def _check_overrides(block: Block) -> None:
    """Refuse, by a ConfigError, a setting that its method, or every one of its kind, does not have."""
    for group, settings in block.overrides.items():
        methods = [(kind, name) for kind in METHODS for name in METHODS[kind] if group in (kind, name)]
        known = set[str]().union(*(_names(kind, name) for kind, name in methods))
        for key in settings:
            if key not in known:
                raise ConfigError(f"overrides.{group}.{key}: unknown setting{nearest(str(key), sorted(known))}")


def _request(kind: str, name: str, flags: Sequence[str]) -> Settings:
    """A method's command line on its way to objects."""
    method, asked = METHODS[kind][name], (AttackRun, Training) if kind == "attack" else (DefenseRun,)
    return Settings(f"{kind}/{name}.py", method, (*asked, method), flags)


@cache
def _names(kind: str, name: str) -> set[str]:
    """The names of a method's settings."""
    return {*_request(kind, name, ()).known}


def _text(value: Any) -> str:
    """A value as on a command line."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
