"""An audit as tasks whose rows are kept as they are finished, and put together in the end.

A row has `part`, `curve`, `network`, `x`, `seed`, and shares of images. `x` is what the attacker spent: poisoned images
(relearn), the radius eps (white); or the share of the way from the attacked weights (path).
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

import sau
from sau.audit import measure
from sau.audit.config import CONTROL, NONE, PARTS, AuditConfig, Case, Network
from sau.audit.relearn import mixture, relearn
from sau.data.images import Images, to_float
from sau.data.sources import fingerprint
from sau.errors import ConfigError, RecordError
from sau.evaluate import asr_and_racc, figures, score
from sau.files import acquire, parse_json, read_json, release, write
from sau.files import read as read_bytes
from sau.record.folder import as_json, digest
from sau.types import Pixels
from sau.util import generator

RELEASED, FRESH = "released", "fresh"  # re-learning: augmented once, or every batch anew
BETWEEN, ANEW = "statistics between", "statistics anew"  # the path: of batch norm
TRIGGER, ALONE, NOISE = "trigger + D", "D alone", "trigger + noise"  # what a perturbation is added to
TASKS, RESULT = "tasks", "audit.json"
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task:
    """A minute or less of an audit's work, on a processor for a small network.

    Args:
        part: that it belongs to.
        about: what it does, for the screen.
        identity: what determines its rows.
        work: makes them.
    """

    part: str
    about: str
    identity: dict[str, Any]
    work: Callable[[], list[Row]]

    @property
    def file(self) -> str:
        """Where its rows are kept: the same name for the same identity alone."""
        return f"{self.part}_{digest(self.identity)[:16]}.json"


class Audit:
    """The tasks of an audit. ConfigError for more shots than there are images, and for BEC without a control."""

    def __init__(self, case: Case, config: AuditConfig) -> None:
        if "bec" in config.parts and CONTROL not in case.networks:
            raise ConfigError("bec needs a network without a backdoor; give --control, or leave bec out of --parts")
        if "relearn" in config.parts:
            mixture(case.train, case.poisons, max(config.shots), share=config.share, seed=0)
        self.case, self.config, self.attacked = case, config, case.networks[NONE]
        self.seen = {name: fingerprint(getattr(case, name)) for name in ("triggered", "test", "poisons")}
        self.reached = [net for net in case.purified if measure.connected(self.attacked.model, net.model)]
        cut = [net.name for net in case.purified if net not in self.reached and "path" in config.parts]
        self.notes = [*case.notes, *(f"no path leads to {name}, which has other layers" for name in cut)]

    def tasks(self) -> list[Task]:
        """All of them, part by part."""
        parts = ["before", *(part for part in PARTS if part in self.config.parts)]
        return [task for part in parts for task in getattr(self, f"_{part}")()]

    def _task(
        self, part: str, about: str, networks: Sequence[Network], work: Callable[[], list[Row]], **settings: Any
    ) -> Task:
        who = {network.name: [network.digest, network.model.amp] for network in networks}
        known = {"attack": self.case.digest, **self.seen, "sau": sau.__version__}
        return Task(part, about, as_json({**known, "part": part, "networks": who, **settings}), work)

    def _before(self) -> Iterator[Task]:
        for network in self.case.networks.values():
            yield self._task("before", network.name, [network], partial(self.measure_before, network))

    def _relearn(self) -> Iterator[Task]:
        settings = {"epochs": self.config.epochs, "share": self.config.share}
        shots, networks = sorted({0, *self.config.shots}), self.case.networks.values()
        for network, curve, seed, k in product(networks, (RELEASED, FRESH), self.config.seeds, shots):
            work = partial(self.measure_relearning, network, curve, seed, k)
            about = f"{network.name}, {curve}, {k} poisons, seed {seed}"
            yield self._task("relearn", about, [network], work, curve=curve, seed=seed, shots=k, **settings)

    def _path(self) -> Iterator[Task]:
        for network, curve in product(self.reached, (BETWEEN, ANEW)):
            work, about = partial(self.measure_path, network, curve), f"{network.name}, {curve}"
            both, settings = [self.attacked, network], {"share": self.config.share, "steps": measure.STEPS}
            yield self._task("path", about, both, work, curve=curve, **settings)

    def _white(self) -> Iterator[Task]:
        controls = [network for network in self.case.networks.values() if network.control]
        for network, curve, seed in product(self.case.networks.values(), (TRIGGER, ALONE), self.config.seeds):
            others = [] if network.control or curve == ALONE else controls
            work = partial(self.measure_white_box, network, others, curve, seed)
            about = f"{network.name}, {curve}, seed {seed}"
            search = {name: getattr(self.config, name) for name in ("eps", "steps", "pictures")}
            yield self._task("white", about, [network, *others], work, curve=curve, seed=seed, **search)

    def _bec(self) -> Iterator[Task]:
        for network in self.case.networks.values():
            work = partial(self.measure_similarity, network)
            yield self._task("bec", network.name, [self.attacked, network], work)

    def measure_before(self, network: Network) -> list[Row]:
        """ACC, ASR and R-ACC of a network as it is."""
        found = score(network.model, self.case.test, self.case.triggered).summary()
        return [{"part": "before", "curve": "", "network": network.name, "x": 0, "seed": 0, **found}]

    def measure_relearning(self, network: Network, curve: str, seed: int, shots: int) -> list[Row]:
        """The same after RA with so many poisons."""
        case, config = self.case, self.config
        first, later = (None, case.augment) if curve == FRESH else (case.augment, None)
        images = mixture(case.train, case.poisons, shots, share=config.share, seed=seed, augment=first)
        again = relearn(network.model, images, epochs=config.epochs, seed=seed, augment=later)
        found = score(again, case.test, case.triggered).summary()
        return [{"part": "relearn", "curve": curve, "network": network.name, "x": shots, "seed": seed, **found}]

    def measure_path(self, network: Network, curve: str) -> list[Row]:
        """The same along the path from the attacked network to a purified one."""
        case, rows = self.case, []
        images = mixture(case.train, case.poisons, 0, share=self.config.share, seed=0)
        for s in measure.STEPS:
            model = measure.interpolate(self.attacked.model, network.model, s)
            model = measure.reestimate_statistics(model, images, case.augment) if curve == ANEW else model
            found = score(model, case.test, case.triggered).summary()
            rows.append({"part": "path", "curve": curve, "network": network.name, "x": s, "seed": 0, **found})
        return rows

    def measure_white_box(self, network: Network, controls: Sequence[Network], curve: str, seed: int) -> list[Row]:
        """D fitted to the network itself, on triggered images or on clean ones alone.

        With the trigger also: noise of the same size, and the same D on the controls.
        """
        config, fitted, shown = self.config, self._poisons(seed), self.case.triggered
        if curve == ALONE:
            fitted = _relabel(self.case.train[fitted.index], fitted)
            shown = _relabel(self.case.untriggered, shown)
        rows = [self._row("white", curve, network, 0.0, seed, shown)]
        for eps, delta in measure.universal(network.model, fitted, config.eps, steps=config.steps, seed=seed):
            pixels = measure.shifted(shown, delta)
            if curve == TRIGGER:
                random = measure.shifted(shown, measure.noise(shown, eps, generator(seed)))
                rows.append(self._row("white", NOISE, network, eps, seed, shown, random))
            for other in controls:
                row = self._row("white", f"same D on {other.name}", other, eps, seed, shown, pixels)
                rows.append({**row, "network": network.name})
            rows.append(self._row("white", curve, network, eps, seed, shown, pixels))
        return rows

    def measure_similarity(self, network: Network) -> list[Row]:
        """How alike the network's reaction to the trigger is to the attacked one's: `s`, the mean of `layers`."""
        layers = measure.similarity(self.attacked.model, network.model, self.case.triggered, self._channels)
        row = {"part": "bec", "curve": "", "network": network.name, "x": 0, "seed": 0}
        return [{**row, "s": sum(layers.values()) / len(layers), "layers": layers}]

    @cached_property
    def _channels(self) -> measure.Channels:
        return measure.top_tac_channels(self.attacked.model, self.case.untriggered, self.case.triggered)

    def _poisons(self, seed: int) -> Images:
        """Some triggered training images, the first of the same order whatever their number."""
        order = torch.randperm(len(self.case.poisons), generator=generator(seed))
        return self.case.poisons[order[: self.config.pictures]]

    def _row(
        self, part: str, curve: str, network: Network, x: float, seed: int, shown: Images, pixels: Pixels | None = None
    ) -> Row:
        """ASR and R-ACC on the images that are shown, or on these pixels in their place."""
        pixels = to_float(shown.pixels) if pixels is None else pixels
        asr, racc = asr_and_racc(network.model, pixels, shown.labels, shown.true_labels)
        found = figures({"asr": asr, "racc": racc})
        return {"part": part, "curve": curve, "network": network.name, "x": x, "seed": seed, **found}


def _relabel(clean: Images, target: Images) -> Images:
    """Clean images with the labels that the attacker wants for them."""
    return Images(clean.pixels, target.labels, target.true_labels, clean.role, clean.index, clean.num_classes)


def run_audit(case: Case, config: AuditConfig, out: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do the tasks that are not in `out` yet, and write `audit.json` from all of them, which is returned.

    The folder is this process's meanwhile (LockedError if another process uses it). What was interrupted goes on where
    it was: each finished task is a file.
    """
    acquire(out)
    try:
        return _run(Audit(case, config), out, say)
    finally:
        release(out)


