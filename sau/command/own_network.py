"""A network that somebody hands over: weights from a file that is never run, clean pictures, no trigger.

Nobody knows its trigger, so no ASR is claimed. The report says what clean pictures alone can say: the accuracy, the
adversarial risks (`sau.risk`), and where adversarial examples lead: a backdoor draws them to its class.
"""

import re
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sau.command.own_clues import Reversal, clean_indices, concentration, reverse
from sau.command.request import Request
from sau.command.watch import Watch, begin, warn
from sau.compat import weights
from sau.compat.inspect import normalisation
from sau.compat.network import network
from sau.compat.weights import SAFE, short_names
from sau.data.images import Images, to_float
from sau.data.readers import class_folders, image_folder, original_sizes
from sau.data.sources import check_clean_set, fingerprint, last_of_each
from sau.defense.base import Defense
from sau.defense.checks import misuse
from sau.errors import ConfigError, DataError, one_line
from sau.evaluate import AT_ONCE_ON_CPU, Score, predict, score, table
from sau.files import safe_join
from sau.models import Normalized, check_logits, to_channels_last, translate_errors
from sau.record.folder import Record
from sau.risk import Found, gauge
from sau.runtime import device as machine
from sau.runtime.device import choose_precision
from sau.settings.run import OF_RECORDS, OwnRun

DEAR = 10.0  # points of accuracy, above which their loss is worth a warning


def split(images: Images, share: float) -> tuple[Images, Images]:
    """(to purify with, to measure with): the last `share` of each class measures; each keeps a picture of either."""
    for label, count in enumerate(images.labels.bincount(minlength=images.num_classes).tolist()):
        if count == 1:
            raise DataError(f"class {label} has {count} clean pictures; each class needs two, one to measure with")
    held = last_of_each(images.labels, share)
    return images[~held], images[held]


def purify(name: str, request: Request) -> None:
    """Purify, and report what clean pictures say before and after."""
    started = time.monotonic()
    recipe, why = request.recipe()
    run, own, method = request.settle(recipe, "folder")
    request.ignore(OF_RECORDS, "it is about the record of an attack")
    request.ignore(["track_risk"], "the risks before and after are measured in any case")
    where, threads = machine.prepare(machine.choose_device(run.device)), machine.set_threads(run.threads)
    _need_nothing_of_an_attacker(method)
    clean, found = Path(str(own.clean_dir)), weights.read(Path(str(own.model_file)))
    folders = class_folders(clean)
    names = by_name(folders, found.classes)
    net, file, arch = network(own, len(names or folders), found)
    images = image_folder(clean, own.input_size, names)
    given, test = (part.to(where) for part in split(images, own.check_share))
    model = Normalized(to_channels_last(net), own.mean or None, own.std or None).to(where).eval()
    method = request.adapted(method, model, len(given))
    _check_classes(model, test, clean)
    notes = _misused(model, given) + _unapplied(file, own) + _of_classes_and_sizes(file, own, folders, names)
    notes += check_clean_set(given, test, method.batch_size) if method.data_use != "none" else []
    stem = re.sub(r"[^A-Za-z0-9]+", "_", Path(str(own.model_file)).stem).strip("_")[:80] or "network"
    record = Record(safe_join(run.record_root, run.save_folder_name or f"{stem}_{name}"))
    identity = {"defense": name, **method.identity(), **asdict(own), "clean": fingerprint(images)}
    begin(record, run, {**identity, "attacked": file.digest, "random_seed": run.random_seed}, threads)
    settings = {"defense": name, **method.params()}
    record.update_config(
        method=settings, model={"name": arch, "classes": images.num_classes}, own=asdict(own), notes=notes
    )
    record.log(f"{arch} from {file.path}; {len(given)} clean pictures to purify with, {len(test)} to measure with")
    record.log(f"classes: {short_names(names or folders)} ({'names in the file' if names else 'folders in order'})")
    if sizes := original_sizes(clean, own.input_size):
        record.log(f"images are resized to {own.input_size}x{own.input_size} from {sizes}")
    record.log(f"recipe {recipe}, {why}; choose another with --recipe")
    warn(record, request, notes)
    epochs = getattr(method, "epochs", 1)
    choose_precision(record, run, model, method, where)
    begun = time.monotonic()
    before = score(model, test, None)
    evaluation = time.monotonic() - begun
    # `purify` leaves the network as it is, so that it is the reference throughout.
    measured = gauge(model, test, None, run.risk_samples, run.search(), run.random_seed)
    inverted = partial(_inverted, images=test, own=own, seed=run.random_seed)
    threat, patches = measured(model), inverted(model)
    closing = time.monotonic() - begun  # what is measured now is measured again in the end
    watch = Watch(record, run, epochs, test, lambda: None, started, evaluation, closing_seconds=closing)
    how: Any = {"seed": run.random_seed, "settings": "as_given"}
    fixed = method.purify(model, given, session=watch.session(), **how)
    after, left, smaller = score(fixed, test, None), measured(fixed), inverted(fixed)
    record.log(table({"before": before, "after": after}))
    alike = {"classes": images.num_classes, "passes": own.reversal_passes, "pictures": len(test)}
    report = {
        "before": _report(record, "before", before, threat, patches, alike),
        "after": _report(record, "after", after, left, smaller, alike),
    }
    _keep(record, fixed, net, "safetensors" if file.kind == SAFE else "pt")
    if before.acc.percent - after.acc.percent > DEAR:
        lost = f"{before.acc.percent:.1f} to {after.acc.percent:.1f} %"
        record.log(f"warning: the accuracy fell from {lost}; try gentler settings of {name}, or more clean pictures")
    watch.finish(report)


