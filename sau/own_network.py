"""A network of somebody's own: weights from a file that is never run, clean images, no trigger.

Nobody knows its trigger, so no ASR is claimed. The report says what clean images alone can say: the accuracy, the
adversarial risks (`sau.risk`), where adversarial examples lead (a backdoor draws them to its class), and how small a
patch sends images to a class. These are hints, not tests.

The patches are those of Neural Cleanse (see `sau.defense.nc`). With n_1..n_K, the mask norms of the smallest ones, the
index is the largest (med - n_c) / MAD. Neural Cleanse suspects a class above 2, which clean networks pass, too.
"""

import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sau import __version__
from sau import device as machine
from sau.compat import weights
from sau.compat.weights import SAFE, network, short_names
from sau.data.images import Images, last_of_each, sample, to_float
from sau.data.readers import class_folders, image_folder
from sau.data.sources import check_clean_set, fingerprint
from sau.defense.inputs import misuse
from sau.defense.nc import NC, Patches, anomaly
from sau.errors import ConfigError, DataError
from sau.evaluate import Proportion, Score, proportions, score, table
from sau.files import safe_join
from sau.graphs import shared_weight_twin
from sau.loop import RunContext
from sau.models import Normalized, to_channels_last
from sau.models.normalized import check_logits, translate_errors
from sau.record.folder import Record
from sau.risk import Found, gauge
from sau.run import RunLogger, begin
from sau.settings import OF_RECORDS, Settings
from sau.util import seeded

IMAGES, BATCH = 320, 32  # ten updates a pass, as the published search has on 2,500 images in batches of 250


def reverse(model: nn.Module, images: Images, passes: int, seed: int = 0) -> dict[str, Any] | None:
    """Invert a patch for every class of `model`, which stays as it is; None without passes.

    Args:
        model: [B, C, H, W] in [0, 1] -> logits.
        images: clean images with labels, on the model's device; at most 320 of them, drawn by `seed`, are used.
        passes: passes over the images.
        seed: of the choice and the order of the images.

    Returns `norms`, |m_c|_1 of the smallest patch of each class in pixels; `class`, the one with the smallest patch;
    `index`, its anomaly index: None with two classes, which lie equally far from their median, and where half of the
    norms are the median.
    """
    if passes == 0:
        return None
    some, nc = sample(images, None, IMAGES, seed)[0], NC(nc_epoch=passes)
    patches = Patches(images.num_classes, 1, to_float(some.pixels[:1]), nc.init_cost)
    with seeded(seed), torch.compiler.set_stance("force_eager"):  # open classes become fewer, and batches with them
        twin, batches = shared_weight_twin(model), some.batches(BATCH, seed=seed)
        nc.invert(twin, batches, patches, RunContext(say=lambda line: None))
    sizes = patches.found()[2]
    label = int(sizes.argmin())
    index = float(anomaly(sizes)[label])
    known = len(sizes) > 2 and math.isfinite(index)
    norms = [round(norm, 2) for norm in sizes.tolist()]
    return {"norms": norms, "class": label, "index": round(index, 2) if known else None}


def concentration(found: Found, classes: int) -> dict[str, Any]:
    """Where the adversarial examples of a network lead; a backdoor draws them to its class.

    Returns `class`, what most of them are answered with; `share`, how many percent, with its Wilson `interval`; `even`,
    what that would be if they spread evenly; `count`, the examples that change the answer; `by_class`, percent of each.
    """
    flipped = found.answer[found.kind > 0]
    if len(flipped) == 0:
        return {"class": None, "share": 0.0, "interval": None, "even": 0.0, "count": 0, "by_class": []}
    shares = [Proportion(count, len(flipped)) for count in torch.bincount(flipped, minlength=classes).tolist()]
    most = max(shares, key=lambda share: share.hits)
    leads = {"class": shares.index(most), "share": most.percent, "interval": list(most.interval)}
    by_class = [share.percent for share in shares]
    return {**leads, "even": round(100 / classes, 2), "count": len(flipped), "by_class": by_class}


def split(images: Images, share: float) -> tuple[Images, Images]:
    """(to purify with, to measure with): the last `share` of each class measures; each keeps an image of either."""
    counts = images.labels.bincount(minlength=images.num_classes)
    if (counts == 1).any():
        lone = int((counts == 1).nonzero()[0])
        raise DataError(f"class {lone} has 1 clean image; each class needs two, one for measuring")
    held = last_of_each(images.labels, share)
    return images[~held], images[held]


