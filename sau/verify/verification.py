"""A result folder, looked at: its files, its settings, its data, and its figures measured again."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sau import quality
from sau.attack.recall import recall
from sau.data.images import Images
from sau.data.sources import fingerprint
from sau.errors import DataError, RecordError, SauError
from sau.evaluate import Score, Share, accuracy, score
from sau.record import schema, victim
from sau.record.folder import Record
from sau.verify import claims
from sau.verify.findings import Finding, Findings, State

ON_THE_WAY = "it was measured on the way, and is not measured again"


@dataclass
class Verification:
    """A record of an attack and its defenses, being looked at.

    Args:
        path: folder of the attack.
        dataset_path: folder of the data sets; None is where the attack had them.
        where: device to measure on.
        findings: what was looked at, in order.
    """

    path: Path
    dataset_path: str | None = None
    where: torch.device = field(default_factory=lambda: torch.device("cpu"))
    findings: Findings = field(default_factory=Findings)

    def run(self) -> "Verification":
        """Look at everything; RecordError if there is no such folder, or none that an attack of ours began."""
        record = Record(self.path)
        if not (self.path / "config.yaml").is_file():
            raise RecordError(f"{self.path} is no result folder of sau; name the folder of an attack")
        if not record.finished:
            self.findings.skip("files", "unfinished; repeat the command that made it to finish it")
            return self
        if not self.findings.look("files", lambda: claims.files(record)):
            return self
        kind = schema.kind(record.config)
        if kind == schema.DEFENSE:
            raise RecordError(f"{self.path} is the folder of a defense; name that of its attack")
        if kind == schema.OWN:
            why = "a purified network of your own, whose code and pictures are not here"
            self.findings.skip("figures", why)
            return self
        if not self.findings.look("contents", self._load):
            return self
        self.findings.look("settings", lambda: claims.settings(record.config))
        self.findings.look("versions", lambda: claims.versions(record.config))
        self._data()
        self.before: dict[bool, Score] = {}  # by precision, for a defense may have run in another
        amp = bool(record.config.get("amp"))
        if (found := self._measure("weights", record, amp)) is not None:
            self.before[amp] = found
            with self.findings.whole("summary"):
                self._compare("", record, record.summary(), found)
                self.findings.look("end", lambda: claims.early(record.config, record.summary()))
                self._trigger(record.config, record.summary())
        for folder in sorted(place for place in (self.path / "defense").glob("*") if place.is_dir()):
            with self.findings.whole(f"{folder.name}: record"):
                self._defense(Record(folder))
        return self

    def _load(self) -> str:
        self.attacked = victim.load(self.path)
        return f"{self.attacked.network['name']} attacked on {self.attacked.dataset}"

    def _data(self) -> None:
        """Training and test pictures, if they are here and are those that the attack saw."""
        self.data: tuple[Images, Images] | None = None
        place, name = self.dataset_path or self.attacked.dataset_path, self.attacked.dataset
        if name != "digits" and not Path(place).is_dir():  # digits come with scikit-learn
            why = f"there is no folder {place}; give --dataset_path"
            self.findings.skip("data", f"{why}; without it there is no ACC")
            return
        try:
            train, test, notes = self.attacked.pictures(self.dataset_path)
        except SauError as error:
            state: State = "not checked" if isinstance(error, DataError) else "broken"
            self.findings.append(Finding("data", state, str(error)))
            return
        self.data = train, test
        self.findings.append(Finding("data", "held", "; ".join([f"{name} as the attack saw it", *notes])))

    def _measure(self, what: str, record: Record, amp: bool) -> Score | None:
        """The scores of a record's stored weights; without the data set `acc` means nothing."""
        made, bad = self.attacked.network, self.attacked.triggered
        found: list[Score] = []

        def check() -> str:
            model = self.attacked.blank()
            victim.load_weights(model, record.path / "model.safetensors")
            model.amp = amp
            model = model.to(self.where).eval()
            clean = (self.data[1].to(self.where)) if self.data else _one(bad, made["shape"]).to(self.where)
            found.append(score(model, clean, bad.to(self.where) if bad else None))
            return f"of {made['name']}, finite, measured in {'bf16' if amp else 'fp32'} on {self.where}"

        self.findings.look(what, check)
        return found[0] if found else None

    def _compare(self, whose: str, record: Record, said: dict[str, Any], found: Score) -> None:
        """Recorded figures with those measured."""
        made_on = record.config.get("device", self.where.type)
        for name, share in found.shares().items():
            what = f"{whose}{name}"
            if name == "acc" and self.data is None:
                self.findings.skip(what, "without the data set there is no ACC")
            elif (share is None) != (said.get(name) is None):
                self.findings.append(Finding(what, "broken", f"{said.get(name)} there, {share} here"))
            elif share is not None:
                with self.findings.whole(what):
                    self.findings.append(self._equal(what, said, name, share, made_on))

    def _equal(self, what: str, said: dict[str, Any], name: str, share: Share, made_on: str) -> Finding:
        """A card and a CPU round otherwise, so that one cannot refute what is near to it on the other."""
        try:
            return Finding(what, "held", claims.equal(said, name, share))
        except claims.Otherwise as error:
            if not error.near or {made_on, self.where.type} != {"cpu", "cuda"}:
                raise
            return Finding(what, "not checked", f"{error}; made on {made_on}, measured on {self.where.type}")

    def _trigger(self, config: dict[str, Any], said: dict[str, Any]) -> None:
        """How well an attack's trigger hides, and what the network answers to those that must do nothing."""
        if self.data is None or "trigger" not in said:
            why = "the summary does not say" if self.data else "without the data set its pictures have no others beside"
            self.findings.skip("trigger", why)
        else:
            bad, radius = self.attacked.triggered, config["run"].get("trigger_radius", quality.RADIUS)
            found = quality.of_attack(self.data[1], bad, radius) if bad else None
            self.findings.look("trigger", lambda: claims.trigger(said, found))
        if "made" in (said.get("trigger") or {}):
            self.findings.skip("trigger as it was made", ON_THE_WAY)
        if "cross_acc" in said:
            self._crossed(config, said)

    def _crossed(self, config: dict[str, Any], said: dict[str, Any]) -> None:
        """The accuracy under triggers that must do nothing, if those can be made here as they were."""
        attack = recall(config["method"], self.attacked.trigger)
        made_on = config.get("device", self.where.type)
        if self.data is None or attack.trigger is None or made_on != self.where.type:
            where = "the data set" if self.data is None else f"what drew those triggers, on {made_on}"
            return self.findings.skip("cross_acc", f"without {where}")
        crossed = attack.crossed(self.data[1].to(self.where))
        model = self.attacked.model().to(self.where)
        model.amp = bool(config.get("amp"))
        with self.findings.whole("cross_acc"):
            if crossed is None:
                raise RecordError(f"{said['cross_acc']} there, but {attack.name} has no such triggers")
            share = accuracy(model, crossed.pixels, crossed.labels)
            self.findings.append(self._equal("cross_acc", said, "cross_acc", share, made_on))

    def _defense(self, record: Record) -> None:
        """One defense below the attack."""
        whose = f"{record.path.name}: "
        if not record.finished:
            self.findings.skip(f"{whose}files", "unfinished; repeat its command to finish it")
            return
        if not self.findings.look(f"{whose}files", lambda: claims.files(record)):
            return
        self.findings.look(f"{whose}settings", lambda: claims.settings(record.config))
        said, amp = record.summary(), bool(record.config.get("amp"))
        self.findings.look(f"{whose}attack", lambda: self._purified_this(record.config))
        if self.data is None:
            self.findings.skip(f"{whose}clean set", "without the data set")
        else:
            self.findings.look(f"{whose}clean set", lambda: self._clean_set(record.config, said.get("data", "clean")))
        if amp not in self.before and (found := self._measure(f"{whose}attack's weights", Record(self.path), amp)):
            self.before[amp] = found
        if amp in self.before:
            self._compare(f"{whose}before ", record, said["before"], self.before[amp])
        if (found := self._measure(f"{whose}weights", record, amp)) is not None:
            self._compare(f"{whose}after ", record, said["after"], found)
        self.findings.look(f"{whose}der", lambda: claims.der(said))
        self.findings.look(f"{whose}selection", lambda: claims.selection(record.config, said))
        self.findings.look(f"{whose}end", lambda: claims.early(record.config, said))
        for name in said.keys() & {"risk", "findings"}:
            self.findings.skip(f"{whose}{name}", ON_THE_WAY)

    def _purified_this(self, config: dict[str, Any]) -> str:
        if schema.of_another(config, self.attacked.digest):
            raise RecordError("it purified another attack than the one it lies in")
        return "it purified the attack that it lies in"

    def _clean_set(self, config: dict[str, Any], kind: str) -> str:
        assert self.data is not None
        train, index = self.attacked.given(self.data[0], kind), config["clean_index"]
        there = isinstance(index, list) and index and all(type(i) is int and 0 <= i < len(train) for i in index)
        if not there or fingerprint(train[torch.tensor(index)]) != config["identity"]["clean"]:
            raise RecordError("the pictures at clean_index are not those that it was given")
        return f"{len(index)} pictures as it was given them"


def _one(bad: Images | None, shape: list[int]) -> Images:
    """A picture to stand in for the clean test set where that is not here."""
    return (
        bad[torch.arange(1)]
        if bad
        else Images.clean(torch.zeros(1, *shape, dtype=torch.uint8), torch.zeros(1).long(), 2)
    )
