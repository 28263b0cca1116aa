"""The result folder of a run: files are written atomically, hashed, and checked before they are read.

`config.yaml` says what was run, `manifest.json`, written last, has SHA-256 and bytes of each file.
"""

import hashlib
import io
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from sau.errors import MALFORMED, NO_YAML, ConfigError, Finished, LockedError, RecordError, first_line
from sau.files import acquire, append, checksum, in_use, read, read_json, release, temp_files, write

CONFIG, METRICS, SUMMARY = "config.yaml", "metrics.jsonl", "summary.json"
MANIFEST, LOG, CHECKPOINT = "manifest.json", "log.txt", "checkpoint.bin"
SCHEMA = 2
EARLY = "ended_early"  # key of the identity and the summary of runs that --max_minutes ended
ATTACK, DEFENSE, OWN = "an attack", "a defense", "a network of your own"
Config = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU as files of tensors want them: contiguous, each in memory of its own."""
    how: dict[str, Any] = {"memory_format": torch.contiguous_format, "copy": True}
    return {name: tensor.detach().to("cpu", **how) for name, tensor in tensors.items()}


class Record:
    """The result folder `path`: `record/<name>`, or `record/<name>/defense/<method>`. While it is unfinished it is also
    the checkpoint of its run, which began when `time.monotonic` was `started`; None is now."""

    def __init__(self, path: Path, started: float | None = None) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.config: Config = {}
        self.started = time.monotonic() if started is None else started
        self.earlier: float | None = None  # seconds before the checkpoint that was loaded first

    @property
    def finished(self) -> bool:
        """Whether the run has ended; the manifest is written last."""
        return (self.path / MANIFEST).is_file()

    @property
    def seconds(self) -> float:
        """Seconds spent on the run, those before an interruption included."""
        return round((self.earlier or 0.0) + time.monotonic() - self.started, 2)

    def can_start(self, identity: dict[str, Any], overwrite: bool, amp: bool | None = None) -> bool:
        """Whether a run resumes here, with the choices in `config`, or starts anew (False); locks the folder.

        `identity` is what determines the result: once there is a checkpoint, only the same run resumes. `overwrite`
        discards what is there. Raises Finished if the same run has ended here, LockedError if another process uses the
        folder, RecordError if the run may neither start nor resume, ConfigError if it began in another precision."""
        acquire(self.path)
        if self.path.exists() and not self.path.is_dir():
            raise RecordError(f"{self.path} is a file; choose another name with --save_folder_name")
        self.config = {}
        if self._holds_only("defense"):
            return False
        old, identity = read_config(self.path / CONFIG), as_json(identity)
        if overwrite:
            for lock in (self.path / "defense").glob(".*.lock"):
                if in_use(defense := lock.with_name(lock.name[1:].removesuffix(".lock"))):
                    raise LockedError(f"{defense} is in use by another process; wait for it or stop it")
            return False
        same = {**old["identity"], EARLY: 0} == {**identity, EARLY: 0}  # an early end may be written already
        if same and amp is not None and old.get("amp", amp) != amp:
            raise ConfigError(f"amp is {amp}, but this run began with {old['amp']}; leave it out, or give --overwrite")
        if self.finished and same:
            self.check(light=True)
            early = f", ended early in {where}" if (where := old["identity"].get(EARLY)) else ""
            raise Finished(f"{self.path} is finished{early}; --overwrite repeats it")
        advice = "choose another --save_folder_name, or discard it by --overwrite"
        if self.finished:
            raise RecordError(f"{self.path} is finished; {advice}")
        if not same and not self._holds_only(CONFIG, LOG):  # it holds only these before its first epoch
            there = old["identity"]
            names = [name for name in sorted({**there, **identity}) if there.get(name) != identity.get(name)]
            other = "; ".join(f"{name}: {there.get(name)!r} there, {identity.get(name)!r} here" for name in names)
            what = f"{self.path} holds an unfinished run with other settings ({other})"
            raise RecordError(f"{what}; give the flags that it began with, {advice}")
        self.config = old if same else {}
        return same

    def begin(self, config: dict[str, Any], identity: dict[str, Any], overwrite: bool) -> None:
        """Start the folder or resume it, as `can_start` allows; `config` are flags and choices, for `config.yaml`."""
        resumes = self.can_start(identity, overwrite)
        if not resumes and not self._holds_only("defense"):  # which stays where somebody deleted its attack alone
            # The manifest goes first and the configuration last, so that a killed deletion is recognised.
            for entry in sorted(self.path.iterdir(), key=lambda entry: (entry.name == CONFIG, entry.name != MANIFEST)):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        for file in temp_files(self.path):
            file.unlink()
        if not (self.path / CHECKPOINT).is_file():
            (self.path / METRICS).unlink(missing_ok=True)
        self.update_config(schema=SCHEMA, digest=digest(identity), identity=identity, **config)

    def _holds_only(self, *names: str) -> bool:
        """Whether nothing else is there, except what a killed first write left."""
        entries = {*self.path.iterdir()} if self.path.exists() else set()
        return entries <= {*(self.path / name for name in names), *temp_files(self.path)}

    def update_config(self, **facts: Any) -> None:
        self.config.update(as_json(facts))
        write(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False).encode())

    def log(self, text: str) -> None:
        """Print a line and append it to `log.txt`."""
        print(text, flush=True)
        append(self.path / LOG, text + "\n")

    def log_metrics(self, **figures: Any) -> None:
        self.rows.append(figures)
        append(self.path / METRICS, json.dumps(figures) + "\n")

    def save(self, place: dict[str, Any]) -> None:
        """Write a checkpoint with the rows so far, its SHA-256 in front."""
        buffer = io.BytesIO()
        torch.save({**place, "rows": self.rows, "seconds": self.seconds}, buffer)
        content = buffer.getvalue()
        write(self.path / CHECKPOINT, hashlib.sha256(content).hexdigest().encode() + content)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None; rows that came after it are dropped, because their epochs run again."""
        file = self.path / CHECKPOINT
        if not file.is_file():
            self.earlier = self.earlier or 0.0
            return None
        raw = file.read_bytes()
        try:
            if hashlib.sha256(raw[64:]).hexdigest().encode() != raw[:64]:
                raise ValueError("SHA-256 differs")
            place: dict[str, Any] = torch.load(io.BytesIO(raw[64:]), weights_only=True, map_location="cpu")
            seconds, rows = float(place.pop("seconds")), place.pop("rows")
        except Exception as error:  # torch raises a dozen types on what it refuses
            reason = first_line(error)[:100]
            raise RecordError(f"{file} is damaged ({reason}); start again with --overwrite") from None
        if self.earlier is None:  # a later stage asks again, and its rows stand
            self.earlier, self.rows = seconds, rows
            write(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in rows).encode())
        return place

    def save_tensors(self, name: str, tensors: dict[str, Tensor], *, pickled: bool = False) -> None:
        """Write `<name>.safetensors`, or `<name>.pt`, a plain state dict for those who want one."""
        content = on_cpu(tensors)
        if pickled:
            torch.save(content, buffer := io.BytesIO())
            write(self.path / f"{name}.pt", buffer.getvalue())
        else:
            write(self.path / f"{name}.safetensors", safetensors.torch.save(content))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read `<name>.safetensors` of a finished folder; call `check` first."""
        file = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load(file.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise RecordError(f"cannot read {file}: {error}") from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and last the manifest, which closes the folder; drop the checkpoint and the lock."""
        write(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        files = [file for file in self._files() if file.name != CHECKPOINT]
        entries = {file.name: {"sha256": checksum(file), "bytes": file.stat().st_size} for file in files}
        write(self.path / MANIFEST, (json.dumps({"schema": SCHEMA, "files": entries}, indent=2) + "\n").encode())
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        release(self.path)

    def check(self, *, light: bool = False) -> Config:
        """The configuration of a finished folder, after every file was compared with the manifest; RecordError names
        the first that differs. `light`, for readers of many folders, compares of `*.safetensors` the sizes alone."""
        if not self.path.is_dir():
            raise RecordError(f"there is no folder {self.path}; name a result folder")
        self.config = read_config(self.path / CONFIG)
        if not self.finished:
            raise RecordError(f"{self.path} is unfinished; repeat the command that made it to resume it")
        file = self.path / MANIFEST
        try:
            entries = read_json(file)["files"]
            wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in entries.items()}
        except (OSError, *MALFORMED) as error:
            raise RecordError(f"{file} is damaged: {error}") from None
        used = {one.name for one in self._files() if one.suffix in (".safetensors", ".pt", ".jsonl")}
        if missing := sorted((used | {CONFIG, SUMMARY}) - wanted.keys()):
            raise RecordError(f"{file} does not name {missing[0]}; remove that file or make the folder again")
        for name, (size, sha256) in wanted.items():
            one = self.path / Path(name).name
            same = one.name == name and one.is_file() and one.stat().st_size == size
            if not same or not (light and one.suffix == ".safetensors" or checksum(one) == sha256):
                raise RecordError(f"{one} is missing or damaged (it differs from {file.name}); make the folder again")
        return self.config

    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished folder; call `check` first."""
        try:
            return read_json(self.path / SUMMARY)
        except (OSError, *MALFORMED) as error:
            raise RecordError(f"cannot read {self.path / SUMMARY}: {error}") from None

    def _files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """A dictionary as JSON and YAML hold it: tuples become lists, bytes of a path that are not text become `?`."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 of what determines a result, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(as_json(identity), sort_keys=True).encode()).hexdigest()


def run_kind(config: Config) -> str:
    """Whose folder it is: ATTACK, DEFENSE or OWN."""
    return OWN if "own" in config else DEFENSE if "attacked" in config else ATTACK


def read_config(file: Path) -> Config:
    """The content of a `config.yaml` of ours; RecordError if it is not one, or of another version."""
    try:
        config: Config = _LOADER(read(file)).get_single_data()
        schema, _, _ = config["schema"], config["digest"], config["identity"].keys()
    except (OSError, *NO_YAML):
        text = f"{file.parent} is not a result folder of sau (no valid {file.name}); name another one"
        raise RecordError(text) from None
    if schema != SCHEMA:
        raise RecordError(f"{file.parent} has schema {schema!r}, not {SCHEMA}; use the version of sau that wrote it")
    return config
