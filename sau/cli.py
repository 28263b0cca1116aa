"""The order of calls behind `attack/NAME.py`, `defense/NAME.py` and `python -m sau`."""

import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import sau
from sau import device as machine
from sau.attack import ATTACKS
from sau.config import IGNORED
from sau.data.images import Images
from sau.data.sources import clean_subset, fingerprint, load, source
from sau.defense import DEFENSES
from sau.errors import ConfigError, RecordError, SauError
from sau.evaluate import der, score, table
from sau.models import Normalized, build
from sau.optim import Training
from sau.record import Record, folder
from sau.request import AttackRun, DefenseRun, Request, Run
from sau.watch import Watch


class _Terminated(BaseException):
    """SIGTERM, on its way out."""


def main(argv: Sequence[str]) -> int:
    """`attack NAME ...` or `defense NAME ...`; returns the exit status: 2 for a user's mistake, 130 and 143 if stopped."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        kinds = {"attack": (ATTACKS, attack), "defense": (DEFENSES, defend)}
        if len(argv) < 2 or argv[0] not in kinds or argv[1] not in kinds[argv[0]][0]:
            names = "; ".join(f"{kind} {{{','.join(methods)}}}" for kind, (methods, _) in kinds.items())
            print(f"usage: python -m sau KIND NAME [flags], with KIND NAME one of: {names}", file=sys.stderr)
            return 0 if list(argv) in (["--help"], ["-h"]) else 2
        kinds[argv[0]][1](argv[1], argv[2:])
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, _Terminated) as stop:
        print("\nstopped; repeat the command to resume from the last checkpoint", file=sys.stderr)
        return 143 if isinstance(stop, _Terminated) else 130
    return 0


def _terminate(number: int, frame: Any) -> None:
    raise _Terminated


def attack(name: str, argv: Sequence[str]) -> None:
    """Poison, train, measure, record."""
    started = time.monotonic()
    method_class = ATTACKS[name]
    request = Request(f"attack/{name}.py", method_class, (AttackRun, Training, method_class), argv)
    dataset = request.said("dataset") or AttackRun.dataset
    recipe, why = _recipe(request)
    run, training, method = request.settle("attack", recipe, dataset)
    if run.attack not in (None, name):
        raise ConfigError(f"--attack is {run.attack!r}, but this is {name}; leave it out or run attack/{run.attack}.py")
    where, threads = machine.choose_device(run.device), machine.set_threads(run.threads)
    origin = source(dataset)
    clean_train, clean_test = load(dataset, run.dataset_path)
    poisoned = method.poison_train(clean_train, run.random_seed).to(where)
    triggered, test = method.poison_test(clean_test).to(where), clean_test.to(where)
    torch.manual_seed(run.random_seed)
    model = build(run.model, origin.classes, width=run.width, mean=origin.mean, std=origin.std).to(where)

    record = Record(folder(run.record_root, run.save_folder_name or time.strftime(f"%Y%m%d_%H%M%S_{name}")))
    data = {"dataset": dataset, "train": fingerprint(clean_train), "test": fingerprint(clean_test)}
    shape = {"name": run.model, "classes": origin.classes, "width": run.width, "shape": list(origin.shape)}
    settings = {"attack": name, **method.params(), **training.params()}
    _begin(record, run, {**settings, **data, **shape, "random_seed": run.random_seed}, threads)
    record.note(method=settings, data=data, model={**shape, "mean": list(origin.mean), "std": list(origin.std)})
    record.say(f"recipe {recipe} ({why}): width {run.width}, {training.epochs} epochs; choose another with --recipe")
    _warn(record, request)
    model.amp = _precision(record, run, model, origin.shape, training.batch_size, where)
    changed = int((poisoned.labels != poisoned.true_labels).sum())
    record.say(
        f"{name} on {dataset}: {int((poisoned.role > 0).sum())} of {len(poisoned)} pictures poisoned, {changed} labels "
        f"changed, {len(triggered)} triggered test pictures; {record.path}"
    )
    torch.manual_seed(run.random_seed)
    each = machine.seconds_per_image(model.eval(), origin.shape, where) * (len(test) + len(triggered))
    watch = Watch(record, run, training.epochs, test, triggered, started, each)
    method.fit(model, poisoned, training, augment=origin.augment, seed=run.random_seed, session=watch.session())

    final = watch.last or score(model, test, triggered)
    record.save_tensors("model", model.net.state_dict())
    kept = poisoned[(poisoned.role > 0).nonzero().flatten()]
    for part, images in (("poisoned", kept), ("triggered", triggered)):
        if len(images):
            record.save_tensors(part, images.tensors())
    record.say(table({"attacked": final}))
    record.finish({**final.summary(), "seconds": watch.seconds, "peak_memory_mb": machine.peak_memory_mb(where)})


def defend(name: str, argv: Sequence[str]) -> None:
    """Load an attack's record, purify, measure before and after, record."""
    started = time.monotonic()
    method_class = DEFENSES[name]
    request = Request(f"defense/{name}.py", method_class, (DefenseRun, method_class), argv)
    target = request.said("result_file")
    if target is None:
        raise ConfigError("no --result_file; give the folder name that an attack was saved under")
    attacked = Record(folder(request.said("record_root") or Run.record_root, target))
    made = attacked.check()
    dataset, recipe = made["data"]["dataset"], request.said("recipe") or made["run"]["recipe"]
    says = {"dataset": dataset, "model": made["model"]["name"], "dataset_path": made["run"]["dataset_path"]}
    recipe = made["run"]["recipe"] if recipe == "auto" else recipe
    run, method = request.settle("defense", recipe, dataset, says)
    where, threads = machine.choose_device(run.device), machine.set_threads(run.threads)
    clean_train, clean_test = load(dataset, run.dataset_path)
    if (seen := {"train": fingerprint(clean_train), "test": fingerprint(clean_test)}) != {
        part: made["data"][part] for part in ("train", "test")
    }:
        raise RecordError(f"{run.dataset_path} holds other pictures of {dataset} than the attack saw; mend --dataset_path")
    clean = clean_subset(clean_train, run.ratio, run.random_seed, run.index).to(where)
    test, triggered = clean_test.to(where), _triggered(attacked, made["model"]["classes"], where)
    model = restore(attacked).to(where)

    record = Record(attacked.path / "defense" / name)
    settings = {"defense": name, **method.params(), "clean": fingerprint(clean)}
    _begin(record, run, {**settings, **seen, "attacked": made["digest"], "random_seed": run.random_seed}, threads)
    record.note(method=settings, data=made["data"], model=made["model"], clean_index=clean.index.tolist())
    record.say(f"recipe {recipe}, {len(clean)} clean pictures of {dataset}; {record.path}")
    _warn(record, request)
    model.amp = _precision(record, run, model, tuple(made["model"]["shape"]), method.batch_size, where)
    torch.manual_seed(run.random_seed)
    begun = time.monotonic()
    before = score(model, test, triggered)
    watch = Watch(record, run, getattr(method, "epochs", 1), test, triggered, started, time.monotonic() - begun)
    fixed = method.purify(
        model, clean, augment=source(dataset).augment, seed=run.random_seed, session=watch.session()
    )
    after = score(fixed, test, triggered)
    rating = der(before, after)
    record.save_tensors("model", fixed.net.state_dict())
    record.say(table({"before": before, "after": after}, rating))
    record.finish(
        {
            "before": before.summary(),
            "after": after.summary(),
            "der": rating,
            "seconds": watch.seconds,
            "peak_memory_mb": machine.peak_memory_mb(where),
            "selection": method.selection,
        }
    )


