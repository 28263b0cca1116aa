"""Result folders, whatever their state, as runs: what was measured, how far it can be trusted, and what is wrong."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sau.errors import RecordError
from sau.grid.names import attack_named, defense_named
from sau.record import schema
from sau.record.folder import CONFIG, MANIFEST, SUMMARY, Record
from sau.record.summaries import load
from sau.report import parse
from sau.report.trouble import given_up, progress

VERIFIED, UNVERIFIED, UNFINISHED, DAMAGED, DUPLICATE = (
    "verified", "unverified", "unfinished", "damaged", "duplicate"
)  # fmt: skip
NONE = "none"  # the defense of a network that was not defended
# Differ between seeds by their nature; all else in an identity has to be equal for runs to be averaged.
OF_A_SEED = {"random_seed", "clean", "attacked"}


@dataclass(frozen=True)
class Run:
    """One result folder.

    Args:
        path: the folder.
        attack: name of the attack.
        defense: name of the defense, or `none` for the attacked network itself.
        seed: its random seed; None if the folder does not say.
        dataset: name of the data set; None if the folder does not say.
        status: `verified` (the files that are read here equal the manifest, weights and pictures have its sizes),
            `unverified` (a summary alone), `unfinished`, `damaged`, or `duplicate` of another folder.
        reason: what is wrong; empty if nothing is.
        figures: acc, asr, racc, der (percent), seconds, peak_memory_mb, and acc, asr, racc before the defense as
            before_acc and so on; None where not measured.
        summary: `summary.json`; empty unless the status is verified or unverified.
        config: `config.yaml`; empty if there is none that can be read.
        attack_settings: what determines the attack except its seed; None if nobody says.
        settings: the same for the defense; of `none` it is empty.
        name: the folder below the root, like badnet_s0/defense/sau.
    """

    path: Path
    attack: str
    defense: str
    seed: int | None
    dataset: str | None
    status: str
    reason: str = ""
    figures: dict[str, float | None] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    attack_settings: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    name: str = ""

    @property
    def usable(self) -> bool:
        """Whether its figures count."""
        return self.status in (VERIFIED, UNVERIFIED)

    @property
    def home(self) -> Path:
        """The folder of the attack."""
        return self.path if self.defense == NONE else self.path.parents[1]

    @property
    def above(self) -> str:
        """The folder below the root that the attack's folder lies in; empty for one right below the root."""
        return "/".join(self.name.split("/")[: -1 if self.defense == NONE else -3])

    @property
    def machine(self) -> dict[str, Any]:
        """What the machine adds to what determines the result, as far as the folder says it."""
        said = {**self.config, "device": parse.mapping(self.config.get("run")).get("device")}
        return {name: said[name] for name in ("amp", "device", "threads") if said.get(name) is not None}

    @property
    def gate(self) -> float | None:
        """The ASR in percent that the attack had to reach and did not; None if it did, or no gate is recorded."""
        gate = schema.gate(self.summary, self.path)
        return None if gate is None or gate["passed"] else float(gate["asr"])

    @property
    def lost(self) -> float | None:
        """Points of ACC that the defense cost; None without one."""
        after, before = self.figures.get("acc"), self.figures.get("before_acc")
        return None if after is None or before is None else before - after

    @property
    def digest(self) -> str | None:
        """SHA-256 of what determines the result; None if the folder does not say."""
        return str(self.config["digest"]) if "digest" in self.config else None


def read(root: Path) -> tuple[list[Run], list[str]]:
    """The runs in `root` and at any depth below it: attack folders, and the `defense/NAME` in them. Also the names of
    folders that are left out, with the reason where there is one. Hidden folders, and links below the first level, are
    not looked into.

    `root` may also be a file of summaries, as a grid publishes them.

    Raises RecordError if `root` is neither or holds no result at all.
    """
    if root.is_file():
        return list(_once(list(_of_file(root)))), []
    if not root.is_dir():
        raise RecordError(f"there is no folder {root}; name the one that holds the result folders, like ./record")
    base = root.absolute().parent if _is_result(root) else root
    failed: dict[str, str] = {}  # by folder: why a grid gave it up
    runs, others = _search(base / root.name if base != root else root, base, failed)
    runs = [replace(run, name=str(run.path.relative_to(base))) for run in runs]
    runs = [_with(failed.pop(run.name, ""), run) for run in runs]
    others = {name: why for name, why in others.items() if name != "." and name not in failed} | failed
    left_out = [f"{name} ({why})" if why else name for name, why in others.items()]
    if not runs:
        there = f", but {', '.join(left_out)[:200]}" if left_out else ""
        raise RecordError(f"{root} holds no results of attacks (NAME/{CONFIG} or NAME/{SUMMARY}){there}; name another")
    return list(_once(runs)), left_out


def _search(folder: Path, base: Path, failed: dict[str, str]) -> tuple[list[Run], dict[str, str]]:
    """The runs of one attack if the folder holds them, else those of the folders in it; and what was left out, and why.

    Args:
        folder: where to look.
        base: folder that names are relative to.
        failed: gets what a grid whose folder this is gave up.
    """
    name = str(folder.relative_to(base))
    try:
        runs = list(_below(folder))
        inside = [] if runs else sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    except OSError as error:
        return [], {name: f"cannot be read: {error.strerror}"}
    if runs and schema.kind(runs[0].config) == schema.OWN:
        return [], {name: "a purified network of your own, whose trigger nobody knows"}
    if runs and "defense" in parse.mapping(runs[0].config.get("identity")) and runs[0].defense == NONE:
        return [], {name: "a defense without its attack; name the folder of the attack or one above it"}
    failed |= {str((folder / cell).relative_to(base)): why for cell, why in given_up(folder).items()}
    others: dict[str, str] = {}
    for path in inside:
        if folder == base or not path.is_symlink():
            found, left = _search(path, base, failed)
            runs += found
            others |= left
    if runs or any(others.values()):
        return runs, others
    return [], {name: ""} if folder != base else others


