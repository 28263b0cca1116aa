"""The result folder of a run: files are written atomically, hashed, and checked before they are read."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sau.errors import Finished, LockedError, RecordError, first_line
from sau.files import acquire, append, in_use, read_json, release, temp_files, write
from sau.record import schema
from sau.record.schema import EARLY, SCHEMA, as_json, difference, digest

CONFIG, METRICS, SUMMARY, MANIFEST, LOG, CHECKPOINT = (
    "config.yaml", "metrics.jsonl", "summary.json", "manifest.json", "log.txt", "checkpoint.bin"
)  # fmt: skip
HOW = ("overwrite", "compile")  # flags that may differ where a finished run is asked for again


class Record:
    """A result folder; while it is unfinished it is also the checkpoint of its run.

    Args:
        path: the folder, `record/<name>` or `record/<name>/defense/<method>`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.clock: Callable[[], float] = lambda: 0.0  # seconds of the run so far, for checkpoints
        self.seconds = 0.0  # those before the checkpoint that was loaded
        self._changed = False  # whether `config` differs from the file
        self.resumes: bool | None = None  # what `can_start` has found, for `begin`

    @property
    def finished(self) -> bool:
        """Whether the run has ended; the manifest is written last."""
        return (self.path / MANIFEST).is_file()

    def begin(self, config: dict[str, Any], identity: dict[str, Any], overwrite: bool) -> None:
        """Start the folder or resume it.

        Args:
            config: flags and choices of the run, for `config.yaml`.
            identity: what of it determines the result; once there is a checkpoint, only the same run resumes here.
            overwrite: discard what is there.
        """
        resumes = self.can_start(identity, overwrite, config.get("run")) if self.resumes is None else self.resumes
        self.resumes = None
        if resumes or self._holds_only("defense"):  # defenses stay when the weights of their attack are made again
            for file in temp_files(self.path):
                file.unlink()
        else:
            self._clear()
        if resumes and "command" in self.config:
            config = {**config, "earlier_commands": [*self.config.get("earlier_commands", []), self.config["command"]]}
        if not (self.path / CHECKPOINT).is_file():
            (self.path / METRICS).unlink(missing_ok=True)
        self.update_config(schema=SCHEMA, digest=digest(identity), identity=as_json(identity), **config)
        self._write_config()

    def can_start(self, identity: dict[str, Any], overwrite: bool, run: dict[str, Any] | None = None) -> bool:
        """Whether a run would resume here (True) or start anew (False); the folder is locked from then on.

        Args:
            identity: see `begin`.
            overwrite: see `begin`.
            run: all flags of the run.

        Raises:
            Finished: a run with the same identity and flags has ended here.
            LockedError: another process uses the folder.
            RecordError: the run may neither start nor resume here.
        """
        new = acquire(self.path)
        try:
            self.resumes = self._can_start(identity, overwrite, run)
            # Choices, like the precision, stay.
            self.config = schema.read_config(self.path / CONFIG) if self.resumes else {}
            return self.resumes
        except RecordError:
            if new:
                release(self.path)
            raise

    def _can_start(self, identity: dict[str, Any], overwrite: bool, run: dict[str, Any] | None) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise RecordError(f"{self.path} is a file; choose another name with --save_folder_name")
        if self._holds_only("defense"):
            return False
        old = schema.read_config(self.path / CONFIG)
        if overwrite:
            self._refuse_running_defenses()
            return False
        same = {**old["identity"], EARLY: 0} == {**as_json(identity), EARLY: 0}  # an early end may be written already
        if self.finished:
            before = old.get("run", {})
            if same and run and all(before.get(k, v) == v for k, v in as_json(run).items() if k not in HOW):
                self.verify(light=True)
                raise Finished(f"{self.path} is finished, with these settings; --overwrite makes it again")
            raise RecordError(
                f"{self.path} is finished; choose another --save_folder_name, or discard it by --overwrite"
            )
        if not same and not self._holds_only(CONFIG, LOG):  # it holds only these before its first epoch
            other = difference(old["identity"], as_json(identity))
            raise RecordError(
                f"{self.path} holds an unfinished run with other settings ({other}); "
                "repeat its flags to resume it, choose another --save_folder_name, or --overwrite to discard it"
            )
        return same

    def _refuse_running_defenses(self) -> None:
        for lock in (self.path / "defense").glob(".*.lock"):
            if in_use(defense := lock.with_name(lock.name[1:].removesuffix(".lock"))):
                raise LockedError(f"{defense} is in use by another process; wait for it or stop it")

    def _holds_only(self, *names: str) -> bool:
        """Whether nothing else is there, except what a killed first write left."""
        entries = {*self.path.iterdir()} if self.path.exists() else set()
        return entries <= {*(self.path / name for name in names), *temp_files(self.path)}

    def _clear(self) -> None:
        """Delete the content: the manifest first and the config last, so that a killed deletion is recognised."""
        for entry in sorted(self.path.iterdir(), key=lambda entry: (entry.name == CONFIG, entry.name != MANIFEST)):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def update_config(self, **facts: Any) -> None:
        """Add facts for `config.yaml`; they are written when training begins, with checkpoints, and at the end."""
        self.config.update(as_json(facts))
        self._changed = True

    def _write_config(self) -> None:
        if self._changed:
            write(self.path / CONFIG, schema.dump_config(self.config))
            self._changed = False

    def log(self, text: str) -> None:
        """Print a line and append it to `log.txt`."""
        text = text.encode(errors="backslashreplace").decode()  # a path need not be text
        print(text, flush=True)
        append(self.path / LOG, text + "\n")

    def log_metrics(self, **figures: Any) -> None:
        """Append a line to `metrics.jsonl`."""
        self.rows.append(figures)
        append(self.path / METRICS, json.dumps(figures) + "\n")

    def save(self, place: dict[str, Any]) -> None:
        """Write a checkpoint with the rows so far, its SHA-256 in front."""
        self._write_config()
        buffer = io.BytesIO()
        torch.save({**place, "rows": self.rows, "seconds": self.clock()}, buffer)
        content = buffer.getvalue()
        write(self.path / CHECKPOINT, hashlib.sha256(content).hexdigest().encode() + content)

    def load(self) -> dict[str, Any] | None:
        """The last checkpoint, or None; rows of later epochs are dropped, because these epochs run again."""
        self._write_config()
        file = self.path / CHECKPOINT
        if not file.is_file():
            return None
        raw = file.read_bytes()
        if hashlib.sha256(raw[64:]).hexdigest().encode() != raw[:64]:
            raise RecordError(f"{file} is damaged (SHA-256 differs); start again with --overwrite")
        try:
            place: dict[str, Any] = torch.load(io.BytesIO(raw[64:]), weights_only=True, map_location="cpu")
            self.seconds = place.pop("seconds")
            rows, done = place.pop("rows"), (place["stage"], place["place"]["epoch"])
            self.rows = [row for row in rows if (row.get("stage", 0), row["epoch"]) <= done]
        except Exception as error:  # torch raises a dozen types on what it refuses
            reason = first_line(error)[:100]
            raise RecordError(f"{file} is damaged ({reason}); start again with --overwrite") from None
        write(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())
        return place

    def save_tensors(self, name: str, tensors: dict[str, Tensor], *, pickled: bool = False) -> None:
        """Write `<name>.safetensors`, or `<name>.pt`, a plain state dict for those who want one."""
        content, buffer = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, io.BytesIO()
        if pickled:
            torch.save(content, buffer)
        raw = buffer.getvalue() if pickled else safetensors.torch.save(content)
        write(self.path / f"{name}.{'pt' if pickled else 'safetensors'}", raw)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """Read `<name>.safetensors` of a finished folder; call `check` first."""
        file = self.path / f"{name}.safetensors"
        try:
            return safetensors.torch.load(file.read_bytes())
        except (OSError, safetensors.SafetensorError) as error:
            raise RecordError(f"cannot read {file}: {error}") from None

    def finish(self, summary: dict[str, Any]) -> None:
        """Write `summary.json` and last the manifest, which closes the folder; drop the checkpoint and the lock."""
        self._write_config()
        write(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        write(self.path / MANIFEST, schema.dump_manifest([file for file in self._files() if file.name != CHECKPOINT]))
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        release(self.path)

    def check(self, *, light: bool = False) -> dict[str, Any]:
        """The configuration of a finished folder, after every file was compared with the manifest.

        RecordError names the first file that differs. `light`, for readers of many folders, compares of
        `*.safetensors` the sizes alone.
        """
        if not self.path.is_dir():
            raise RecordError(f"there is no folder {self.path}; run an attack with --save_folder_name first")
        self.config = schema.read_config(self.path / CONFIG)
        if not self.finished:
            raise RecordError(f"{self.path} is unfinished; repeat the command that made it to resume it")
        self.verify(light=light)
        return self.config

    def verify(self, *, light: bool = False) -> list[str]:
        """Compare every file of a finished folder with the manifest; returns their names. RecordError as in `check`."""
        used = {file.name for file in self._files() if file.suffix in (".safetensors", ".pt", ".jsonl")}
        return schema.verify_manifest(self.path / MANIFEST, used | {CONFIG, SUMMARY}, light)

    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished folder; call `check` first."""
        try:
            return read_json(self.path / SUMMARY)
        except (OSError, ValueError) as error:
            raise RecordError(f"cannot read {self.path / SUMMARY}: {error}") from None

    def _files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))
