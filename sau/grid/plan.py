"""From a grid's blocks to its cells: each has the digest of what determines its result, and a folder of its own."""

import fnmatch
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sau.defense import DEFENSES
from sau.errors import ConfigError, SauError
from sau.grid.identity import identity, refuse_unfit
from sau.grid.names import without_digest
from sau.grid.overrides import METHODS, canonical, overridden, refuse_unknown, request, text
from sau.grid.spec import Block
from sau.record.schema import digest
from sau.settings.run import AttackRun

_LETTERS = {"attack": "r", "defense": "c"}  # poisoning ratio, clean share


@dataclass(frozen=True)
class Cell:
    """One run: an attack, or a defense on an attack.

    Args:
        kind: attack or defense.
        name: the method.
        digest: of all that determines the result, hexadecimal.
        folder: below the record root, unique to the digest.
        flags: of attack/NAME.py or defense/NAME.py, all but the record root.
        attack: digest of the attack's cell; None for an attack.
        threads: CPU threads.
        memory_gb: GiB of memory.
        gpus: GPUs, or a share of one.
        data: the data set, and the folder of the data sets.
        twin: whether another cell of the grid has the same label but for its digest.
    """

    kind: str
    name: str
    digest: str
    folder: str
    flags: tuple[str, ...]
    attack: str | None
    threads: int
    memory_gb: float
    gpus: float
    data: tuple[str, str]
    twin: bool = False

    @property
    def label(self) -> str:
        """The folder without digests, for people; with its own where that would be another cell's, too."""
        label = "/".join(without_digest(part) for part in self.folder.split("/"))
        return f"{label}_{self.digest[:10]}" if self.twin else label


def cells(blocks: Sequence[Block]) -> list[Cell]:
    """Every cell once, attacks before their defenses; ConfigError if a block cannot be."""
    found: dict[str, Cell] = {}
    for block in blocks:
        refuse_unknown(block.overrides)
        for cell in _Crossed(block).cells():
            found.setdefault(cell.digest, cell)
    folders = {cell.folder: cell for cell in found.values()}
    if len(folders) < len(found):
        raise ConfigError("two cells have the same folder, by an accident of their digests; change a setting of one")
    labels = Counter(cell.label for cell in found.values())
    return [replace(cell, twin=True) if labels[cell.label] > 1 else cell for cell in found.values()]


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

    flags: tuple[str, ...]
    digest: str
    label: str


class _Crossed:
    """The cells of one block; a method is settled once for each value of its axis."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.memo: dict[tuple[str, str, float | None], _Settled] = {}

    def cells(self) -> Iterator[Cell]:
        """Seed by seed, attack by attack, each followed by its defenses."""
        for seed in self.block.seeds:
            AttackRun(random_seed=seed)  # refuses what is no seed
            for name in self.block.attacks:
                poisons = "pratio" in canonical("attack", name)
                for ratio in self.block.ratios if poisons and self.block.ratios else (None,):
                    attack = self._cell("attack", name, seed, ratio, None)
                    yield attack
                    for defense in self.block.defenses:
                        shares = self.block.clean_shares or (None,)
                        for share in shares if DEFENSES[defense].looks else shares[:1]:
                            yield self._cell("defense", defense, seed, share, attack)

    def _cell(self, kind: str, name: str, seed: int, amount: float | None, attack: Cell | None) -> Cell:
        key = (kind, name, amount)
        if key not in self.memo:
            self.memo[key] = self._settle(*key)
        settled, block = self.memo[key], self.block
        on = attack.digest if attack else None
        mark = digest({"settings": settled.digest, "random_seed": seed, "attack": on})
        own = f"{settled.label}_{mark[:10]}" + ("" if attack else f"_s{seed}")
        target = (f"--result_file={attack.folder}",) if attack else ()
        flags = (*settled.flags, f"--random_seed={seed}", f"--save_folder_name={own}", *target)
        folder = f"{attack.folder}/defense/{own}" if attack else own
        needs, data = (block.threads, block.memory_gb, block.gpus), (block.dataset, block.dataset_path)
        return Cell(kind, name, mark, folder, flags, on, *needs, data)

    def _settle(self, kind: str, name: str, amount: float | None) -> _Settled:
        block, axis = self.block, {"attack": "pratio", "defense": "ratio"}[kind]
        said: dict[str, Any] = {
            "recipe": block.recipe,
            "device": block.device,
            "amp": block.amp,
            "threads": block.threads,
        }
        said |= {"dataset_path": str(Path(block.dataset_path).absolute())}
        said |= {"dataset": block.dataset} if kind == "attack" else {}
        said |= {axis: amount} if amount is not None else {}
        for group in (kind, name):
            said |= overridden(block.overrides, kind, name, group, axis if amount is not None else "")
        for key in (*METHODS[kind][name].files, "index"):  # a worker elsewhere starts in another folder
            if said.get(key) not in (None, "none"):
                if not isinstance(said[key], str):
                    raise ConfigError(f"{key} of {name} is {said[key]!r}, allowed is the path of a file")
                said[key] = str(Path(said[key]).absolute())
        flags = tuple(f"--{key}={text(value)}" for key, value in said.items())
        try:
            asked = request(kind, name, flags)
            run, *sections = asked.settle(asked.fitting(block.recipe), block.dataset)
            method = sections[-1]
            refuse_unfit(method, run, block, shares=kind == "defense" and amount is not None)
            facts = identity(sections, run, block, said["dataset_path"])
        except SauError as error:
            raise ConfigError(f"{kind} {name}: {error}") from None
        share = facts.get(axis)
        label = f"{name}_{_LETTERS[kind]}{share:g}" if "pratio" in canonical(kind, name) or kind == "defense" else name
        label += "_oracle" if facts.get("select") == "oracle" else ""
        return _Settled(flags, digest({kind: name, **facts}), label)