def _with(why: str, run: Run) -> Run:
    """An unfinished run with what its grid says of it; one that is finished was tried again."""
    return replace(run, reason=f"{run.reason}; {why}") if why and run.status == UNFINISHED else run


def _of_file(file: Path) -> Iterator[Run]:
    """The runs of a file of summaries; their paths are those of folders beside it, which need not be there."""
    summaries = load(file)
    if not summaries:
        raise RecordError(f"{file} holds no summaries; name another")
    attacks: dict[str, Run] = {}
    for cell in sorted(summaries, key=lambda cell: cell.split("/")):
        folder, summary = file.with_suffix("") / cell, summaries[cell]
        attack, _, defense = cell.partition("/defense/")
        if not defense:
            run = attacks[cell] = _run(folder, None, summary)
        else:
            run = _run(folder, attacks.get(attack) or _unknown(file.with_suffix("") / attack), summary)
        yield replace(run, name=cell)


def _below(folder: Path) -> Iterator[Run]:
    """The attack of a folder, if it holds one, and its defenses."""
    attack = _run(folder, None) if _is_result(folder) else None
    if attack is not None:
        yield attack
    # A folder of BackdoorBench has no configuration of ours; what defends it does.
    parent = attack or _unknown(folder)
    for below in sorted(path for path in folder.glob("defense/*") if path.is_dir()):
        if _is_result(below):
            run = _run(below, parent)
            if run.usable and schema.belongs_to_other_attack(run.config, parent.digest):
                run = replace(run, status=DAMAGED, reason="it purified another attack than the one that is here now")
            yield run


def _unknown(folder: Path) -> Run:
    """An attack of which the name of its folder is all that is known."""
    name, seed, settings = attack_named(folder.name)
    return Run(folder, name, NONE, seed, None, UNVERIFIED, attack_settings=settings)


def _is_result(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, SUMMARY, MANIFEST))


def _run(folder: Path, parent: Run | None, kept: dict[str, Any] | None = None) -> Run:
    """A folder as a run; `kept` is its summary where that is all that there is."""
    record = Record(folder)
    status, reason = VERIFIED, ""
    summary: dict[str, Any] = {}
    figures: dict[str, float | None] = {}
    alone = kept is not None or not ((folder / CONFIG).is_file() or (folder / MANIFEST).is_file())
    try:
        if alone:
            status, reason = UNVERIFIED, f"{SUMMARY} alone: nothing to check it by"
        else:
            record.check(light=True)
        summary = parse.json_object(folder / SUMMARY) if kept is None else kept
        figures = parse.figures(summary, defense=parent is not None)
        schema.gate(summary, folder)
    except (RecordError, OSError, RecursionError) as error:
        finished = alone or record.finished
        status = DAMAGED if finished or not record.config else UNFINISHED
        reason, summary = _brief(error, folder), {}
        reason += "" if finished else progress(folder)
    said = _said(record.config, folder, parent)
    if alone and said["settings"] is not None and "selection" in summary:
        said["settings"] = {**said["settings"], "select": summary["selection"]}  # names do not say who chose
    said |= {"summary": summary, "config": record.config}
    return Run(folder, **said, status=status, reason=reason, figures=figures)


def _said(config: dict[str, Any], folder: Path, parent: Run | None) -> dict[str, Any]:
    """Who ran: from the configuration where there is one, else from the names of the folders."""
    identity = parse.mapping(config.get("identity"))
    own = {str(key): value for key, value in identity.items() if key not in OF_A_SEED} if identity else None
    dataset = parse.mapping(config.get("data")).get("dataset")
    seed = identity.get("random_seed")
    said: dict[str, Any] = {"dataset": str(dataset) if dataset else None, "seed": seed if parse.whole(seed) else None}
    if parent is None:
        name, numbered, named = attack_named(folder.name)
        said["seed"] = numbered if said["seed"] is None else said["seed"]
        settings: dict[str, Any] | None = {} if identity else None
        return {**said, "attack": str(identity.get("attack", name)), "defense": NONE, "settings": settings,
                "attack_settings": named if own is None else own}  # fmt: skip
    name, named = defense_named(folder.name)
    if own is not None:
        own |= parse.clean_set(config)
    return {
        "attack": parent.attack, "attack_settings": parent.attack_settings,
        "defense": str(identity.get("defense", name)), "settings": named if own is None else own,
        "dataset": parent.dataset or said["dataset"], "seed": parent.seed if said["seed"] is None else said["seed"],
    }  # fmt: skip


def _once(runs: list[Run]) -> Iterator[Run]:
    """A copy of a run under another name is no second seed; one whose own attack is gone is the copy."""
    attacks = {run.path: run for run in runs if run.defense == NONE}

    def same(run: Run) -> tuple[str, ...] | None:
        machines = str(run.machine), str(attacks.get(run.home, run).machine)  # a digest knows of none
        return (run.digest, *machines) if run.usable and run.digest else None

    first: dict[tuple[str, ...] | None, Run] = {}
    for run in sorted(runs, key=lambda run: run.home not in attacks):
        first.setdefault(same(run), run)
    for run in runs:
        if (key := same(run)) is not None and first[key] is not run:
            why = f"the same run as {first[key].name} (equal digests); counted once"
            run = replace(run, status=DUPLICATE, reason=why)
        yield run


def _brief(error: Exception, folder: Path) -> str:
    """Without the path of the folder, which stands beside it."""
    return " ".join(str(error).replace(f"{folder}/", "").replace(str(folder), "it").split())
