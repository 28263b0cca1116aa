"""The result folder: every file that a run leaves, written atomically, hashed, and checked before it is used."""

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sau.errors import Finished, LockedError, RecordError, first_line, os_error
from sau.files import append, clear, read_json, temp_files, write
from sau.record import schema
from sau.record.lock import acquire, in_use, release
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
        self.sealed: list[str] = []
        self.clock: Callable[[], float] = lambda: 0.0  # seconds of the run so far, for checkpoints
        self.seconds = 0.0  # those of before the checkpoint that was loaded

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; the manifest is written last."""
        return (self.path / MANIFEST).is_file()

    def begin(self, config: dict[str, Any], identity: dict[str, Any], overwrite: bool) -> None:
        """Start the folder or go on with it.

        Args:
            config: what the run is asked and what was chosen for it, for `config.yaml`.
            identity: what of it determines the result; once there is a checkpoint, only the same run goes on here.
            overwrite: discard what is there.
        """
        goes_on = self.can_start(identity, overwrite, config.get("run"))
        if goes_on or self._holds_only("defense"):  # defenses outlive the weights of an attack that are made again
            for half in temp_files(self.path):
                half.unlink()
        else:
            clear(self.path, first=MANIFEST, last=CONFIG)
        if goes_on:  # with what is asked now; what was chosen for the run stays, as its precision
            self.config = self._ours()
            if "command" in self.config:
                earlier = [*self.config.get("earlier_commands", []), self.config["command"]]
                config = {**config, "earlier_commands": earlier}
        else:
            self.config = {}
        self.update_config(schema=SCHEMA, digest=digest(identity), identity=as_json(identity), **config)

    def can_start(self, identity: dict[str, Any], overwrite: bool, run: dict[str, Any] | None = None) -> bool:
        """Whether a run would go on here (True) or start anew; RecordError if it may do neither. See `begin`.

        `run` is what else it is asked; Finished if a run of the same identity, asked the same, has ended here.

        From then on the folder is this process's until the run is finished or the process ends; LockedError if
        another process uses it.
        """
        new = acquire(self.path)
        try:
            return self._can_start(identity, overwrite, run)
        except RecordError:
            if new:
                release(self.path)
            raise

    def _can_start(self, identity: dict[str, Any], overwrite: bool, run: dict[str, Any] | None) -> bool:
        if self.path.exists() and not self.path.is_dir():
            raise RecordError(f"{self.path} is a file; choose another name with --save_folder_name")
        if self._holds_only("defense"):
            return False
        old = self._ours()
        if overwrite:
            for lock in (self.path / "defense").glob(".*.lock"):
                if in_use(defense := lock.with_name(lock.name[1:].removesuffix(".lock"))):
                    raise LockedError(f"{defense} is in use by another process; wait for it or stop it")
            return False
        same = {**old["identity"], EARLY: 0} == {**as_json(identity), EARLY: 0}  # an end may have been noted already
        if self.finished:
            before = old.get("run", {})  # of an older version with other keys, too
            if same and run and all(before.get(k, v) == v for k, v in as_json(run).items() if k not in HOW):
                self.verify(light=True)
                raise Finished(f"{self.path} is finished, with these settings; --overwrite makes it again")
            raise RecordError(
                f"{self.path} is finished; choose another name with --save_folder_name, or --overwrite to discard it"
            )
        if not same:
            if self._holds_only(CONFIG, LOG):  # refused at once, or stopped before its first checkpoint
                return False
            other = difference(old["identity"], as_json(identity))
            raise RecordError(
                f"{self.path} holds an unfinished run with other settings ({other}); "
                "repeat its flags to resume it, choose another --save_folder_name, or --overwrite to discard it"
            )
        return True

    def _holds_only(self, *names: str) -> bool:
        """Whether nothing else is there, but for what a killed first write left."""
        there = {*self.path.iterdir()} if self.path.exists() else set()
        return there <= {*(self.path / name for name in names), *temp_files(self.path)}

    def update_config(self, **facts: Any) -> None:
        """Add facts to `config.yaml`."""
        self.config.update(as_json(facts))
        write(self.path / CONFIG, schema.written(self.config))

    def log(self, text: str) -> None:
        """Print a line and keep it in the log."""
        text = text.encode(errors="backslashreplace").decode()  # a path need not be text
        print(text, flush=True)
        try:
            append(self.path / LOG, text + "\n")
        except OSError as error:
            raise os_error(error, f"cannot write {self.path / LOG}: {error.strerror}") from None

    def log_metrics(self, **figures: Any) -> None:
        """Add a line to `metrics.jsonl`."""
        self.rows.append(figures)
        write(self.path / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def save(self, place: dict[str, Any]) -> None:
        """Keep a checkpoint and the rows so far, their SHA-256 in front."""
        buffer = io.BytesIO()
        torch.save({**place, "rows": self.rows, "seconds": self.clock()}, buffer)
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
            self.seconds = place.pop("seconds", 0.0)  # older ones have none
            rows, done = place.pop("rows"), (place["stage"], place["place"]["epoch"])
            self.rows = [row for row in rows if (row.get("stage", 0), row["epoch"]) <= done]
        except Exception as error:  # torch raises a dozen types on what it refuses
            reason = first_line(error)[:100]
            raise RecordError(f"{file} is damaged ({reason}); start again with --overwrite") from None
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
        """Write `summary.json` and the manifest, which closes the folder; drop the checkpoint and the lock."""
        write(self.path / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
        write(self.path / MANIFEST, schema.manifest([file for file in self._files() if file.name != CHECKPOINT]))
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        release(self.path)

    def check(self, *, light: bool = False) -> dict[str, Any]:
        """Compare every file with the manifest; returns the configuration. RecordError names the first that differs.

        `light` is for readers of many folders: of `*.safetensors` the sizes alone are compared, and the configuration
        comes without the long `clean_index`, which takes most of the time to read.
        """
        if not self.path.is_dir():
            raise RecordError(f"there is no folder {self.path}; run an attack with --save_folder_name first")
        self.config = self._ours(light)
        if not self.finished:
            raise RecordError(f"{self.path} is unfinished; repeat the command that made it to resume it")
        self.verify(light=light)
        if not light:
            self.config = self._ours()  # what was compared is what counts
        return self.config

    def verify(self, *, light: bool = False) -> int:
        """Compare every file of a finished folder with the manifest; returns their bytes. RecordError as in `check`."""
        used = {file.name for file in self._files() if file.suffix in (".safetensors", ".pt", ".jsonl")}
        self.sealed = schema.unbroken(self.path / MANIFEST, used | {CONFIG, SUMMARY}, light)
        return sum((self.path / Path(name).name).stat().st_size for name in self.sealed)

    def _files(self) -> list[Path]:
        return sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))

    def summary(self) -> dict[str, Any]:
        """`summary.json` of a finished folder; call `check` first."""
        try:
            return read_json(self.path / SUMMARY)
        except (OSError, ValueError) as error:
            raise RecordError(f"cannot read {self.path / SUMMARY}: {error}") from None

    def _ours(self, light: bool = False) -> dict[str, Any]:
        return schema.configuration(self.path / CONFIG, light)