def restore(record: Record) -> Normalized:
    """The network of a checked record, on the CPU; RecordError if the weights are not those of the named network."""
    made = record.config["model"]
    model = build(made["name"], made["classes"], width=made["width"], mean=made["mean"], std=made["std"])
    weights = record.load_tensors("model")
    own = model.net.state_dict()
    wrong = [name for name in {**own, **weights} if name not in own or weights.get(name, own[name][None]).shape != own[name].shape]
    if wrong:
        raise RecordError(f"{record.path}: the weights do not fit {made['name']} of width {made['width']}: {wrong[0]}")
    model.net.load_state_dict(weights)
    return model.eval()


def _recipe(request: Request) -> tuple[str, str]:
    """The recipe of an attack and why it is that one."""
    chosen = request.said("recipe") or "auto"
    if chosen != "auto":
        return chosen, "as asked"
    cuda = machine.choose_device(request.said("device") or "auto").type == "cuda"
    return ("paper", "the default on CUDA") if cuda else ("cpu", "the default without CUDA")


def _begin(record: Record, run: Run, identity: dict[str, Any], threads: int) -> None:
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    record.begin(
        {
            "run": asdict(run),
            "command": shlex.join(sys.argv),
            "threads": threads,
            "git": git.stdout.strip() or None,
            "versions": {"sau": sau.__version__, "torch": torch.__version__, "python": platform.python_version()},
        },
        {**identity, "sau": sau.__version__},
        run.overwrite,
    )


def _warn(record: Record, request: Request) -> None:
    if request.ignored:
        reasons = "; ".join(f"--{name}: {IGNORED[name]}" for name in request.ignored)
        record.say(f"warning: flags without effect here: {reasons}")


def _precision(
    record: Record, run: Run, model: Normalized, shape: tuple[int, int, int], batch_size: int, where: torch.device
) -> bool:
    """bf16 or not: as asked, as before the interruption, or whichever is faster."""
    if run.amp is not None:
        amp = run.amp
    elif "amp" in record.config:
        amp = record.config["amp"]
    else:
        amp = machine.bf16_is_faster(model, shape, batch_size, where)
    record.note(amp=amp)
    record.say(f"precision {'bf16' if amp else 'fp32'} on {where}, {torch.get_num_threads()} threads")
    return amp


def _triggered(record: Record, classes: int, where: torch.device) -> Images | None:
    """The triggered test set of a checked record, or None for a clean network."""
    if not (record.path / "triggered.safetensors").is_file():
        return None
    return Images(**record.load_tensors("triggered"), num_classes=classes).to(where)
