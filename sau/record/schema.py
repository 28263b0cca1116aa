"""The files that describe a result folder: `config.yaml`, and `manifest.json` with SHA-256 and bytes of each file."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import yaml

from sau.errors import NO_YAML, RecordError
from sau.files import checksum, read, read_json

SCHEMA = 2
EARLY = "ended_early"  # key of the identity and the summary of runs that --max_minutes ended
ATTACK, DEFENSE, OWN = "an attack", "a defense", "a network of your own"
Config = dict[str, Any]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast


def as_json(value: dict[str, Any]) -> dict[str, Any]:
    """A dictionary as JSON and YAML hold it: tuples become lists, bytes of a path that are not text become `?`."""
    plain: dict[str, Any] = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return plain


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 of what determines a result, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(as_json(identity), sort_keys=True).encode()).hexdigest()


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The keys that differ between two identities, with both values, for an error."""
    both = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    return "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in sorted(both.items()))


def kind(config: Config) -> str:
    """Whose folder it is: ATTACK, DEFENSE or OWN."""
    return OWN if "own" in config else DEFENSE if "attacked" in config else ATTACK


def belongs_to_other_attack(config: Config, attack: str | None) -> bool:
    """Whether the configuration of a defense, if any, names another attack than the one with this digest."""
    return bool(config) and attack is not None and config.get("attacked") != attack


def dump_config(config: Config) -> bytes:
    """The content of `config.yaml`."""
    return yaml.safe_dump(config, sort_keys=False).encode()


def read_config(file: Path) -> Config:
    """The content of a `config.yaml` of ours; RecordError if it is not one, or of another version."""
    try:
        config = _LOADER(read(file)).get_single_data()
        valid = {"schema", "digest", "identity"} <= config.keys() and isinstance(config["identity"], dict)
    except (OSError, *NO_YAML):
        valid = False
    if not valid:
        got = f"{file.parent} is not a result folder of sau (no valid {file.name})"
        raise RecordError(f"{got}; choose another --save_folder_name")
    _check_version(config["schema"], file.parent)
    return {key: value for key, value in config.items() if key != "seal"}  # written by earlier code


def check_network(config: Config, file: Path) -> None:
    """RecordError unless the network and the data set of an attack's configuration can be built and found."""
    model, run = config["model"], config["run"]
    channels, *sides = model["shape"]
    numbers = [*model["mean"], *model["std"]]
    integers = [channels, *sides, model["classes"], 1 if model["width"] is None else model["width"]]
    texts = [model["name"], config["data"]["dataset"], run["dataset_path"], run["recipe"] or ""]
    valid = len(sides) == 2 and len(model["mean"]) == len(model["std"]) == channels and min(model["std"]) > 0
    valid = valid and all(map(math.isfinite, numbers)) and all(type(n) is int and n > 0 for n in integers)
    if not valid or not all(isinstance(text, str) for text in texts):
        raise RecordError(f"{file} describes no network that can be built ({model}); make the folder again")


def gate(summary: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """`gate` of a summary, `{"asr": least ASR in percent, "passed": bool}`, or None; RecordError for anything else."""
    found = summary.get("gate")
    try:
        valid = found is None or (type(found["passed"]) is bool and 0 <= found["asr"] <= 100)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        allowed = '{"asr": 0 to 100, "passed": true or false}'
        got = f"gate is {str(found)[:60]!r}, allowed is {allowed}"
        raise RecordError(f"{folder / 'summary.json'}: {got}; make the folder again")
    return found


def dump_manifest(files: list[Path]) -> bytes:
    """The content of `manifest.json` for these files."""
    entries = {file.name: _entry(file) for file in files}
    return (json.dumps({"schema": SCHEMA, "files": entries}, indent=2) + "\n").encode()


def verify_manifest(file: Path, required: set[str], light: bool = False) -> list[str]:
    """Compare every file with the manifest `file`; returns their names. RecordError for the first that differs.

    Args:
        file: the manifest.
        required: names that it must list.
        light: compare of `*.safetensors` the sizes alone.
    """
    try:
        content = read_json(file)
        version, entries = content["schema"], dict(**content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{file} is damaged: {error}") from None
    _check_version(version, file.parent)
    if missing := sorted(required - {*entries}):
        raise RecordError(f"{file} does not name {missing[0]}; take that file away or make the folder again")
    for name, entry in entries.items():
        one = file.parent / Path(name).name
        if one.name != name or not _matches(one, entry, light and one.suffix == ".safetensors"):
            raise RecordError(f"{one} is missing or damaged (it differs from {file.name}); make the folder again")
    return list(entries)


def _check_version(version: Any, folder: Path) -> None:
    if version != SCHEMA:
        raise RecordError(f"{folder} has schema {version!r}, this version reads {SCHEMA}; use the sau that wrote it")


def _entry(file: Path) -> dict[str, Any]:
    return {"sha256": checksum(file), "bytes": file.stat().st_size}


def _matches(file: Path, entry: Any, size_alone: bool) -> bool:
    try:
        same_size = file.is_file() and file.stat().st_size == entry["bytes"]
        return same_size and (size_alone or _entry(file) == entry)
    except (OSError, ValueError, KeyError, TypeError):  # a damaged manifest may hold anything
        return False
