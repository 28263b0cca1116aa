"""Read result folders: what was measured, and what is wrong with a folder that does not count; means over results."""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sau.errors import MALFORMED, RecordError
from sau.files import MOST, is_number, read
from sau.grid.store import load, parse_name
from sau.record.attack_result import gate
from sau.record.folder import CONFIG, MANIFEST, METRICS, OWN, SUMMARY, Record, run_kind

NONE = "none"  # the "defense" of the attacked network itself
PERCENT = ("acc", "asr", "racc", "der")
COST = ("seconds", "peak_memory_mb")
BEFORE = ("acc", "asr", "racc")  # as before_acc, ... of the network before the defense
SEED_KEYS = {"random_seed", "clean", "attacked"}  # differ between seeds; all other settings must be equal


@dataclass(frozen=True)
class Result:
    """One finished result folder."""

    path: Path  # the folder
    attack: str
    defense: str  # `none` for the attacked network
    seed: int | None  # None if unknown
    dataset: str | None = None  # None if unknown
    attack_settings: dict[str, Any] | None = None  # all but the seed; None if unknown
    settings: dict[str, Any] | None = None  # of the defense; None for `none`
    name: str = ""  # the folder below the root, like badnet_s0/defense/sau
    figures: dict[str, float | None] = field(default_factory=dict)  # of PERCENT, COST and BEFORE; None if not measured
    missed_gate: float | None = None  # ASR in percent to reach; None if the attack passed its gate or had none
    summary: dict[str, Any] = field(default_factory=dict)  # `summary.json`
    config: dict[str, Any] = field(default_factory=dict)  # `config.yaml`; empty if a summary alone was kept

    @property
    def oracle(self) -> bool:
        """Whether test data chose something of the defense."""
        return self.summary.get("selection") == "oracle"

    @property
    def attack_path(self) -> Path:
        return self.path if self.defense == NONE else self.path.parents[1]

    @property
    def acc_lost(self) -> float | None:
        """Points of ACC that the defense cost; None without a defense."""
        after, before = self.figures.get("acc"), self.figures.get("before_acc")
        return None if after is None or before is None else before - after


@dataclass(frozen=True)
class MeanStd:
    """Values of one figure over seeds, or over attacks; at least one."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation with n - 1; 0 for one value."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    @property
    def half_interval(self) -> float | None:
        """Half of the 95 % interval of the mean by Student's t; None for fewer than three values."""
        from scipy.special import stdtrit

        n = len(self.values)
        return None if n < 3 else float(stdtrit(n - 1, 0.975)) * self.std / math.sqrt(n)

    def text(self, digits: int = 2, interval: bool = False, sign: str = "") -> str:
        """`mean±std` or `mean±half_interval`, which no table breaks; one or two values are listed."""
        if len(self.values) < 3:
            return ", ".join(f"{value:{sign}.{digits}f}" for value in self.values)
        return f"{self.mean:{sign}.{digits}f}±{self.half_interval if interval else self.std:.{digits}f}"


def mean_std(values: Sequence[float | None]) -> MeanStd | None:
    """MeanStd of the values; None if there are none or one is None."""
    known = tuple(value for value in values if value is not None)
    return MeanStd(known) if known and len(known) == len(values) else None


def shown(value: float | MeanStd | None, digits: int = 2) -> str:
    """A figure as tables have it: a dash if there is none."""
    return "-" if value is None else value.text(digits) if isinstance(value, MeanStd) else f"{value:.{digits}f}"


def find_results(root: Path) -> tuple[list[Result], list[str]]:
    """All results below a folder, at any depth, and the folders that do not count, each with the reason; hidden ones
    and links are skipped. `root` may also be a JSONL file of summaries, as a grid publishes them; the paths are then
    those of folders beside it, which need not exist. RecordError if `root` does not exist or holds no result."""
    if root.is_file():
        base, kept = root.with_suffix(""), load(root)
        folders = [base / cell for cell in kept]
    elif root.is_dir():
        base, kept = root.absolute(), {}
        folders = [file.parent for name in (CONFIG, MANIFEST) for file in base.rglob(name)]
        base = base.parent if base in folders else base
    else:
        raise RecordError(f"there is no folder {root}; name the folder that holds the result folders, like ./record")
    found, left_out = dict[Path, Result](), list[str]()
    for folder in sorted(set(folders)):  # attacks before their defenses
        name = str(folder.relative_to(base))
        if any(part.startswith(".") for part in Path(name).parts):
            continue
        attack = None
        if folder.parent.name == "defense":  # of an attack by BackdoorBench only the folder's name is known
            path = folder.parents[1]
            named, amount, seed = parse_name(path.name)
            known = {"pratio": amount} if amount is not None else None
            attack = found.get(path) or Result(path, named, NONE, seed, attack_settings=known)
        try:
            found[folder] = _read(folder, name, attack, kept.get(name))
        except RecordError as error:
            reason = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
            left_out.append(f"{name}: {reason}")
    if not found:
        why = f" ({'; '.join(left_out)[:300]})" if left_out else ""
        raise RecordError(f"{root} holds no finished results of attacks{why}; name another folder")
    return list(found.values()), left_out


