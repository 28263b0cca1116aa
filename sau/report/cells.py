"""The cells of tables: results averaged over seeds, by data set, network, attack and defense."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sau.errors import one_line
from sau.grid.store import mark
from sau.record.folder import EARLY
from sau.report.results import COST, NONE, PERCENT, Result
from sau.report.stats import MeanStd, mean_std
from sau.util import marked

NETWORK = ("name", "width", "classes", "shape")
FIGURES = (*PERCENT, *COST)
DEAD = "(did not take)"
Key = tuple[str, str, str, str]  # attack, its label, defense, its label


@dataclass(frozen=True)
class TableCell:
    """One defense against one attack.

    Args:
        attack: name of the attack.
        attack_label: the settings in which it differs from other cells of the attack; mostly empty.
        defense: name of the defense, or `none`.
        label: as `attack_label`, of the defense.
        results: over seeds, at least one.
        dead: on how many networks the attack missed its gate; empty if on none. Such a cell shows nothing of a defense:
            it is ranked nowhere and in no mean over attacks.
        rank: 1 for the best of its attack, 2 for the second, else 0.
    """

    attack: str
    attack_label: str
    defense: str
    label: str
    results: tuple[Result, ...]
    dead: str = ""
    rank: int = 0

    @cached_property
    def figures(self) -> dict[str, MeanStd | None]:
        """acc, asr, racc, der, seconds, peak_memory_mb, and before_acc, before_asr, before_racc."""
        names = (*FIGURES, "before_acc", "before_asr", "before_racc")
        return {name: mean_std([result.figures[name] for result in self.results]) for name in names}

    @property
    def verified(self) -> bool:
        """Whether every folder was compared with its manifest; False if some hold a summary alone."""
        return all(result.config for result in self.results)

    @property
    def oracle(self) -> bool:
        """Whether test data chose something, in any result."""
        return any(result.oracle for result in self.results)

    @property
    def poisoned(self) -> bool:
        """Whether the defense was given the attacker's training images."""
        return any(result.summary.get("data") == "poisoned" for result in self.results)

    @property
    def attack_name(self) -> str:
        """The attack with its label, marked if it did not take."""
        return " ".join(filter(None, (self.attack, self.attack_label, DEAD if self.dead else "")))

    @property
    def name(self) -> str:
        """The defense with its label, marked if test data chose."""
        words = [word for word in self.label.split(", ") if word not in ("select defender", "select oracle")]
        return marked(f"{self.defense} {', '.join(words)}".strip(), "oracle" if self.oracle else None)


@dataclass(frozen=True)
class Section:
    """The cells of one data set and one network.

    Args:
        dataset: name of the data set; None if unknown.
        network: settings of the network; empty if unknown.
        notes: what the configurations note about the data, like that it is a subset.
        cells: by attack, in it the undefended network first, then the defenses by rank.
    """

    dataset: str | None
    network: dict[str, Any]
    notes: tuple[str, ...] = ()
    cells: list[TableCell] = field(default_factory=list)

    @property
    def dead(self) -> str:
        """A line that names the attacks that did not take; empty if all did."""
        dead = {(cell.attack, cell.attack_label): cell.dead for cell in self.cells if cell.dead}
        named = "; ".join(f"{' '.join(filter(None, attack))} ({why})" for attack, why in dead.items())
        return f"Attacks that did not take are ranked nowhere and left out of means over attacks: {named}." * bool(dead)

    @property
    def title(self) -> str:
        """Data set and network."""
        name, width = self.network.get("name", "network not recorded"), self.network.get("width")
        return one_line(f"{self.dataset or 'data set not recorded'}, {name}" + (f" of width {width}" if width else ""))


def sections(results: Sequence[Result], dataset: str | None = None) -> list[Section]:
    """Group results. Only seeds are averaged: data set, test images, network and settings must be the same.

    Args:
        results: of `find_results`.
        dataset: data set of the folders that do not name theirs.
    """
    parts: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        result = replace(result, dataset=result.dataset or dataset)
        test = (result.attack_settings or {}).get("test")
        parts[_text([result.dataset, test, _network(result)])].append(result)
    return [_section(part) for _, part in sorted(parts.items())]


def _section(results: list[Result]) -> Section:
    notes = {str(note) for result in results for note in result.config.get("notes") or []}
    groups: dict[Key, list[Result]] = defaultdict(list)
    for result, (attack_label, label) in zip(results, _labels(results), strict=True):
        groups[result.attack, attack_label, result.defense, label].append(result)
    dead = {key[:2]: _dead([one for other, found in groups.items() if other[:2] == key[:2] for one in found])
            for key in groups}  # fmt: skip
    cells = [TableCell(*key, tuple(found), dead[key[:2]]) for key, found in groups.items()]
    return Section(results[0].dataset, _network(results[0]), tuple(sorted(notes)), _ranked(cells))


