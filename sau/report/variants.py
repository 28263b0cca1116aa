"""How runs differ from their namesakes: what a table writes beside the name of an attack or of a defense."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from sau.grid.names import mark
from sau.report.read import NONE, Run

EARLY = "ended_early"  # where --max_minutes ended a run; in the identity of such runs alone
Named = tuple[Hashable, dict[str, Any] | None]


def variants(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """For each run of a section how its attack and how its defense differs from their namesakes; mostly empty.

    What the settings do not tell apart, the precision does; what would yet be one network twice, the machine, else the
    folder.
    """
    first = _differences([(run.attack, run.attack_settings) for run in runs])
    second = _differences([(run.defense, run.settings) for run in runs])
    own = [index for index, run in enumerate(runs) if run.defense == NONE]
    seeds = [runs[i].path.name if runs[i].seed is None else runs[i].seed for i in own]
    apart = _apart([(runs[i].attack, first[i]) for i in own], seeds, [runs[i] for i in own])
    marks = {runs[i].home: text for i, text in zip(own, apart, strict=True)}
    first = [_joined(text, marks.get(run.home, "")) for run, text in zip(runs, first, strict=True)]
    groups = [(r.attack, a, r.defense, b) for r, a, b in zip(runs, first, second, strict=True)]
    apart = _apart(groups, [(run.home, run.seed) for run in runs], runs)
    return list(zip(first, map(_joined, second, apart), strict=True))


def _apart(groups: Sequence[Hashable], places: Sequence[Hashable], runs: Sequence[Run]) -> list[str]:
    """What is to be added to the variants of groups that hold a place, a network and a seed, more than once."""
    crowded = {group for group, _ in _repeated(list(zip(groups, places, strict=True)), runs)}
    machine = _differences([(g, _machine(r, g in crowded)) for g, r in zip(groups, runs, strict=True)])
    keys = list(zip(groups, machine, places, strict=True))
    again = _repeated(keys, runs)
    names = [f"folder {mark(run.path.name) or run.path.name}" for run in runs]
    folders = [name if key in again else "" for key, name in zip(keys, names, strict=True)]
    return list(map(_joined, machine, folders))


def _machine(run: Run, crowded: bool) -> dict[str, Any]:
    """Runs of another precision are no seeds of each other; device and threads only tell one seed's runs apart."""
    return {name: value for name, value in run.machine.items() if crowded or name == "amp"}


def _repeated(keys: Sequence[Any], runs: Sequence[Run]) -> set[Any]:
    counts = Counter(key for key, run in zip(keys, runs, strict=True) if run.usable)
    return {key for key, count in counts.items() if count > 1}


def _differences(runs: Sequence[Named]) -> list[str]:
    """For each (name, settings) how it differs from its namesakes; that a run was ended early is said of it always.

    What an identity lacks was not asked for. What the name of a folder lacks, nobody knows, so it tells nobody apart.
    """
    namesakes: dict[Hashable, list[dict[str, Any]]] = defaultdict(list)
    for name, settings in runs:
        namesakes[name] += [settings] if settings else []
    differing = {}
    for name, others in namesakes.items():
        whole = [other for other in others if _whole(other)]
        known = {key: whole for other in whole for key in other}
        known |= dict.fromkeys(set.intersection(*(set(other) for other in others)) if others else (), others)
        differing[name] = sorted(
            key for key, those in known.items() if key != EARLY and len({text_of(one.get(key)) for one in those}) > 1
        )
    texts = [", ".join(_said(key, of) for key in differing[name] if key in of or _whole(of)) if of else ""
             for name, of in runs]  # fmt: skip
    cut = [f"ended in {str(of[EARLY]).split(',')[0]}" if of and EARLY in of else "" for _, of in runs]
    return list(map(_joined, texts, cut))


def _whole(settings: dict[str, Any]) -> bool:
    """Whether these are a whole identity, not what a name says."""
    return "attack" in settings or "defense" in settings


def _said(key: str, settings: dict[str, Any]) -> str:
    return f"no {key}" if settings.get(key) is None else f"{key} {_short(settings[key])}"


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _short(value: Any) -> str:
    """Short, and yet another text for another value."""
    text = value if isinstance(value, str) else text_of(value)
    return text if len(text) <= 24 else f"{text[:12]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def text_of(value: Any) -> str:
    """The same text for the same value."""
    return json.dumps(value, sort_keys=True, default=str)