def _run(audit: Audit, out: Path, say: Callable[[str], None]) -> dict[str, Any]:
    case, tasks, rows, seconds = audit.case, audit.tasks(), list[Row](), dict[str, float]()
    for note in audit.notes:
        say(f"note: {note}")
    for number, task in enumerate(tasks, 1):
        file = out / TASKS / task.file
        before = file.is_file()
        if not before:
            started = time.monotonic()
            made = {"identity": task.identity, "rows": task.work()}
            _write(file, {**made, "seconds": round(time.monotonic() - started, 2)})
        try:
            kept = read_json(file)
        except ValueError as error:
            raise RecordError(f"{file} is damaged ({error}); remove it") from None
        rows += kept["rows"]
        seconds[task.part] = round(seconds.get(task.part, 0.0) + kept["seconds"], 2)
        say(f"{number}/{len(tasks)}  {task.part}: {task.about}  {'as before' if before else _brief(kept)}")
    _add_bec(rows)
    asked = {**asdict(audit.config), "samples": [len(case.test), len(case.triggered)]}
    return _write(out / RESULT, {
        "record": case.name, "attack": case.attack.name if case.attack is not None else None,
        "networks": {name: network.digest for name, network in case.networks.items()}, "asked": as_json(asked),
        "seconds": seconds, "about": as_json({**case.about, "test": audit.seen["test"]}), "notes": audit.notes,
        "rows": rows,
    })  # fmt: skip


