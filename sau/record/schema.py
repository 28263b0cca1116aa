"""What is fixed about a result folder on the disk: its manifest, its configuration, and the versions of both.

`manifest.json` has the same form in all versions: `schema`, and `files` with SHA-256 and bytes of each. What changes is
`config.yaml`: a folder of an older version is brought up in memory when it is read, step by step, and stays as it is on
the disk, so that its sums stay right.
"""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from sau.data.sources import MAX_SIZE
from sau.errors import NO_YAML, RecordError
from sau.files import checksum, read, read_json

SCHEMA = 2
EARLY = "ended_early"  # where --max_minutes ended a run; in the identity of such runs alone
SEAL = "seal"  # key of config.yaml: the digest of everything else in it
CLEAN = 250_000  # pictures in a defender's set; their indices stand in config.yaml
DEEPEST, NODES = 50, CLEAN + 50_000  # levels and nodes of config.yaml; ours has five
ATTACK, DEFENSE, OWN = "an attack", "a defense", "a network of your own"
Config = dict[str, Any]

_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is five times as fast
_INDEX = re.compile(r"^clean_index:\n(?:- \d+\n)+", re.M)


def _from_1(config: Config) -> Config:
    """Version 1 had no seal, and its first defenses named their attack in the identity alone."""
    attacked = config["identity"].get("attacked")
    return {**config, "attacked": attacked} if attacked is not None else config


# From this version to the next one: the older configuration in, the newer one out.
UPGRADES: dict[int, Callable[[Config], Config]] = {1: _from_1}


def digest(identity: dict[str, Any]) -> str:
    """SHA-256 over what determines a result, as it is written, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(as_json(identity), sort_keys=True).encode()).hexdigest()


def kind(config: Config) -> str:
    """Whose folder it is: ATTACK, DEFENSE or OWN."""
    return OWN if "own" in config else DEFENSE if "attacked" in config else ATTACK


def of_another(config: Config, attack: str | None) -> bool:
    """Whether the configuration of a defense, if there is any, is of another attack than the one with this digest."""
    return bool(config) and attack is not None and config.get("attacked") != attack


def as_json(identity: dict[str, Any]) -> dict[str, Any]:
    """As YAML and JSON have it: tuples become lists, and what is no letter in a path that is no text becomes `?`."""
    alike: dict[str, Any] = json.loads(json.dumps(identity, ensure_ascii=False).encode(errors="replace"))
    return alike


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What two identities differ in, for an error."""
    both = {key: (old.get(key), new.get(key)) for key in {**old, **new} if old.get(key) != new.get(key)}
    return "; ".join(f"{key}: {a!r} there, {b!r} here" for key, (a, b) in sorted(both.items()))


def signed(config: Config) -> Config:
    """A configuration with its seal, as it is written."""
    return {**config, SEAL: digest(config)}


def written(config: Config) -> bytes:
    """The content of `config.yaml`."""
    return yaml.safe_dump(signed(config), sort_keys=False).encode()


def configuration(place: Path, light: bool = False) -> Config:
    """What `config.yaml`, at `place`, says, in the newest version; RecordError if it is none of ours.

    `light` leaves out the long `clean_index`, and then the seal cannot be compared.
    """
    try:
        text = read(place).decode()
        config = _tree(_INDEX.sub("", text) if light else text)
        json.dumps(config)  # YAML has types that no configuration of ours has, like dates
    except (OSError, *NO_YAML):
        config = None
    known = isinstance(config, dict) and {"schema", "digest", "identity"} <= config.keys()
    if not known or not isinstance(config["identity"], dict) or not all(isinstance(key, str) for key in config):
        raise RecordError(
            f"{place.parent} is no result folder of sau (no valid {place.name}); choose another --save_folder_name"
        )
    return opened(config, place, sealed=not light)


def listable(count: int) -> None:
    """RecordError for more clean pictures than `configuration` would read."""
    if count > CLEAN:
        raise RecordError(f"{count:,} clean pictures, allowed in a record are {CLEAN:,}; give a smaller --ratio")