def _read(folder: Path, name: str, attack: Result | None, summary: dict[str, Any] | None) -> Result:
    """One folder, of a defense of `attack` if there is one; `summary` is given where it is all that was kept. What a
    configuration does not say the names of folders do. RecordError if the folder does not count."""
    config: dict[str, Any] = {}
    if summary is None:
        record = Record(folder)
        config = record.check(light=True)
        if run_kind(config) == OWN:
            raise RecordError("a purified network of your own, which has a page of its own: sau report FOLDER")
        if attack is None and "defense" in config["identity"]:
            raise RecordError("a defense without its attack; name the folder of the attack or one above it")
        if attack and attack.config.get("digest") not in (None, config.get("attacked")):
            raise RecordError("it purified another attack than the one that is here now")
        summary = record.summary()
    gated, data = gate(summary, folder), config.get("data") or {}
    identity, run, named = config.get("identity", {}), config.get("run") or {}, parse_name(folder.name)
    settings = {str(key): value for key, value in identity.items() if key not in SEED_KEYS}
    if settings:
        settings |= {"amp": config.get("amp"), **({key: run.get(key) for key in ("ratio", "index")} if attack else {})}
    elif named.amount is not None:
        settings = {"ratio" if attack else "pratio": named.amount}
    defense = named.method if named.seed is None else folder.name  # a defense's folder says no seed
    return Result(
        path=folder, name=name, config=config, summary=summary, figures=_figures(summary, bool(attack)),
        attack=attack.attack if attack else str(identity.get("attack", named.method)),
        defense=str(identity.get("defense", defense)) if attack else NONE,
        seed=identity.get("random_seed", attack.seed if attack else named.seed),
        dataset=attack and attack.dataset or data.get("dataset"),
        attack_settings=attack.attack_settings if attack else settings or None,
        settings=settings or None if attack else None,
        missed_gate=float(gated["asr"]) if gated and not gated["passed"] else None,
    )  # fmt: skip


def _figures(summary: dict[str, Any], defense: bool) -> dict[str, float | None]:
    """The figures of a summary; RecordError if one is missing or out of range."""
    after, before = (summary.get("after"), summary.get("before")) if defense else (summary, {})
    if not isinstance(after, dict) or not isinstance(before, dict) or (defense and "acc" not in before):
        raise RecordError(f"{SUMMARY} lacks the scores before or after; run the defense again")
    found = {name: after.get(name) for name in BEFORE} | {name: summary.get(name) for name in ("der", *COST)}
    found |= {f"before_{name}": before.get(name) for name in BEFORE}
    for name, value in found.items():
        most = MOST if name in COST else 100
        if value is not None and not (is_number(value) and 0 <= value <= most):
            raise RecordError(f"{SUMMARY}: {name} is {str(value)[:40]!r}, allowed is a number from 0 to {most}")
    if found["acc"] is None:
        raise RecordError(f"{SUMMARY} has no acc; make the folder again")
    return {name: None if value is None else float(value) for name, value in found.items()}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl` in a checked folder, of a method with several stages those of its last one;
    RecordError for a line that is no row."""
    lines = read(folder / METRICS).splitlines() if (folder / METRICS).is_file() else []
    try:
        rows = [{key: float(value) for key, value in json.loads(line).items() if is_number(value)} for line in lines]
        if not all("epoch" in row for row in rows):
            raise ValueError("a row has no epoch")
    except MALFORMED as error:
        raise RecordError(f"{folder / METRICS} is damaged: {error}") from None
    return [row for row in rows if row.get("stage") == rows[-1].get("stage")]


def marked(name: str, selection: str | None) -> str:
    """The name of a defense, marked where test data chose something of it: `selection` is a summary's."""
    return f"{name} (oracle)" if selection == "oracle" else name