def _dead(results: list[Result]) -> str:
    """On how many networks an attack missed its gate, by its own summaries or those of its defenses."""
    missed = {result.attack_path: result.missed_gate for result in results if result.missed_gate is not None}
    count = len({result.attack_path for result in results})
    return f"ASR below {max(missed.values()):g} on {len(missed)} of {count} networks" if missed else ""


def _ranked(cells: list[TableCell]) -> list[TableCell]:
    """Rank by the highest mean DER, then by the lowest ASR; without oracles and attacks that did not take."""
    merits: dict[tuple[str, str], set[tuple[float, float]]] = defaultdict(set)
    for cell in cells:
        if _competes(cell):
            merits[cell.attack, cell.attack_label].add(_merit(cell))
    ranked = []
    for cell in cells:
        order = sorted(merits[cell.attack, cell.attack_label])
        rank = order.index(_merit(cell)) + 1 if _competes(cell) else 0
        ranked.append(replace(cell, rank=rank if rank <= 2 else 0))
    return sorted(ranked, key=_order)


def _competes(cell: TableCell) -> bool:
    return cell.defense != NONE and cell.figures["der"] is not None and not (cell.oracle or cell.dead)


def _merit(cell: TableCell) -> tuple[float, float]:
    der, asr = cell.figures["der"], cell.figures["asr"]
    return (-round(der.mean, 2) if der else float("inf"), round(asr.mean, 2) if asr else float("inf"))


def _order(cell: TableCell) -> tuple[Any, ...]:
    return (cell.attack, cell.attack_label, cell.defense != NONE, _merit(cell), cell.defense, cell.label)


def _network(result: Result) -> dict[str, Any]:
    """Network of the attack; of an attack by BackdoorBench, that of its defense."""
    settings, model = result.attack_settings or {}, result.config.get("model") or {}
    found = {name: settings[name] for name in NETWORK if name in settings}
    return found or {name: model[name] for name in NETWORK if name in model}


def _labels(results: Sequence[Result]) -> list[tuple[str, str]]:
    """For each result the settings in which its attack, and its defense, differs from others of the same name.

    Where two results of one network and seed have the same label, their folders are added.
    """
    attacks = _differences([(result.attack, result.attack_settings) for result in results])
    defenses = _differences([(result.defense, result.settings) for result in results])
    own = [(one, text) for one, text in zip(results, attacks, strict=True) if one.defense == NONE]
    seeds = [(one.attack, text, one.path if one.seed is None else one.seed) for one, text in own]
    folders = dict(zip((one.path for one, _ in own), _folders([one for one, _ in own], seeds), strict=True))
    keys = [(one.attack_path, one.seed, one.defense, text) for one, text in zip(results, defenses, strict=True)]
    attacks = [_join(text, folders.get(one.attack_path, "")) for one, text in zip(results, attacks, strict=True)]
    return list(zip(attacks, map(_join, defenses, _folders(results, keys)), strict=True))


def _folders(results: Sequence[Result], keys: Sequence[Hashable]) -> list[str]:
    """The folder, or the digest in its name, of results whose key is not theirs alone; else empty."""
    counts = Counter(keys)
    return [
        f"folder {mark(one.path.name) or one.name}" if counts[key] > 1 else ""
        for one, key in zip(results, keys, strict=True)
    ]


def _differences(named: Sequence[tuple[str, dict[str, Any] | None]]) -> list[str]:
    """For each (name, settings) how it differs from others of that name. An early end is always named."""
    texts: dict[tuple[str, str], set[str]] = defaultdict(set)
    keys = {(name, key) for name, settings in named for key in settings or ()}
    for name, settings in named:
        for key in (key for other, key in keys if other == name and settings):
            texts[name, key].add(_text((settings or {}).get(key)))
    differing = sorted(key for key, found in texts.items() if len(found) > 1 and key[1] != EARLY)
    return [_label([key for other, key in differing if other == name], settings or {}) for name, settings in named]


def _label(differing: Sequence[str], settings: dict[str, Any]) -> str:
    texts = [f"no {key}" if settings.get(key) is None else f"{key} {_short(settings[key])}" for key in differing]
    early = f"ended in {str(settings[EARLY]).split(',')[0]}" if EARLY in settings else ""
    return _join(*(texts if settings else ()), early)


def _join(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _short(value: Any) -> str:
    """A short text; long values that begin alike get different ones."""
    text = value if isinstance(value, str) else _text(value)
    return text if len(text) <= 24 else f"{text[:12]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