def _tree(text: str) -> Any:
    """What YAML says; YAMLError for what makes little into much: aliases, levels beyond libyaml's stack, many nodes."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_YAML)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST or number > NODES or isinstance(event, yaml.AliasEvent):
            raise yaml.YAMLError(f"it has an alias, or more than {DEEPEST} levels or {NODES} nodes")
    return _YAML(text).get_single_data()


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


def _numbers(value: Any, least: int | float, most: int | float, *kinds: type) -> bool:
    return isinstance(value, list) and all(type(n) in kinds and least <= n <= most for n in value)


# What is read of an attack's configuration: where it stands, whether it may be so, and what is allowed.
TYPES: dict[tuple[str, str], tuple[Callable[[Any], bool], str]] = {
    ("model", "name"): (lambda it: isinstance(it, str), "a text"),
    ("model", "classes"): (lambda it: _numbers([it], 1, 100_000, int), "1 to 100000"),
    ("model", "width"): (lambda it: it is None or _numbers([it], 1, 1024, int), "1 to 1024, or none"),
    ("model", "shape"): (
        lambda it: _numbers(it, 1, MAX_SIZE, int) and len(it) == 3,
        f"channels, height and width up to {MAX_SIZE}",
    ),
    ("model", "mean"): (lambda it: _numbers(it, -1e6, 1e6, int, float), "numbers"),
    ("model", "std"): (lambda it: _numbers(it, 1e-6, 1e6, int, float), "numbers above 0"),
    ("data", "dataset"): (lambda it: isinstance(it, str), "a text"),
    ("data", "train"): (lambda it: isinstance(it, str), "a text"),
    ("data", "test"): (lambda it: isinstance(it, str), "a text"),
    ("run", "dataset_path"): (lambda it: isinstance(it, str), "a text"),
    ("run", "recipe"): (lambda it: it is None or isinstance(it, str), "a text, or none"),
    ("method", "pratio"): (lambda it: it is None or _numbers([it], 0, 1, int, float), "0 to 1"),
}


def typed(config: Config, path: Path) -> None:
    """RecordError unless what is read of an attack's configuration is of its type; KeyError if it is lacking."""
    for part in ("model", "data", "run", "method"):
        if not isinstance(config.get(part, {}), dict):
            raise RecordError(f"{path / 'config.yaml'}: {part} is no mapping; make the folder again")
    for (part, name), (fine, allowed) in TYPES.items():
        value = config[part][name] if part != "method" else config.get(part, {}).get(name)
        if not fine(value):
            text = f"{path / 'config.yaml'}: {name} is {str(value)[:60]!r}, allowed is {allowed}"
            raise RecordError(f"{text}; make the folder again")
    model = config["model"]
    if not len(model["mean"]) == len(model["std"]) == model["shape"][0]:
        raise RecordError(f"{path / 'config.yaml'}: mean and std are not those of {model['shape'][0]} channels")


def gate(summary: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """`gate` of a summary, `{"asr": least ASR in percent, "passed": bool}`; None where there is none, as in records of
    older versions. RecordError for anything else."""
    found = summary.get("gate")
    fine = isinstance(found, dict) and _numbers([found.get("asr")], 0, 100, int, float)
    if found is not None and not (fine and type(found.get("passed")) is bool):
        allowed = '{"asr": 0 to 100, "passed": true or false}'
        raise RecordError(
            f"{path / 'summary.json'}: gate is {str(found)[:60]!r}, allowed is {allowed}; make the folder again"
        )
    return found


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


def unbroken(place: Path, needed: set[str], light: bool = False) -> list[str]:
    """The names in the manifest `place` if every file is as it says; RecordError names the first that is not.

    It must vouch for all that are `needed`. `light` compares of `*.safetensors` the sizes alone.
    """
    try:
        content = read_json(place)
        version, files = content["schema"], dict(**content["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{place} is damaged: {error}") from None
    readable(version, place.parent)
    if unknown := sorted(needed - {*files}):
        raise RecordError(f"{place} does not name {unknown[0]}; take that file away or make the folder again")
    for name, seal in files.items():
        file = place.parent / Path(name).name
        if file.name != name or not _is(file, seal, light and file.suffix == ".safetensors"):
            raise RecordError(f"{file} is missing or damaged (it differs from {place.name}); make the folder again")
    return list(files)


def _seal(file: Path) -> dict[str, Any]:
    return {"sha256": checksum(file), "bytes": file.stat().st_size}


def _is(file: Path, seal: Any, size_alone: bool) -> bool:
    try:
        sized = file.is_file() and file.stat().st_size == seal["bytes"]
        return sized and (size_alone or _seal(file) == seal)
    except (OSError, ValueError, KeyError, TypeError):  # a damaged manifest may name what no file can be called
        return False
