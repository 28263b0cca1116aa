"""A network that somebody hands over: weights from a file that is never run, clean pictures, no trigger.

Nobody knows its trigger, so no ASR is claimed. The report says what clean pictures alone can say: the accuracy, the
adversarial risks (`sau.risk`), and where adversarial examples lead: a backdoor draws them to its class.
"""

import importlib
import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sau.clues import Reversal, clean_indices, concentration, reverse
from sau.data.folders import labelled
from sau.data.images import Images
from sau.data.scrutiny import scrutinise
from sau.data.sources import fingerprint
from sau.defense.base import Defense
from sau.errors import ConfigError, DataError
from sau.evaluate import Score, score, table
from sau.files import folder
from sau.foreign import weights
from sau.machine import device as machine
from sau.machine.devices import place, spread
from sau.machine.tuning import tune
from sau.models import Normalized, has_width, quick
from sau.models.guess import guess, plain
from sau.record.folder import Record
from sau.request import Request
from sau.risk import Found, gauge
from sau.run import DefenseRun
from sau.watch import Watch, begin, warn


@dataclass(frozen=True, kw_only=True)
class OwnRun:
    """What a defense is asked about a network of your own; all but `model_file` and `clean_dir` may be left out.

    Args:
        model_file: .pt, .pth, .ckpt or .safetensors file with the weights of a network of yours, instead of
            result_file; it is read without running anything in it.
        clean_dir: folder with a folder of clean pictures for each class; classes are numbered by name.
        arch: auto finds the network by names and shapes of the weights; or its name, or module:function, which is
            imported and called without arguments.
        trust_code: allow module:function, which runs that code.
        mean: per-channel mean (of pixels in [0, 1]) that the network expects to be subtracted, like 0.49,0.48,0.45.
        std: per-channel standard deviation that it expects to be divided by.
        input_size: height and width that the pictures are brought to.
        check_share: share of each class's pictures that measures and is not purified with, in (0, 1).
        reversal_passes: passes of the search for the smallest patch of each class, before and after; 0 leaves it out.
            The clean networks beside it were searched with 40.
    """

    model_file: str | None = None
    clean_dir: str | None = None
    arch: str = "auto"
    trust_code: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    input_size: int = 32
    check_share: float = 0.2
    reversal_passes: int = 40

    def __post_init__(self) -> None:
        for name, fine, allowed in (
            ("clean_dir", (self.model_file is None) == (self.clean_dir is None), "given together with model_file"),
            ("std", len(self.mean) == len(self.std) in (0, 1, 3), "as many values as mean: none, 1 or 3"),
            ("std", all(value > 0 for value in self.std), "above 0"),
            ("input_size", self.input_size >= 1, "1 and more"),
            ("check_share", 0 < self.check_share < 1, "above 0, below 1"),
            ("reversal_passes", self.reversal_passes >= 0, "0 and more"),
        ):
            if not fine:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed is {allowed}")


def network(run: OwnRun, classes: int) -> tuple[nn.Module, weights.Weights, str]:
    """The network with its weights, their file, and the network's name.

    ConfigError for a network that cannot be found or trusted, RecordError for weights that are not its own.
    """
    found = weights.read(Path(str(run.model_file)))
    if ":" in run.arch:
        net, name = _imported(run), run.arch
    elif run.arch == "auto":
        known = guess(found)
        if known is None:
            raise ConfigError(f"{found.path} holds no known network; name it with --arch NAME or module:function")
        net, name = plain(known.name, known.classes, known.width), known.name
    else:
        net, name = plain(run.arch, classes, _width(found) if has_width(run.arch) else None), run.arch
    net.load_state_dict(found.of(net.state_dict()))
    return net.eval(), found, name


def _imported(run: OwnRun) -> nn.Module:
    module, _, function = run.arch.partition(":")
    if not run.trust_code:
        raise ConfigError(f"--arch {run.arch} would run code of {module}; say --trust_code true if you trust it")
    try:
        made = getattr(importlib.import_module(module), function)()
    except Exception as error:  # whatever foreign code raises
        raise ConfigError(f"--arch {run.arch} failed: {type(error).__name__}: {error}") from None
    if not isinstance(made, nn.Module):
        raise ConfigError(f"--arch {run.arch} returned {type(made).__name__}, wanted is a torch.nn.Module")
    return made


def _width(found: weights.Weights) -> int:
    """Channels of the first convolution."""
    return next((len(value) for value in found.tensors.values() if value.ndim == 4), 64)


