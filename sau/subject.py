"""What a defense is given: of the folder of an attack, or of a network file and a folder of images of your own.

Of your own network nobody knows the trigger, so no ASR is claimed. Clean images alone give the accuracy, the
adversarial risks (`sau.risk`) and the verdict (`sau.defense.checks`).
"""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sau.compat import pretrained, weights
from sau.compat.weights import short_names
from sau.config import options
from sau.data.images import Augment, Images, last_of_each, to_float
from sau.data.readers import class_folders, image_folder
from sau.data.sources import check_clean_set, clean_subset, fingerprint, source
from sau.defense.base import Defense
from sau.errors import ConfigError, DataError
from sau.files import safe_join
from sau.grid.store import find
from sau.models import Normalized
from sau.models.normalized import check_logits, logits_of, to_channels_last
from sau.record import attack_result
from sau.record.attack_result import AttackResult
from sau.run import DefenseRun, OwnRun
from sau.settings import OF_RECORDS, Settings


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A network to purify and the images for it, on the CPU, and what the result folder says of them."""

    folder: Path  # of the result
    model: Normalized
    images: Images  # to purify with
    test: Images  # clean images to measure with
    identity: dict[str, Any]  # what determines the result besides the defense
    facts: dict[str, Any]  # for `config.yaml`
    lines: list[str]  # to say at the start
    notes: list[str]
    own: bool = False  # whether it is of a file, so that nobody knows whether it has a backdoor
    kind: str = "clean"  # of the images to purify with: clean or poisoned
    triggered: Images | None = None  # the test set of ASR and R-ACC; None where no trigger is known
    gate: dict[str, Any] | None = None  # of the attack, see `Attack.gate`
    augment: Augment | None = None  # of the training; None is the default of `Defense.purify`
    pickled: bool = False  # whether the weights came in a file of `torch.save`, and shall be kept in one, too
    configs: dict[str, bytes] | None = None  # the other files of the folder that it came in, to be kept beside it


def of(asked: Settings) -> tuple[DefenseRun, Defense, Subject]:
    """What the flags of a defense are about, `--result_file`, or `--model_file` and `--clean_dir`, and the settings of
    run and method as objects; prints the help instead and leaves where that was asked for."""
    place, file = asked.get("result_file"), asked.get("model_file")
    if place is None and file is None:
        asked.help(asked.recipe()[0], asked.get("dataset"))
    if (place is None) == (file is None):
        raise ConfigError("give one of --result_file, an attack's folder, and --model_file, a network of your own")
    if file is not None:
        recipe, why = asked.recipe()
        run, own, method = asked.settle(recipe, "folder")
        asked.ignore(OF_RECORDS, "it is about the record of an attack")
        if Path(file).is_dir():
            asked.ignore(("model_prefix", "trust_code"), "a folder holds one network, and no code is run")
        found = _of_file(own, method, run, asked.asked)
    else:
        attacked = attack_result.load(find(asked.get("record_root"), place))
        recipe, why = asked.recipe(attacked.recipe)
        net = attacked.network
        recorded = {"dataset": attacked.dataset, "dataset_path": attacked.dataset_path, "model": net["name"]}
        recorded |= {"width": net["width"], "num_classes": net["classes"]}
        run, _, method = asked.settle(recipe, attacked.dataset, recorded)
        asked.ignore(options(OwnRun), "it is about a network of your own")
        found = _of_record(attacked, method, run, run.dataset_path if "dataset_path" in asked.asked else None)
    first, *more = found.lines
    return run, method, replace(found, lines=[f"recipe {recipe} ({why}): {first}; {found.folder}", *more])


def _of_record(attacked: AttackResult, method: Defense, run: DefenseRun, dataset_path: str | None) -> Subject:
    """The attacked network and the images of `attacked`; `dataset_path` is as in `AttackResult.images`."""
    train, test, notes = attacked.images(dataset_path)
    train, kind = attacked.training_images(train, method.data_use)
    given, about = clean_subset(train, run.ratio, run.random_seed, run.index), "no images needed"
    if method.data_use != "none":
        notes += check_clean_set(given, test, kind)
        about = f"{len(given):,} {kind} images of {attacked.dataset}"
    facts = {"data": {"dataset": attacked.dataset}, "model": attacked.network, "attacked": attacked.digest}
    return Subject(
        folder=safe_join(attacked.path, "defense", run.save_folder_name or method.name), model=attacked.model(),
        images=given, test=test, triggered=attacked.triggered, kind=kind, gate=attacked.gate,
        augment=source(attacked.dataset).augment, facts={**facts, "clean_index": given.index.tolist()},
        identity={"clean": fingerprint(given), "attacked": attacked.digest}, lines=[about], notes=notes,
    )  # fmt: skip


def _of_file(own: OwnRun, method: Defense, run: DefenseRun, asked: set[str]) -> Subject:
    """The network in `own.model_file`, and the images in the class folders of `own.clean_dir`; `asked` are the settings
    that the user gave. ConfigError, DataError or RecordError where they do not fit, or the defense needs what nobody
    has."""
    if method.selection == "oracle":
        raise ConfigError("select is oracle, allowed is defender: nobody has images with your network's trigger")
    if method.data_use == "poisoned":
        raise ConfigError(f"{method.name} needs the attacker's images, which your network does not come with")
    clean, place = Path(str(own.clean_dir)), Path(str(own.model_file))
    if place.is_dir() and method.name == "npd":
        raise ConfigError("npd adds a layer to the network, so that the library of its folder could not open it again")
    folders = class_folders(clean)
    came = pretrained.open_folder(place, folders) if place.is_dir() else None
    found = came.found if came else weights.read(place)
    names = by_name(folders, found.classes)
    shown, order = (names, "names in the file") if names else (folders, "folders in order")
    known = {name.casefold() for name in found.classes or ()}
    if found.classes and not names and (came or any(name.casefold() in known for name in folders)):
        names, shown, order = by_number(folders, found.classes), found.classes, "folders by number"
    if came:
        own, net, arch = came.settle(own, asked), came.net, came.said["arch"]
    else:
        net, arch = weights.network(own, len(names or folders), found)
    images = image_folder(clean, came.view if came else own.input_size, names)
    given, test = split(images, own.check_share)
    model = Normalized(to_channels_last(net), own.mean or None, own.std or None).eval()
    _check_classes(model, test, clean)
    notes = check_clean_set(given, test) if method.data_use != "none" else []
    if found.classes and not names:
        theirs = f"{found.path.name} names its classes {short_names(found.classes)}"
        notes.append(f"{theirs}, which are not the names of the folders; the folders are numbered in order")
    size = "x".join(map(str, images.pixels.shape[2:]))
    counts = f"{len(given)} clean images to purify with, {len(test)} to measure with, at {size}"
    stem = re.sub(r"[^A-Za-z0-9]+", "_", place.name if came else place.stem).strip("_")[:80] or "network"
    return Subject(
        folder=safe_join(run.record_root, run.save_folder_name or f"{stem}_{method.name}"), model=model,
        images=given, test=test, own=True, pickled=found.kind != weights.SAFE, configs=came.configs if came else None,
        facts={"own": asdict(own), "model": {"name": arch, "classes": images.num_classes, "class_names": list(shown)}},
        notes=notes, identity={**asdict(own), "clean": fingerprint(images), "attacked": found.digest},
        lines=[f"{arch} from {place}, {counts}", *([f"from the folder: {came.view.text}"] if came else []),
               f"classes: {short_names(shown)} ({order})"],
    )  # fmt: skip


def by_name(folders: list[str], classes: list[str] | None) -> list[str] | None:
    """The file's `classes`, with the spelling of the folders, if every folder bears one of their names, else None."""
    spelt = {name.casefold(): name for name in folders}
    if classes is None or len({name.casefold() for name in classes}) < len(classes):
        return None
    known = len(spelt) == len(folders) and spelt.keys() <= {*map(str.casefold, classes)}
    return [spelt.get(name.casefold(), name) for name in classes] if known else None