def _add_bec(rows: list[Row]) -> None:
    """Add BEC to the rows that have similarities, which means something only among all of them."""
    similarities = {row["network"]: row["s"] for row in rows if row["part"] == "bec"}
    if similarities:
        values = measure.bec(similarities, CONTROL)
        for row in (row for row in rows if row["part"] == "bec"):
            row["bec"] = values[row["network"]]


def _write(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    write(file, (json.dumps(content, indent=1) + "\n").encode())
    return content


def _brief(kept: dict[str, Any]) -> str:
    """The last figure of a task, and what it took."""
    last = kept["rows"][-1]
    figure = f"ASR {last['asr']:.1f} %" if "asr" in last else f"s {last['s']:.3f}"
    return f"{figure}  {kept['seconds']:.1f} s"


def read(place: Path) -> dict[str, Any]:
    """One audit: of its folder or record, or FILE.jsonl/NAME, the line of a file whose `name` this is.

    Raises OSError, or ValueError if there is none.
    """
    if place.parent.is_file():
        lines = [parse_json(line) for line in read_bytes(place.parent).decode().splitlines()]
        found = next((line for line in lines if isinstance(line, dict) and line.get("name") == place.name), {})
    else:
        found = read_json((place if (place / RESULT).is_file() else place / "audit") / RESULT)
    if not {"rows", "asked", "about", "networks"} <= found.keys():
        raise ValueError("it is no result of scripts/audit.py, or no line has the name")
    return found