def split(images: Images, share: float) -> tuple[Images, Images]:
    """(to purify with, to measure with): the last `share` of each class measures, at least one picture."""
    keep = torch.ones(len(images), dtype=torch.bool)
    for label in range(images.num_classes):
        places = (images.labels == label).nonzero()[:, 0]
        if len(places) < 2:
            raise DataError(
                f"class {label} has {len(places)} clean pictures; each class needs two, one to measure with"
            )
        keep[places[-max(1, round(share * len(places))) :]] = False
    return images[keep.nonzero()[:, 0]], images[(~keep).nonzero()[:, 0]]


def purify(name: str, method: Defense, run: DefenseRun, own: OwnRun, request: Request) -> None:
    """Purify, and report what clean pictures say before and after."""
    started = time.monotonic()
    where, threads = place(run, method, method.batch_size), machine.set_threads(run.threads)
    if method.needs == "poisoned" or method.selection == "oracle":
        raise ConfigError(f"{name} needs the attacker's pictures, which a network of your own does not come with")
    images = labelled(Path(str(own.clean_dir)), own.input_size)
    given, test = (part.to(where) for part in split(images, own.check_share))
    net, file, arch = network(own, images.num_classes)
    model = Normalized(quick(net), own.mean or None, own.std or None).to(where).eval()
    stem = re.sub(r"\W+", "_", Path(str(own.model_file)).stem)
    record = Record(folder(run.record_root, run.save_folder_name or f"{stem}_{name}"))
    settings = {"defense": name, **method.params()}
    identity = {**settings, **method.contents(), **asdict(own), "clean": fingerprint(images), "attacked": file.digest}
    begin(record, run, {**identity, "random_seed": run.random_seed}, threads)
    notes = scrutinise(given, test, method.batch_size)
    record.note(method=settings, model={"name": arch, "classes": images.num_classes}, own=asdict(own), notes=notes)
    record.say(f"{arch} from {file.path}; {len(given)} clean pictures to purify with, {len(test)} to measure with")
    warn(record, request, notes)
    shape, epochs = (3, own.input_size, own.input_size), getattr(method, "epochs", 1)
    tune(record, run, model, method, shape, method.batch_size, epochs * len(given), where)
    begun = time.monotonic()
    before = score(model, test, None)
    evaluation = time.monotonic() - begun
    # `purify` leaves the network as it is, so that it is the reference throughout.
    measured = gauge(model, test, None, run.risk_samples, run.search(), run.random_seed)
    inverted = partial(_inverted, images=test, own=own, seed=run.random_seed)
    threat, patches = measured(model), inverted(model)
    closing = time.monotonic() - begun  # what is measured now is measured again in the end
    watch = Watch(record, run, epochs, test, lambda: None, started, evaluation, closing_seconds=closing)
    fixed = spread(run.devices, method.purify, model, given, seed=run.random_seed, session=watch.session())
    after, left, smaller = score(fixed, test, None), measured(fixed), inverted(fixed)
    record.say(table({"before": before, "after": after}))
    classes = images.num_classes
    report = {
        "before": _report(record, "before", before, threat, patches, classes),
        "after": _report(record, "after", after, left, smaller, classes),
    }
    state = fixed.get_submodule("net").state_dict()
    record.save_tensors("model", state)
    if file.kind != weights.SAFE:
        record.save_tensors("model", state, pickled=True)
    record.say(f"purified weights: {record.path / ('model.safetensors' if file.kind == weights.SAFE else 'model.pt')}")
    watch.finish(report)


def _inverted(model: nn.Module, images: Images, own: OwnRun, seed: int) -> Reversal | None:
    """The smallest patch of each class, if that was asked for."""
    return reverse(model, images, own.reversal_passes, seed) if own.reversal_passes else None


def _report(
    record: Record, when: str, accuracy: Score, found: Found, patches: Reversal | None, classes: int
) -> dict[str, Any]:
    """What is said of a network, for `summary.json`, and in a line for the screen."""
    risks, flips = found.row(), concentration(found, classes)
    text = f"{when:8}R_adv {risks['r_adv']:.1f} %, R_share {risks['r_share']:.1f} %"
    if flips["count"]:
        text += f"; {flips['share']:.1f} % of {flips['count']} adversarial examples lead to class {flips['class']}"
        text += f" (evenly: {flips['even']:.1f} %)"
    record.say(text)
    report = {**accuracy.summary(), "risk": found.summary(), "flips": flips}
    if patches is not None:
        report["reversal"] = patches.summary(clean_indices())
        record.say(f"{when:8}{patches.text(clean_indices())}")
    return report