def by_number(folders: list[str], classes: list[str]) -> list[str]:
    """A folder, or the number, for each of the `classes`; ConfigError unless every folder bears the number of one."""
    numbers = {int(name): name for name in folders if name.isdecimal()}
    if len(numbers) < len(folders) or max(numbers) >= len(classes):
        strange = [name for name in folders if name.casefold() not in map(str.casefold, classes)] or folders
        theirs = f"its classes are {short_names(classes)}; name each folder after one, or by its number"
        raise ConfigError(f"the folder {strange[0]!a} names no class, or several, of the network: {theirs}")
    return [numbers.get(number, str(number)) for number in range(len(classes))]


def split(images: Images, share: float) -> tuple[Images, Images]:
    """(to purify with, to measure with): the last `share` of each class measures; each keeps an image of either."""
    counts = images.labels.bincount(minlength=images.num_classes)
    if (counts == 1).any():
        lone = int((counts == 1).nonzero()[0])
        raise DataError(f"class {lone} has 1 clean image; each class needs two, one for measuring")
    held = last_of_each(images.labels, share)
    return images[~held], images[held]


def _check_classes(model: nn.Module, images: Images, place: Path) -> None:
    """ConfigError where the network does not answer with a finite logit for each class folder."""
    try:
        with torch.no_grad():
            logits = logits_of(model, to_float(images.pixels[:8]))
    except DataError as error:
        size = "x".join(map(str, images.pixels.shape[1:]))
        advice = "if it takes another size, give it with --input_size; gray images need Python and `purify`"
        raise ConfigError(f"images are {size}; {error}; {advice}") from None
    if logits.shape[-1] != images.num_classes:
        got = f"{place} has {images.num_classes} class folders, the network answers {logits.shape[-1]} classes"
        raise ConfigError(f"{got}; give a folder for each, named by its number (0, 1, 2, ...) or in the same order")
    if not logits.isfinite().all():
        raise ConfigError("the network answers a clean image with NaN or infinity; check mean and std")
    check_logits(logits)
