"""The cells of tables: results averaged over seeds, by data set, network, attack and defense."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from sau.errors import one_line
from sau.record.folder import EARLY
from sau.report.results import NONE, MeanStd, Result, marked, mean_std

NETWORK = ("name", "width", "classes", "shape")
DEAD = "(did not take)"
Variant = tuple[str, str, bool]  # defense, label, and whether test data chose something


@dataclass(frozen=True)
class TableCell:
    """One defense against one attack."""

    attack: str
    attack_label: str  # what tells it from other cells of the attack, see `_labels`; mostly empty
    defense: str  # or `none`
    label: str  # as `attack_label`, of the defense
    results: tuple[Result, ...]  # over seeds, at least one
    dead: str  # on how many networks the attack missed its gate; such a cell has no rank and is in no mean
    rank: int = 0  # 1 for the best of its attack, 2 for the second, else 0

    @cached_property
    def figures(self) -> dict[str, MeanStd | None]:
        """acc, asr, racc, der, seconds, peak_memory_mb, and before_acc, before_asr, before_racc."""
        return {name: mean_std([result.figures[name] for result in self.results]) for name in self.results[0].figures}

    def means(self, *names: str) -> list[float | None]:
        return [figure.mean if (figure := self.figures[name]) else None for name in names]

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
        return marked(f"{self.defense} {self.label}".strip(), "oracle" if self.oracle else None)

    @property
    def share(self) -> float | None:
        """Of the training images, how many the defense was given, where that is recorded."""
        return (self.results[0].settings or {}).get("ratio")

    @property
    def competes(self) -> bool:
        """Whether it may have a rank."""
        return self.defense != NONE and self.figures["der"] is not None and not (self.oracle or self.dead)

    @property
    def merit(self) -> tuple[float, float]:
        """Least is best: by the highest mean DER, then by the lowest mean ASR, as they are shown."""
        der, asr = self.figures["der"], self.figures["asr"]
        return (-round(der.mean, 2) if der else float("inf"), round(asr.mean, 2) if asr else float("inf"))


@dataclass(frozen=True)
class Section:
    """The cells of one data set and one network."""

    dataset: str | None  # None if unknown
    network: dict[str, Any]  # settings of the network; empty if unknown
    notes: tuple[str, ...]  # what the configurations note about the data, like that it is a subset
    cells: list[TableCell]  # by attack: the undefended network, the defenses by merit

    @property
    def dead(self) -> str:
        """A line that names the attacks that did not take; empty if all did."""
        dead = {(cell.attack, cell.attack_label): cell.dead for cell in self.cells if cell.dead}
        named = "; ".join(f"{' '.join(filter(None, attack))} ({why})" for attack, why in dead.items())
        return f"Attacks that did not take are ranked nowhere and left out of means over attacks: {named}." * bool(dead)

    @property
    def title(self) -> str:
        name, width = self.network.get("name", "network not recorded"), self.network.get("width")
        return one_line(f"{self.dataset or 'data set not recorded'}, {name}" + (f" of width {width}" if width else ""))


def sections(results: Sequence[Result], dataset: str | None = None) -> list[Section]:
    """Results by data set, test images and network, averaged over seeds where all settings are the same; `dataset` is
    that of the folders that do not name theirs."""
    parts: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        result = replace(result, dataset=result.dataset or dataset)
        test = (result.attack_settings or {}).get("test")
        parts[_text([result.dataset, test, _network(result)])].append(result)
    return [_section(part) for _, part in sorted(parts.items())]


def _network(result: Result) -> dict[str, Any]:
    """Network of the attack; of an attack by BackdoorBench, that of its defense."""
    settings, model = result.attack_settings or {}, result.config.get("model") or {}
    found = {name: settings[name] for name in NETWORK if name in settings}
    return found or {name: model[name] for name in NETWORK if name in model}


def _section(results: list[Result]) -> Section:
    notes = {str(note) for result in results for note in result.config.get("notes") or []}
    # An attack comes before its defenses and knows its own seed and folder.
    labels = _labels({one.attack_path: one for one in reversed(results)}, attacks=True)
    own = _labels({one.path: one for one in results if one.defense != NONE}, attacks=False)
    attacks: dict[tuple[str, str], dict[Variant, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for one in results:
        attacks[one.attack, labels[one.attack_path]][one.defense, own.get(one.path, ""), one.oracle].append(one)
    cells = [cell for attack, defenses in sorted(attacks.items()) for cell in _ranked(attack, defenses)]
    return Section(results[0].dataset, _network(results[0]), tuple(sorted(notes)), cells)


def _labels(runs: Mapping[Path, Result], attacks: bool) -> dict[Path, str]:
    """The settings in which an attack or a defense differs from others of its name, as `name=value`; or its folder,
    where they leave two runs of one seed alike. An early end is always said; what test data chose is marked elsewhere.
    """
    names = {path: run.attack if attacks else run.defense for path, run in runs.items()}
    settings = {path: (run.attack_settings if attacks else run.settings) or {} for path, run in runs.items()}
    labels, marks = dict[Path, str](), dict[Path, tuple[Any, ...]]()
    for path, run in runs.items():
        others = [settings[other] for other in runs if names[other] == names[path] and settings[other]]
        differing = {
            key: value for key, value in sorted(settings[path].items())
            if key == EARLY or (key != "select" and any(other.get(key) != value for other in others))
        }  # fmt: skip
        labels[path] = ", ".join(f"{key}={_text(value)}" for key, value in differing.items())
        marks[path] = (names[path], labels[path], run.seed, *(() if attacks else (run.attack_path, run.oracle)))
    alike = Counter(marks.values())
    return {path: labels[path] if alike[marks[path]] == 1 else run.name if attacks else path.name
            for path, run in runs.items()}  # fmt: skip


def _ranked(attack: tuple[str, str], defenses: dict[Variant, list[Result]]) -> list[TableCell]:
    """The cells of one attack in order, with ranks: neither for oracles nor where the attack did not take."""
    every = [result for results in defenses.values() for result in results]
    count = len({result.attack_path for result in every})
    missed = {result.attack_path: result.missed_gate for result in every if result.missed_gate is not None}
    dead = f"ASR below {max(missed.values()):g} or ACC too low on {len(missed)} of {count} networks" if missed else ""
    cells = [TableCell(*attack, name, own, tuple(results), dead) for (name, own, _), results in defenses.items()]
    merits = sorted({cell.merit for cell in cells if cell.competes})[:2]
    cells = [replace(cell, rank=merits.index(cell.merit) + 1) if cell.competes and cell.merit in merits else cell
             for cell in cells]  # fmt: skip
    return sorted(cells, key=lambda cell: (cell.defense != NONE, cell.merit, cell.defense, cell.label))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
