"""How runs differ from their namesakes: what a table writes beside the name of an attack or of a defense."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from sau.grid.names import mark
from sau.record.schema import EARLY
from sau.report.read import NONE, Run

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
    mixed = {key[:2] for key in _repeated(keys, runs)}  # of several folders of results, like two grids
    grids = [
        f"folder {run.above}" if key[:2] in mixed and run.above else "" for key, run in zip(keys, runs, strict=True)
    ]
    finer = [(*key, grid) for key, grid in zip(keys, grids, strict=True)]
    again = _repeated(finer, runs)
    names = [f"folder {mark(run.path.name) or run.path.name}" for run in runs]
    folders = [name if key in again else "" for key, name in zip(finer, names, strict=True)]
    return list(map(_joined, machine, grids, folders))


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
    differing = {name: _differing(alike) for name, alike in namesakes.items()}
    return [_said(differing[name], settings) if settings else "" for name, settings in runs]


def _differing(namesakes: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values differ: of whole identities all of them, else those that every one of them has."""
    identities = [settings for settings in namesakes if _whole(settings)]
    holders: dict[str, Sequence[dict[str, Any]]] = {key: identities for settings in identities for key in settings}
    common = set.intersection(*map(set, namesakes)) if namesakes else set[str]()
    holders |= dict.fromkeys(common, namesakes)
    values = {key: {text_of(settings.get(key)) for settings in having} for key, having in holders.items()}
    return sorted(key for key, found in values.items() if len(found) > 1 and key != EARLY)


def _whole(settings: dict[str, Any]) -> bool:
    """Whether these are a whole identity, not what a name says."""
    return "attack" in settings or "defense" in settings


def _said(differing: Sequence[str], settings: dict[str, Any]) -> str:
    """What these settings have where they differ from their namesakes', and where their run was ended early."""
    known = [key for key in differing if key in settings or _whole(settings)]
    texts = [f"no {key}" if settings.get(key) is None else f"{key} {_short(settings[key])}" for key in known]
    return _joined(*texts, f"ended in {str(settings[EARLY]).split(',')[0]}" if EARLY in settings else "")


def _joined(*texts: str) -> str:
    return ", ".join(filter(None, texts))


def _short(value: Any) -> str:
    """Short, and yet another text for another value."""
    text = value if isinstance(value, str) else text_of(value)
    return text if len(text) <= 24 else f"{text[:12]}…{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def text_of(value: Any) -> str:
    """The same text for the same value."""
    return json.dumps(value, sort_keys=True, default=str)
