"""Read result folders: what was measured, and what is wrong with a folder that does not count."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sau.errors import RecordError
from sau.files import MOST, is_number, parse_json, read
from sau.grid.store import attack_named, defense_named
from sau.record.folder import CONFIG, MANIFEST, METRICS, OWN, SUMMARY, Record, run_kind
from sau.record.summaries import gate, load

UNVERIFIED = f"{SUMMARY} alone: nothing to check it by"
NONE = "none"  # the "defense" of the attacked network itself
PERCENT = ("acc", "asr", "racc", "der")
COST = ("seconds", "peak_memory_mb")
SEED_KEYS = {"random_seed", "clean", "attacked"}  # differ between seeds; all other settings must be equal


@dataclass(frozen=True)
class Result:
    """One finished result folder.

    Args:
        path: the folder.
        attack: name of the attack.
        defense: name of the defense, or `none` for the attacked network.
        seed: random seed; None if unknown.
        dataset: name of the data set; None if unknown.
        figures: acc, asr, racc, der in percent, seconds, peak_memory_mb, and before_acc, before_asr, before_racc of
            the network before the defense; None where not measured.
        summary: `summary.json`.
        config: `config.yaml`; empty if a summary alone was kept, which nothing verifies.
        attack_settings: settings of the attack without its seed; None if unknown.
        settings: the same for the defense; None for `none`.
        name: the folder below the root, like badnet_s0/defense/sau.
    """

    path: Path
    attack: str
    defense: str
    seed: int | None
    dataset: str | None
    figures: dict[str, float | None] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attack_settings: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    name: str = ""

    @property
    def oracle(self) -> bool:
        """Whether test data chose something of the defense."""
        return self.summary.get("selection") == "oracle"

    @property
    def attack_path(self) -> Path:
        """The folder of the attack."""
        return self.path if self.defense == NONE else self.path.parents[1]

    @property
    def missed_gate(self) -> float | None:
        """The ASR in percent that the attack had to reach and did not; None if it did or no gate is recorded."""
        found = gate(self.summary, self.path)
        return None if found is None or found["passed"] else float(found["asr"])

    @property
    def acc_lost(self) -> float | None:
        """Points of ACC that the defense cost; None without a defense."""
        after, before = self.figures.get("acc"), self.figures.get("before_acc")
        return None if after is None or before is None else before - after


def find_results(root: Path) -> tuple[list[Result], list[str]]:
    """All results below a folder, at any depth, and the folders that do not count, each with the reason.

    Hidden folders and links are skipped. `root` may also be a JSONL file of summaries, as a grid publishes them; the
    paths are then those of folders beside it, which need not exist.

    Raises RecordError if `root` does not exist or holds no result.
    """
    if root.is_file():
        base = root.with_suffix("")
        entries: dict[Path, dict[str, Any] | None] = {base / cell: summary for cell, summary in load(root).items()}
    elif root.is_dir():
        root = root.absolute()
        entries = {file.parent: None for name in (CONFIG, MANIFEST) for file in root.rglob(name)}
        base = root.parent if root in entries else root
    else:
        raise RecordError(f"there is no folder {root}; name the folder that holds the result folders, like ./record")
    found, left_out = dict[Path, Result](), list[str]()
    for folder in sorted(entries):  # attacks before their defenses
        name = str(folder.relative_to(base))
        attack = folder.parents[1] if folder.parent.name == "defense" else None
        try:
            if not any(part.startswith(".") for part in Path(name).parts):
                parent = (found.get(attack) or _from_name(attack)) if attack else None
                found[folder] = replace(_read(folder, parent, entries[folder]), name=name)
        except RecordError as error:
            reason = str(error).replace(f"{folder}/", "").replace(str(folder), "it")
            left_out.append(f"{name}: {reason}")
    if not found:
        why = f" ({'; '.join(left_out)[:300]})" if left_out else ""
        raise RecordError(f"{root} holds no finished results of attacks{why}; name another folder")
    return list(found.values()), left_out


def _from_name(folder: Path) -> Result:
    """An attack of which only the folder's name is known, as of one by BackdoorBench."""
    name, seed, settings = attack_named(folder.name)
    return Result(folder, name, NONE, seed, None, attack_settings=settings)