def _misused(model: Normalized, given: Images) -> list[str]:
    """What to say where the network classifies few of the images correctly, before hours are spent on it."""
    answers = predict(model, given.pixels)
    wrong = misuse(model, given.batches(AT_ONCE_ON_CPU), given.labels, answers, given.num_classes)
    return [wrong] if wrong else []


def _unapplied(file: weights.Weights, own: OwnRun) -> list[str]:
    """What to say where the file holds or names another normalisation than the one that was asked for."""
    found = normalisation(file)
    given = {"mean": own.mean, "std": own.std}  # one value is for all channels
    if found is None or (
        own.mean
        and all(torch.allclose(torch.tensor(found[name]), torch.tensor(given[name]), atol=0.01) for name in given)
    ):
        return []
    mean, std = (",".join(f"{value:.4g}" for value in found[name]) for name in ("mean", "std"))
    which = "another is" if own.mean else "none is"
    return [
        one_line(
            f"by {file.path.name} ({found['from'][:100]}) pictures are normalised with mean {mean} and std {std}, but "
            f"{which} applied here; unless the network does it itself, give --mean and --std"
        )
    ]


def _need_nothing_of_an_attacker(method: Defense) -> None:
    """ConfigError for a method that cannot work without triggered pictures."""
    if method.selection == "oracle":
        raise ConfigError("select is oracle, allowed is defender: nobody has pictures with your network's trigger")
    if method.data_use == "poisoned":
        raise ConfigError(f"{method.name} needs the attacker's pictures, which your network does not come with")


def _keep(record: Record, fixed: nn.Module, net: nn.Module, ending: str) -> None:
    """The purified weights, in the format in which those of `net` came, too."""
    state = fixed.get_submodule("net").state_dict()
    record.save_tensors("model", state)
    if ending == "pt":
        record.save_tensors("model", state, pickled=True)
    record.log(f"purified weights: {record.path / f'model.{ending}'}")
    if state.keys() != net.state_dict().keys():
        record.log("note: layers were added; sau.record.attack_result.load_weights makes room for them in your network")


def _check_classes(model: nn.Module, images: Images, place: Path) -> None:
    """ConfigError where the network does not answer with a finite logit for each class folder."""
    what = f"the network does not accept pictures of {'x'.join(map(str, images.pixels.shape[1:]))}"
    with (
        translate_errors(lambda reason: ConfigError(f"{what}: {reason}; give its own size with --input_size")),
        torch.no_grad(),
    ):
        logits = model(to_float(images.pixels[:8]))
    if logits.shape[-1] != images.num_classes:
        raise ConfigError(
            f"{place} has {images.num_classes} class folders, the network answers {logits.shape[-1]} classes; "
            "give a folder for each, named by the number of its output (0, 1, 2, ...) or in the same order"
        )
    if not logits.isfinite().all():
        raise ConfigError("the network answers a clean picture with NaN or infinity; are mean and std its own?")
    check_logits(logits)


def by_name(folders: list[str], classes: list[str] | None) -> list[str] | None:
    """The file's `classes`, with the spelling of the folders, if every folder bears one of their names, else None."""
    spelt = {name.casefold(): name for name in folders}
    if classes is None or len({name.casefold() for name in classes}) < len(classes):
        return None
    return (
        [spelt.get(name.casefold(), name) for name in classes]
        if spelt.keys() <= {*map(str.casefold, classes)}
        else None
    )


def _of_classes_and_sizes(file: weights.Weights, own: OwnRun, folders: list[str], names: list[str] | None) -> list[str]:
    """What to say where the file names other classes or another size of images than are used."""
    notes = []
    if file.classes and not names:
        notes.append(
            f"{file.path.name} names its classes {short_names(file.classes)}, which are not the names of the folders; "
            "the folders are numbered in order"
        )
    if file.input_size and file.input_size != own.input_size:
        notes.append(
            f"by {file.path.name} the network was trained with images of {file.input_size}x{file.input_size}, but "
            f"--input_size is {own.input_size}"
        )
    return notes


def _inverted(model: nn.Module, images: Images, own: OwnRun, seed: int) -> Reversal | None:
    """The smallest patch of each class, if that was asked for."""
    return reverse(model, images, own.reversal_passes, seed) if own.reversal_passes else None


def _report(
    record: Record, when: str, accuracy: Score, found: Found, patches: Reversal | None, alike: dict[str, int]
) -> dict[str, Any]:
    """What is said of a network, for `summary.json`, and in a line for the screen; `alike` are the clean networks that
    its patches are compared with."""
    risks, flips = found.row(), concentration(found, alike["classes"])
    text = f"{when:8}R_adv {risks['r_adv']:.1f} %, R_share {risks['r_share']:.1f} %"
    if flips["count"]:
        text += f"; {flips['share']:.1f} % of {flips['count']} adversarial examples lead to class {flips['class']}"
        text += f" (evenly: {flips['even']:.1f} %)"
    record.log(text)
    report = {**accuracy.summary(), "risk": found.summary(), "flips": flips}
    if patches is not None:
        clean = clean_indices(**alike)
        report["reversal"] = patches.summary(clean)
        record.log(f"{when:8}{patches.text(clean)}")
    return report