def purify(name: str, asked: Settings) -> None:
    """Purify, and report what clean images say before and after."""
    started = time.monotonic()
    recipe, why = asked.recipe()
    run, own, method = asked.settle(recipe, "folder")
    asked.ignore(OF_RECORDS, "it is about the record of an attack")
    asked.ignore(["track_risk"], "the risks before and after are measured in any case")
    where = machine.prepare(asked.device)
    machine.set_threads(run.threads)
    if method.selection == "oracle":
        raise ConfigError("select is oracle, allowed is defender: nobody has images with your network's trigger")
    if method.data_use == "poisoned":
        raise ConfigError(f"{method.name} needs the attacker's images, which your network does not come with")
    clean, found = Path(str(own.clean_dir)), weights.read(Path(str(own.model_file)))
    folders = class_folders(clean)
    names = by_name(folders, found.classes)
    net, file, arch = network(own, len(names or folders), found)
    images = image_folder(clean, own.input_size, names)
    given, test = (part.to(where) for part in split(images, own.check_share))
    model = Normalized(to_channels_last(net), own.mean or None, own.std or None).to(where).eval()
    method = asked.adapted(method, model, len(given))
    _check_classes(model, test, clean)
    notes = check_clean_set(given, test) if method.data_use != "none" else []
    notes = [*_misused(model, given), *_otherwise_named(file, names), *notes]
    stem = re.sub(r"[^A-Za-z0-9]+", "_", file.path.stem).strip("_")[:80] or "network"
    record = Record(safe_join(run.record_root, run.save_folder_name or f"{stem}_{name}"))
    identity = {"defense": name, **method.identity(), **asdict(own), "clean": fingerprint(images)}
    identity |= {"attacked": file.digest, "random_seed": run.random_seed, "sau": __version__}
    facts = {"method": {"defense": name, **method.params()}, "own": asdict(own), "notes": notes}
    facts["model"] = {"name": arch, "classes": images.num_classes}
    lines = [f"recipe {recipe}, {why}; choose another with --recipe"]
    lines.append(f"{arch} from {file.path}; {len(given)} clean images to purify with, {len(test)} to measure with")
    lines.append(f"classes: {short_names(names or folders)} ({'names in the file' if names else 'folders in order'})")
    begin(record, run, identity, model, method, where, facts, lines, asked.without_effect)
    begun, before = time.monotonic(), score(model, test, None)
    evaluation = time.monotonic() - begun
    # `purify` leaves the network as it is, so that it is the reference throughout.
    risks = gauge(model, test, None, run.risk_samples, run.search(), run.random_seed)
    examine = partial(_examine, record, test, risks, own.reversal_passes, run.random_seed)
    report = {"before": examine("before", model, before)}
    closing = time.monotonic() - begun  # what is measured now is measured again in the end
    epochs = getattr(method, "epochs", 1)
    logger = RunLogger(record, run, epochs, test, lambda: None, started, evaluation, closing_seconds=closing)
    fixed = method.purify(model, given, seed=run.random_seed, session=logger.session(), settings="as_given")
    after = score(fixed, test, None)
    report["after"] = examine("after", fixed, after)
    record.log(table({"before": before, "after": after}))
    _keep(record, fixed.get_submodule("net"), net, "safetensors" if file.kind == SAFE else "pt")
    logger.finish(report)


def _misused(model: nn.Module, images: Images) -> list[str]:
    """A note if the network errs so much on clean images that it seems to be used wrongly."""
    (right,) = proportions(model, images.pixels, images.labels)
    misused = misuse(right.hits, right.total, images.num_classes)
    return [misused] if misused else []


def _otherwise_named(file: weights.Weights, names: list[str] | None) -> list[str]:
    """A note if the file names classes and the folders bear other names."""
    if not file.classes or names:
        return []
    theirs = f"{file.path.name} names its classes {short_names(file.classes)}"
    return [f"{theirs}, which are not the names of the folders; the folders are numbered in order"]


def _keep(record: Record, fixed: nn.Module, net: nn.Module, ending: str) -> None:
    """The purified weights, in the format in which those of `net` came, too."""
    state = fixed.state_dict()
    record.save_tensors("model", state)
    if ending == "pt":
        record.save_tensors("model", state, pickled=True)
    record.log(f"purified weights: {record.path / f'model.{ending}'}")
    if state.keys() != net.state_dict().keys():
        record.log("note: layers were added; sau.record.attack_result.load_weights adds them to your network")


def _check_classes(model: nn.Module, images: Images, place: Path) -> None:
    """ConfigError where the network does not answer with a finite logit for each class folder."""
    what = f"the network does not accept images of {'x'.join(map(str, images.pixels.shape[1:]))}"
    advice = "give its own size with --input_size"
    with translate_errors(lambda reason: ConfigError(f"{what}: {reason}; {advice}")), torch.no_grad():
        logits = model(to_float(images.pixels[:8]))
    if logits.shape[-1] != images.num_classes:
        raise ConfigError(
            f"{place} has {images.num_classes} class folders, the network answers {logits.shape[-1]} classes; "
            "give a folder for each, named by the number of its output (0, 1, 2, ...) or in the same order"
        )
    if not logits.isfinite().all():
        raise ConfigError("the network answers a clean image with NaN or infinity; check mean and std")
    check_logits(logits)


def by_name(folders: list[str], classes: list[str] | None) -> list[str] | None:
    """The file's `classes`, with the spelling of the folders, if every folder bears one of their names, else None."""
    spelt = {name.casefold(): name for name in folders}
    if classes is None or len({name.casefold() for name in classes}) < len(classes):
        return None
    known = spelt.keys() <= {*map(str.casefold, classes)}
    return [spelt.get(name.casefold(), name) for name in classes] if known else None


def _examine(
    record: Record, test: Images, risks: Callable[[nn.Module], Found], passes: int, seed: int, when: str,
    model: nn.Module, found_score: Score,
) -> dict[str, Any]:  # fmt: skip
    """What clean images say of a network, for `summary.json`, and in lines for the screen."""
    found, patches = risks(model), reverse(model, test, passes, seed)
    row, flips = found.row(), concentration(found, test.num_classes)
    text = f"{when:8}R_adv {row['r_adv']:.1f} %, R_share {row['r_share']:.1f} %"
    if flips["count"]:
        text += f"; {flips['share']:.1f} % of {flips['count']} adversarial examples lead to class {flips['class']}"
        text += f" (evenly: {flips['even']:.1f} %)"
    record.log(text)
    report = {**found_score.summary(), "risk": found.summary(), "flips": flips}
    if patches is not None:
        report["reversal"] = patches
        text = f"{when:8}smallest patch: class {patches['class']}, {min(patches['norms']):.1f} pixels"
        suspect = "above 2 is suspect to Neural Cleanse, but clean networks reach that, too"
        record.log(f"{text}, index {patches['index']:.1f} ({suspect})" if patches["index"] is not None else text)
    return report
