"""The result folder: every file that a run leaves, written atomically, hashed, and checked before it is used."""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import Tensor

from sau.errors import RecordError
from sau.files import write

SCHEMA = 1
CONFIG, METRICS, SUMMARY, MANIFEST, LOG, CHECKPOINT = (
    "config.yaml", "metrics.jsonl", "summary.json", "manifest.json", "log.txt", "checkpoint.bin"
)  # fmt: skip

_INDEX = re.compile(r"^clean_index:\n(?:- \d+\n)+", re.M)


class Record:
    """A result folder; while it is unfinished it is also the checkpoint of its run.

    Args:
        path: the folder, `record/<name>` or `record/<name>/defense/<method>`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; the manifest is written last."""
        return (self.path / MANIFEST).is_file()

    def begin(self, config: dict[str, Any], identity: dict[str, Any], overwrite: bool) -> None:
        """Start the folder or go on with it.

        Args:
            config: what the run is asked and what was chosen for it, for `config.yaml`.
            identity: the part of it that determines the result; an unfinished folder goes on only if it is the same.
            overwrite: discard what is there.
        """
        if self.admits(identity, overwrite):
            for leftover in self.path.glob(".*"):  # a write that was killed
                leftover.unlink()
            self.config = self.peek()
            return
        if self.path.is_dir():
            shutil.rmtree(self.path)
        self.config = {}
        self.note(schema=SCHEMA, digest=digest(identity), identity=_plain(identity), **config)

    def admits(self, identity: dict[str, Any], overwrite: bool) -> bool:
        """Whether a run would go on here (True) or start anew; RecordError if it may do neither. See `begin`."""
        if self.path.exists() and not self.path.is_dir():
            raise RecordError(f"{self.path} is a file; choose another name")
        if not self.path.exists() or not any(self.path.iterdir()):
            return False
        old = self.peek()
        if overwrite:
            return False
        if self.finished:
            raise RecordError(f"{self.path} is finished; choose another name, or --overwrite to discard it")
        if old.get("digest") != digest(identity):
            other = _difference(old["identity"], _plain(identity))
            raise RecordError(
                f"{self.path} holds an unfinished run with other settings ({other}); "
                "repeat its flags to resume it, choose another name, or --overwrite to discard it"
            )
        return True

    def note(self, **facts: Any) -> None:
        """Add facts to `config.yaml`."""
        self.config.update(json.loads(json.dumps(facts)))  # tuples become lists, as YAML has them
        write(self.path / CONFIG, yaml.safe_dump(self.config, sort_keys=False).encode())

    def say(self, text: str) -> None:
        """Print a line and keep it in the log."""
        print(text, flush=True)
        try:
            with (self.path / LOG).open("a") as file:
                file.write(text + "\n")
        except OSError as error:
            raise RecordError(f"cannot write {self.path / LOG}: {error.strerror}") from None

    def row(self, **figures: Any) -> None:
        """Add a line to `metrics.jsonl`."""
        self.rows.append(figures)
        write(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def save(self, place: dict[str, Any]) -> None:
        """Keep a checkpoint, its SHA-256 in front of it."""
        buffer = io.BytesIO()
        torch.save(place, buffer)
        content = buffer.getvalue()
        write(self.path / CHECKPOINT, hashlib.sha256(content).hexdigest().encode() + content)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None; rows of epochs after it are dropped, for they will come again."""
        file = self.path / CHECKPOINT
        if not file.is_file():
            return None
        raw = file.read_bytes()
        if hashlib.sha256(raw[64:]).hexdigest().encode() != raw[:64]:
            raise RecordError(f"{file} is damaged (SHA-256 differs); start again with --overwrite")
        try:
            place: dict[str, Any] = torch.load(io.BytesIO(raw[64:]), weights_only=True, map_location="cpu")
            lines = (self.path / METRICS).read_text().splitlines() if (self.path / METRICS).is_file() else []
            done = place["stage"], place["place"]["epoch"]
            self.rows = [row for row in map(json.loads, lines) if (row.get("stage", 0), row["epoch"]) <= done]
        except Exception as error:  # torch raises a dozen types on what it refuses
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RecordError(
                f"{file} or {METRICS} is damaged ({reason[:100]}); start again with --overwrite"
            ) from None
        return place

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write `<name>.safetensors`."""
        content = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        write(self.path / f"{name}.safetensors", safetensors.torch.save(content))

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read `<name>.safetensors` of a finished folder; call `check` first."""
        file = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load(file.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise RecordError(f"cannot read {file}: {error}") from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and the manifest, which closes the folder, and drop the checkpoint."""
        write(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        kept = [file for file in sorted(self.path.iterdir()) if file.is_file() and file.name != CHECKPOINT]
        files = {file.name: _seal(file) for file in kept}
        write(self.path / MANIFEST, (json.dumps({"schema": SCHEMA, "files": files}, indent=2) + "\n").encode())
        (self.path / CHECKPOINT).unlink(missing_ok=True)

    def check(self, *, light: bool = False) -> dict[str, Any]:
        """Compare every file with the manifest; returns the configuration. RecordError names the first that differs.

        `light` is for readers of many folders: of `*.safetensors` the sizes alone are compared; see also `peek`.
        """
        if not self.path.is_dir():
            raise RecordError(f"there is no folder {self.path}; run an attack with --save_folder_name first")
        self.config = self.peek(light=light)
        if not self.finished:
            raise RecordError(f"{self.path} is unfinished; repeat the command that made it to resume it")
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
            schema, files = manifest["schema"], {name: dict(seal) for name, seal in manifest["files"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecordError(f"{self.path / MANIFEST} is damaged: {error}") from None
        if schema != SCHEMA:
            raise RecordError(f"{self.path} has schema {schema!r}, this version reads {SCHEMA}")
        for name, seal in files.items():
            file = self.path / Path(name).name
            size_alone = light and file.suffix == ".safetensors"
            if not file.is_file() or seal != {**seal, **_seal(file, size_alone)}:
                raise RecordError(f"{file} is missing or damaged (it differs from {MANIFEST}); make the folder again")
        return self.config

    def peek(self, *, light: bool = False) -> dict[str, Any]:
        """The configuration, unchecked, or RecordError if it is not ours; `light` leaves out the long `clean_index`."""
        try:
            text = (self.path / CONFIG).read_text()
            config = _yaml(_INDEX.sub("", text) if light else text)
            if isinstance(config, dict) and {"schema", "digest", "identity"} <= config.keys():
                return config
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            config = None
        raise RecordError(f"{self.path} is not a result folder of sau (no valid {CONFIG}); choose another name")


def _plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As YAML and JSON have it: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 over what determines a result, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _yaml(text: str) -> Any:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)  # libyaml's is five times as fast
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _seal(file: Path, size_alone: bool = False) -> dict[str, Any]:
    size = {"bytes": file.stat().st_size}
    return size if size_alone else {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), **size}


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    both = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    return "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in sorted(both.items()))