def _read(folder: Path, parent: Result | None, summary: dict[str, Any] | None) -> Result:
    """One folder; `summary` is given where it is all that was kept. RecordError if the folder does not count."""
    record = Record(folder)
    if summary is None:
        record.check(light=True)
        _check_kind(record.config, parent)
        summary = record.summary()
    figures = _figures(summary, defense=parent is not None)
    gate(summary, folder)
    who = _who(record.config, folder, parent)
    if not record.config and who["settings"] is not None and "selection" in summary:
        who["settings"] = {**who["settings"], "select": summary["selection"]}
    return Result(folder, **who, figures=figures, summary=summary, config=record.config)


def _check_kind(config: dict[str, Any], parent: Result | None) -> None:
    if run_kind(config) == OWN:
        raise RecordError("a purified network of your own, whose trigger is unknown")
    if parent is None and "defense" in config["identity"]:
        raise RecordError("a defense without its attack; name the folder of the attack or one above it")
    attack = parent.config.get("digest") if parent is not None else None
    if attack is not None and config and config.get("attacked") != attack:
        raise RecordError("it purified another attack than the one that is here now")


def _who(config: dict[str, Any], folder: Path, parent: Result | None) -> dict[str, Any]:
    """Names, seed and settings: from the configuration if there is one, else from the names of the folders."""
    identity, run = config.get("identity", {}), config.get("run") or {}
    settings = {str(key): value for key, value in identity.items() if key not in SEED_KEYS}
    seed, dataset = identity.get("random_seed"), (config.get("data") or {}).get("dataset")
    seed, dataset = seed if type(seed) is int else None, str(dataset) if dataset else None
    amp = {"amp": config["amp"]} if settings and config.get("amp") is not None else {}
    if parent is None:
        name, named_seed, named = attack_named(folder.name)
        return {"attack": str(identity.get("attack", name)), "defense": NONE, "dataset": dataset,
                "seed": named_seed if seed is None else seed,
                "attack_settings": {**settings, **amp} or named, "settings": None}  # fmt: skip
    name, named = defense_named(folder.name)
    if settings:  # the clean set: a share, or a file that lists the images
        settings |= {"ratio": run.get("ratio")} if run.get("index") is None else {"index": str(run["index"])}
        settings |= {} if amp.items() <= (parent.attack_settings or amp).items() else amp
    return {"attack": parent.attack, "attack_settings": parent.attack_settings,
            "defense": str(identity.get("defense", name)), "settings": settings or named,
            "dataset": parent.dataset or dataset, "seed": parent.seed if seed is None else seed}  # fmt: skip


def _figures(summary: dict[str, Any], defense: bool) -> dict[str, float | None]:
    """The figures of a summary; RecordError if one is missing or out of range."""
    after, before = (summary.get("after"), summary.get("before")) if defense else (summary, {})
    if not isinstance(after, dict) or not isinstance(before, dict) or (defense and "acc" not in before):
        raise RecordError(f"{SUMMARY} lacks the scores before or after; run the defense again")
    found = {"acc": after.get("acc"), "asr": after.get("asr"), "racc": after.get("racc"), "der": summary.get("der")}
    found |= {name: summary.get(name) for name in COST}
    found |= {f"before_{name}": before.get(name) for name in ("acc", "asr", "racc")}
    for name, value in found.items():
        most = MOST if name in COST else 100
        if value is not None and not (is_number(value) and 0 <= value <= most):
            raise RecordError(f"{SUMMARY}: {name} is {str(value)[:40]!r}, allowed is a number from 0 to {most}")
    if found["acc"] is None:
        raise RecordError(f"{SUMMARY} has no acc; make the folder again")
    return {name: None if value is None else float(value) for name, value in found.items()}


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`, of a method with several stages those of its last one.

    Reading stops at the first line that is no row, which a killed run may leave.
    """
    rows: list[dict[str, float]] = []
    lines = read(folder / METRICS).decode(errors="replace").splitlines() if (folder / METRICS).is_file() else []
    for line in lines:
        try:
            row = {str(key): float(value) for key, value in parse_json(line).items() if is_number(value)}
        except (ValueError, AttributeError):
            break
        if "epoch" not in row:
            break
        rows.append(row)
    last = max((row.get("stage", 0.0) for row in rows), default=0.0)
    return [row for row in rows if row.get("stage", 0.0) == last]
