"""Runs as the cells of tables: means over seeds, attack against defense, one section for each data set and network."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from sau.errors import one_line
from sau.files import is_number
from sau.formatting import marked
from sau.report import parse
from sau.report.read import DAMAGED, DUPLICATE, NONE, UNFINISHED, UNVERIFIED, VERIFIED, Run
from sau.report.spread import Spread, spread
from sau.report.variants import text_of, variants

MEASURED, PARTLY = "measured", "partly"
NETWORK = ("name", "width", "classes", "shape")
DEAD = "(did not take)"
FIGURES = (*parse.PERCENT, *parse.COST)


@dataclass(frozen=True)
class Cell:
    """One defense against one attack.

    Args:
        attack: name of the attack.
        attack_variant: how its settings differ from those of its namesakes in the section; mostly empty.
        defense: name of the defense, or `none`.
        variant: as `attack_variant`, of the defense.
        runs: the folders, over seeds.
        wanted: seeds of the attack.
        status: `measured` (all runs verified), `unverified`, `partly` (some runs do not count), `damaged` or
            `unfinished` (none counts).
        reason: why it is not measured; empty if it is.
        dead: that the attack did not take, and on how many of its networks; empty if it took on all of them. Such a
            cell is ranked nowhere and is in no mean over attacks, for it shows nothing of a defense.
        rank: 1 for the best of its attack, 2 for the second, 0 for all others.
    """

    attack: str
    attack_variant: str
    defense: str
    variant: str
    runs: tuple[Run, ...]
    wanted: int
    status: str
    reason: str = ""
    dead: str = ""
    rank: int = 0

    @cached_property
    def figures(self) -> dict[str, Spread | None]:
        """acc, asr, racc, der, seconds, peak_memory_mb over the runs that count."""
        return {name: spread([run.figures[name] for run in self.good]) for name in FIGURES}

    def before(self, name: str) -> Spread | None:
        """acc, asr or racc of the attacked networks that the defense was given."""
        return spread([run.figures[f"before_{name}"] for run in self.good])

    @property
    def trigger(self) -> list[tuple[str, float]]:
        """How well the trigger hides, by the first run that says so: (PSNR dB, 31.2) and so on."""
        names = {"psnr": "PSNR dB", "ssim": "SSIM", "linf": "L-infinity", "in_ball": "% in the ball of SAU"}
        hidden = [parse.mapping(run.summary.get("trigger")) for run in self.good]
        found: dict[str, Any] = next(filter(None, hidden), {})
        return [(text, found[name]) for name, text in names.items() if is_number(found.get(name))]

    @property
    def bounds(self) -> list[tuple[float, float]]:
        """(R_bd, R_share + 1 - R_bd before) in percent of the pictures whose trigger lies in the ball, a pair a run."""
        after = [parse.mapping(parse.mapping(run.summary.get("risk")).get("after")) for run in self.good]
        found = [parse.mapping(risk.get("bound")) for risk in after]
        pairs = [(bound.get("r_bd"), bound.get("at_most")) for bound in found]
        return [(a, b) for a, b in pairs if is_number(a) and is_number(b)]

    @property
    def good(self) -> list[Run]:
        """The runs that count."""
        return [run for run in self.runs if run.usable]

    @property
    def oracle(self) -> bool:
        """Whether test data chose something, in any run."""
        return any(run.summary.get("selection") == "oracle" for run in self.runs)

    @property
    def attack_name(self) -> str:
        """The attack, how its settings differ from its namesakes', and whether it did not take."""
        return " ".join(filter(None, (self.attack, self.attack_variant, DEAD if self.dead else "")))

    @property
    def name(self) -> str:
        """The defense, and how its settings differ from its namesakes' but for who chose, which is said once."""
        words = [word for word in self.variant.split(", ") if word not in ("select defender", "select oracle")]
        return marked(f"{self.defense} {', '.join(words)}".strip(), "oracle" if self.oracle else None)

    @property
    def poisoned(self) -> bool:
        """Whether the defense looked at the attacker's training pictures."""
        return any(run.summary.get("data") == "poisoned" for run in self.runs)


@dataclass(frozen=True)
class Section:
    """The cells of one data set and one network, which alone may stand in one table.

    Args:
        dataset: name of the data set; None if the folders do not say.
        network: settings of the network; empty if the folders do not say.
        notes: what the runs say about their data, like that it is a subset.
        cells: by attack; in it the undefended network, then the defenses by rank.
    """

    dataset: str | None
    network: dict[str, Any]
    notes: tuple[str, ...] = ()
    cells: list[Cell] = field(default_factory=list)

    @property
    def dead(self) -> str:
        """A line on the attacks that did not take; empty if all did."""
        dead = {(cell.attack, cell.attack_variant): cell.dead for cell in self.cells if cell.dead}
        named = "; ".join(f"{' '.join(filter(None, attack))} ({why})" for attack, why in dead.items())
        return (
            f"Attacks that did not take are ranked nowhere and left out of means over attacks: {named}." if dead else ""
        )

    @property
    def title(self) -> str:
        """Data set and network in words."""
        name, width = self.network.get("name", "network not recorded"), self.network.get("width")
        return one_line(f"{self.dataset or 'data set not recorded'}, {name}" + (f" of width {width}" if width else ""))


