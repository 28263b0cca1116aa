"""What is fixed about a result folder on the disk: its manifest, its configuration, and the versions of both.

`manifest.json` has the same form in all versions: `schema`, and `files` with SHA-256 and bytes of each. What changes is
`config.yaml`: a folder of an older version is brought up in memory when it is read, step by step, and stays as it is on
the disk, so that its sums stay right.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sau.errors import RecordError

SCHEMA = 2
SEAL = "seal"  # key of config.yaml: the digest of everything else in it
Config = dict[str, Any]


def _from_1(config: Config) -> Config:
    """Version 1 had no seal, and its first defenses named their attack in the identity alone."""
    attacked = config["identity"].get("attacked")
    return {**config, "attacked": attacked} if attacked is not None else config


# From this version to the next one: the older configuration in, the newer one out.
UPGRADES: dict[int, Callable[[Config], Config]] = {1: _from_1}


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 over what determines a result, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def plain(identity: dict[str, Any]) -> dict[str, Any]:
    """As YAML and JSON have it: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two identities differ in, for an error."""
    both = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    return "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in sorted(both.items()))


def signed(config: Config) -> Config:
    """A configuration with its seal, as it is written."""
    return {**config, SEAL: digest(config)}


def opened(config: Config, place: Path, sealed: bool = True) -> Config:
    """A configuration as it was read from `place`, in the newest version.

    RecordError for one from the future, and for one whose seal is not its own; not `sealed` is one that was not read
    whole, so that it cannot be told.
    """
    version = readable(config["schema"], place.parent)
    if version >= 2:
        config = dict(config)
        if config.pop(SEAL, None) != digest(config) and sealed:
            raise RecordError(f"{place} is damaged (its seal differs); make the folder again, under another name")
    while version < SCHEMA:
        config = {**UPGRADES[version](config), "schema": version + 1}
        version += 1
    return config


def readable(version: Any, path: Path) -> int:
    """The version of the folder `path`, if it is one that can be read."""
    if type(version) is not int or not 1 <= version <= SCHEMA:
        raise RecordError(f"{path} has schema {version!r}, this version reads 1 to {SCHEMA}; use a newer sau for it")
    return version


def manifest(files: list[Path]) -> bytes:
    """The manifest of these files."""
    return (
        json.dumps({"schema": SCHEMA, "files": {file.name: _seal(file) for file in files}}, indent=2) + "\n"
    ).encode()


def unbroken(place: Path, light: bool = False) -> list[str]:
    """The names in the manifest `place` if every file is as it says; RecordError names the first that is not.

    `light` compares of `*.safetensors` the sizes alone.
    """
    try:
        content = json.loads(place.read_text())
        version, files = content["schema"], dict(content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{place} is damaged: {error}") from None
    readable(version, place.parent)
    for name, seal in files.items():
        file = place.parent / Path(name).name
        if not _is(file, seal, light and file.suffix == ".safetensors"):
            raise RecordError(f"{file} is missing or damaged (it differs from {place.name}); make the folder again")
    return list(files)


def _seal(file: Path) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}


def _is(file: Path, seal: Any, size_alone: bool) -> bool:
    try:
        if size_alone and file.is_file():
            return bool(file.stat().st_size == seal["bytes"])
        return file.is_file() and _seal(file) == seal
    except (OSError, ValueError, KeyError, TypeError):  # a damaged manifest may name what no file can be called
        return False