def sections(runs: Sequence[Run], dataset: str | None = None) -> list[Section]:
    """Group runs: nothing is averaged but seeds of the same data set, pictures, network and settings.

    Args:
        runs: as `read` gives them.
        dataset: data set of the folders that do not say theirs.
    """
    parts: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        run = replace(run, dataset=run.dataset or dataset)
        said = run.attack_settings or {}
        parts[text_of([run.dataset, said.get("test"), _network(run)])].append(run)
    # Copies alone, as where files of a copied folder are gone, are counted elsewhere.
    counted = [part for _, part in sorted(parts.items()) if any(run.status != DUPLICATE for run in part)]
    return [_section(part) for part in counted]


def _section(runs: list[Run]) -> Section:
    notes = {str(note) for run in runs for note in parse.items(run.config.get("notes"))}
    groups: dict[tuple[str, str, str, str], list[Run]] = defaultdict(list)
    for run, (first, second) in zip(runs, variants(runs), strict=True):
        groups[run.attack, first, run.defense, second].append(run)
    attacks = {
        key[:2]: len({run.name for run in found if run.usable}) for key, found in groups.items() if key[2] == NONE
    }
    dead = {attack: why for attack in {key[:2] for key in groups} if (why := _dead(attack, groups))}
    cells = [
        _cell(key, found, attacks.get(key[:2], len(found)), dead.get(key[:2], "")) for key, found in groups.items()
    ]
    return Section(runs[0].dataset, _network(runs[0]), tuple(sorted(notes)), _ranked(cells))


def _dead(attack: tuple[str, str], groups: Mapping[tuple[str, str, str, str], Sequence[Run]]) -> str:
    """On how many networks the attack missed its gate, by what its runs or those of its defenses say."""
    runs = [run for key, found in groups.items() if key[:2] == attack for run in found if run.usable]
    missed = {run.home: run.gate for run in runs if run.gate is not None}
    count = len({run.home for run in runs})
    return f"ASR below {max(missed.values()):g} on {len(missed)} of {count} networks" if missed else ""


def _cell(key: tuple[str, str, str, str], runs: list[Run], wanted: int, dead: str) -> Cell:
    states = {run.status for run in runs} - {DUPLICATE}
    reasons = "; ".join(f"{run.name}: {run.reason}" for run in runs if run.reason and run.status != UNVERIFIED)
    if states == {VERIFIED}:
        status = MEASURED
    elif states <= {VERIFIED, UNVERIFIED}:
        status, reasons = UNVERIFIED, "; ".join(sorted({run.reason for run in runs if run.reason}))
    else:
        bad = DAMAGED if DAMAGED in states else UNFINISHED
        status = PARTLY if any(run.usable for run in runs) else bad
    return Cell(*key, tuple(runs), wanted, status, reasons, dead)


def _ranked(cells: list[Cell]) -> list[Cell]:
    """Best is the highest mean DER, among equals the lowest ASR. Who chose by test data takes no part, nor do attacks
    that did not take."""
    ranks: dict[int, int] = {}
    for attack in {(cell.attack, cell.attack_variant) for cell in cells}:
        own = [cell for cell in cells if (cell.attack, cell.attack_variant) == attack and cell.defense != NONE]
        scores = {id(cell): _merit(cell) for cell in own if cell.figures["der"] and not (cell.oracle or cell.dead)}
        order = sorted(set(scores.values()))
        ranks |= {which: place for which, merit in scores.items() if (place := order.index(merit) + 1) <= 2}
    ranked = [replace(cell, rank=ranks.get(id(cell), 0)) for cell in cells]
    return sorted(ranked, key=_order)


def _merit(cell: Cell) -> tuple[float, float]:
    der, asr = cell.figures["der"], cell.figures["asr"]
    return (-round(der.mean, 2) if der else math.inf, round(asr.mean, 2) if asr else math.inf)


def _order(cell: Cell) -> tuple[Any, ...]:
    late = not cell.good
    return (cell.attack, cell.attack_variant, cell.defense != NONE, late, _merit(cell), cell.defense, cell.variant)


def _network(run: Run) -> dict[str, Any]:
    """Of the attack; of a foreign attack, what its defense says."""
    said = run.attack_settings or {}
    found = {name: said[name] for name in NETWORK if name in said}
    own = parse.mapping(run.config.get("model"))
    return found or {name: own[name] for name in NETWORK if name in own}
