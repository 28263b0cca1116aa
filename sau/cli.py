"""The commands: which one is meant, the order of calls from its flags to a finished record, and how it ends."""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import nn

from sau import device as machine
from sau import quality, subject
from sau.attack import ATTACKS, THEIRS, Attack
from sau.attack.resilient import hold_back
from sau.attack.triggers import describe_figures, same_trigger
from sau.compat import pretrained
from sau.data import sources
from sau.data.images import Images
from sau.defense import DEFENSES
from sau.errors import ConfigError, run_command
from sau.evaluate import Score, conclusion, der, figures, has_learned, proportions, reestimate_statistics, score, table
from sau.files import release_all, safe_join, write
from sau.loop import Limit, RunContext, forecast
from sau.models import MODELS, build
from sau.models.normalized import copied
from sau.optim import Training
from sau.record import attack_result
from sau.record.folder import Record
from sau.risk import passes, risk_meter
from sau.run import RECIPES, AttackRun, DefenseRun, OwnRun, RunLogger, begin, identity
from sau.settings import METHODS, Settings, sentence

UNREAD = {"all2all": "attack_target", "all2one": "attack_label_shift_amount"}  # the flag of the other label rule
TOOLS = {"grid": "sau.grid.command:main"}
TOOLS |= {name: f"sau.tools:{name}" for name in ("report", "figures", "verify", "inspect")}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv`, without the program's name, asks for; returns the exit status of `run_command`."""
    how = ", without --overwrite; an attack resumes in its folder, which --save_folder_name names"
    return run_command(lambda: _main(list(argv)), how if argv[:1] and argv[0] in METHODS else "")


def _main(argv: list[str]) -> int:
    kind, name, *flags = [*argv, *[""] * (2 - len(argv))]
    if kind in METHODS and name in METHODS[kind]:
        try:
            (attack if kind == "attack" else defend)(name, flags)
            return 0
        finally:
            release_all()
    if kind in METHODS and name in ("", "--help", "-h"):
        usage = f"usage: sau {kind} NAME [flags]; NAME is one of: {', '.join(METHODS[kind])}"
        print(usage, file=sys.stdout if name else sys.stderr)
        return 0 if name else 2
    if kind == "list" and name in ("", "--help", "-h"):
        print(listing())
        return 0
    if kind not in TOOLS:
        raise ConfigError(f"{' '.join(argv[:2])!r} is no command; see sau --help and sau list")
    try:
        status: int = resolve_name(TOOLS[kind])(argv[1:])
    except ModuleNotFoundError as missing:
        raise ConfigError(f"sau {kind} needs {missing.name}; pip install -e '.[report]'") from None
    return status


def listing() -> str:
    """The attacks, defenses, data sets and recipes, one line each."""
    lines = list[str]()
    for kind, methods in METHODS.items():
        lines += [f"{kind}s:", *(f"  {name:11} {sentence(kind, method)}" for name, method in methods.items())]
    lines += ["data sets:", *(f"  {name:11} {source.about}" for name, source in sources.SOURCES.items())]
    lines += ["recipes:", *(f"  {name:11} {about}" for name, about in RECIPES.items())]
    return "\n".join(lines)


def attack(name: str, argv: Sequence[str]) -> None:
    """Poison, train, measure, record."""
    started = time.monotonic()
    asked = Settings(f"sau attack {name}", ATTACKS[name], (AttackRun, Training, ATTACKS[name]), argv)
    dataset = asked.get("dataset")
    origin, (recipe, why) = sources.source(dataset), asked.recipe()
    run, training, method = asked.settle(recipe, dataset)
    if run.attack and (other := THEIRS.get(run.attack.lower(), run.attack.lower())) != name:
        advice = f" or run attack/{other}.py" if other in ATTACKS else f"; attacks are {', '.join(ATTACKS)}"
        raise ConfigError(f"--attack is {run.attack!r}, but this is {name}; leave it out{advice}")
    device = machine.prepare(asked.device)
    folder = run.save_folder_name or time.strftime(f"%Y%m%d_%H%M%S_{name}")
    record = Record(safe_join(run.record_root, folder), started)
    train, test = sources.load(dataset, run.dataset_path, run.img_size)
    notes = sources.subset_note(dataset, train, test)
    data = {"dataset": dataset, "train": sources.fingerprint(train), "test": sources.fingerprint(test)}
    train, test = train.to(device), test.to(device)
    # `build` refuses the flag where a network has no width; a file of settings may be for several networks.
    width, shape = run.width if run.model in MODELS or "width" in asked.given else None, list(train.pixels.shape[1:])
    network = {"name": run.model, "classes": train.num_classes, "width": width, "shape": shape}
    network |= {"mean": list(origin.mean), "std": list(origin.std)}
    torch.manual_seed(run.random_seed)
    model = build(run.model, train.num_classes, width=width, shape=shape, mean=origin.mean, std=origin.std).to(device)

    determined = identity(method, run, {**training.params(), **data, **network})
    record.can_start(determined, run.overwrite, run.amp)  # before a trigger is made, which may take long
    machine.set_threads(run.threads, record.config.get("threads"))  # the bits of a trigger depend on them
    how = {"augment": origin.augment, "seed": run.random_seed}
    limit = Limit(started + 60 * run.max_minutes, whole=True) if run.max_minutes else None
    method = method.fit_trigger(train, model, training, session=RunContext(limit=limit), **how)
    poisoned, triggered = method.poison_train(train, run.random_seed), method.poison_test(test)
    trained_on, _ = hold_back(poisoned, method.sbl, run.random_seed)
    if poisoned is train and method.pratio and not method.in_batch:
        notes.append(f"pratio {method.pratio:g} of {len(train)} images is less than one, so nothing is poisoned")
    mark = same_trigger(record, None if method.trains_trigger else method.trigger)
    facts: dict[str, Any] = {"method": {"attack": name, **method.params(), **training.params()}, "data": data}
    facts |= {"model": network, "notes": notes, "trigger_digest": mark}
    size = f", width {width}" if width else ""
    line = f"recipe {recipe} ({why}): {run.model}{size}, {training.epochs} epochs; choose another with --recipe"
    asked.ignore(["width"] if width is None else [], f"{run.model} has no width")
    asked.ignore([UNREAD[method.attack_label_trans]], f"labels follow {method.attack_label_trans}")
    begin(record, run, determined, model, method, device, facts, [line], asked.ignored)
    plan = method.describe(trained_on, training.batch_size)
    record.log(f"{name} on {dataset}: {plan}, {len(triggered)} triggered test images; {record.path}")
    each = machine.seconds_per_image(model, shape, device) * (len(test) + len(triggered))
    again = partial(method.poison_test, test) if method.trains_trigger else lambda: triggered
    logger = RunLogger(record, run, method.classifier_epochs(training), test, again, each)
    method.fit(model, poisoned, recipe=training, session=logger.session, **how)
    triggered = again()
    final, _ = logger.final(model)
    attack_result.save(record, model, method.poisoned_samples(trained_on), triggered, method.trigger)
    record.log(table({"attacked": final}))
    found = _trigger(record, method, model, test, triggered, run.trigger_radius)
    if not (learned := has_learned(final.acc, train.num_classes)):
        record.log(f"warning: ACC {final.acc.percent:.1f} is too low for an ASR to count; try more --epochs")
    if gate := method.gate(dataset, final.asr):
        _warn_below(record, gate, final, "this attack", f"try {method.remedy}")
        gate["passed"] &= learned
        found["gate"] = gate
    logger.finish({**final.summary(), **found})


def defend(name: str, argv: Sequence[str]) -> None:
    """Load what an attack left, or a network of your own; purify, measure before and after, record."""
    started = time.monotonic()
    asked = Settings(f"sau defense {name}", DEFENSES[name], (DefenseRun, OwnRun, DEFENSES[name]), argv)
    run, method, given = subject.of(asked)
    device = machine.prepare(asked.device)
    model, clean, test = given.model.to(device), given.images.to(device), given.test.to(device)
    triggered = given.triggered and given.triggered.to(device)
    method = method.fitted(asked.replaced(), model, len(clean), given.lines.append)

    record, determined = Record(given.folder, started), identity(method, run, given.identity)
    facts = {"method": {"defense": name, **method.params()}, **given.facts, "notes": given.notes}
    begin(record, run, determined, model, method, device, facts, given.lines, asked.ignored)
    torch.manual_seed(run.random_seed)
    begun, before = time.monotonic(), score(model, test, triggered)
    seconds = time.monotonic() - begun
    _warn_below(record, given.gate, before, "the attack of this record", "results of defenses on it say nothing")
    risks = None
    if run.track_risk or given.own:  # `purify` leaves the network as it is, so that it is the reference throughout
        images, each = min(len(test), run.risk_samples), seconds / (len(test) + (len(triggered) if triggered else 0))
        forecast("the search for the risks", images * each * passes(run.search(), bool(triggered)), record.log)
        risks = risk_meter(model, test, triggered, run.risk_samples, run.search(), run.random_seed)
    threat, searched = risks and risks(model), time.monotonic() - begun - seconds
    # Each evaluation measures the risks, or only the end does.
    expected = (seconds + searched, risks, 0.0) if run.track_risk else (seconds, None, searched)
    epochs = getattr(method, "epochs", 1)
    logger = RunLogger(record, run, epochs, test, lambda: triggered, *expected)
    if oracle := method.selection == "oracle":
        logger.session.judge = partial(score, clean=test, triggered=triggered)
    how: Any = {"augment": given.augment, "seed": run.random_seed, "settings": "as_given"}
    fixed = method.purify(model, clean, session=logger.session, **how)
    after, found = logger.final(fixed)
    _keep(record, fixed, model, given)
    record.log(table({"before": before, "oracle" if oracle else "after": after}))
    scores: dict[str, Any] = {"before": before.summary(), "after": after.summary(), "der": der(before, after)}
    scores |= {"selection": method.selection, "data": given.kind}
    scores |= {"gate": given.gate} if given.gate else {}
    if risks and threat:
        found = found or risks(fixed)
        for risk, sign in {"r_adv": "R_adv", "r_share": "R_share", "r_share_sau": "R_share by SAU's search"}.items():
            rates = [each.shares()[risk].percent for each in (threat, found)]
            record.log(f"{sign} {rates[0]:.1f} % before, {rates[1]:.1f} % after")
        scores["risk"] = {"before": threat.summary(), "after": found.summary(), "search": asdict(run.search())}
    if given.own and risks and reestimate_statistics(again := copied(fixed), clean, given.augment):
        scores["statistics_anew"] = {**score(again, test).summary(), "risk": risks(again).summary()}
    if not given.own:
        looks = method.data_use != "none"
        record.log(conclusion(before, after, not given.gate or given.gate["passed"], looks))
    logger.finish(scores)


def _keep(record: Record, fixed: nn.Module, model: nn.Module, given: subject.Subject) -> None:
    """The purified weights, in the format or the folder that they came in, too."""
    net = fixed.get_submodule("net")
    if given.configs:
        for name, content in {**given.configs, **pretrained.saved(net)}.items():
            write(record.path / name, content)
        record.log(f"purified folder: {record.path}, opened as the one that it came in")
        return
    state = net.state_dict()
    record.save_tensors("model", state)
    if given.pickled:
        record.save_tensors("model", state, pickled=True)
        record.log(f"purified weights: {record.path / 'model.pt'}")
    if fixed.state_dict().keys() != model.state_dict().keys():
        record.log("note: layers were added; sau.record.attack_result.load_weights adds them to your network")


def _warn_below(record: Record, gate: dict[str, Any] | None, found: Score, which: str, advice: str) -> None:
    """Warn of an attack that is below its gate; see `Attack.gate`."""
    if gate and not gate["passed"] and found.asr:
        asr = f"ASR {found.asr.percent:.1f}, gate {gate['asr']:g}"
        why = asr if found.asr.percent < gate["asr"] else f"ACC {found.acc.percent:.1f} is too low"
        record.log(f"warning: {which} did not take: {why}; {advice}")


def _trigger(
    record: Record, method: Attack, model: nn.Module, test: Images, triggered: Images, radius: float
) -> dict[str, Any]:
    """How well the trigger hides and how well it was made, and what the network answers to triggers that must do
    nothing; for the summary, and in lines."""
    hidden, crossed = quality.of_attack(test, triggered, radius), method.cross_test_set(test)
    if hidden is not None:
        record.log(quality.describe(hidden))
        if made := getattr(method.trigger, "figures", None):
            hidden["made"] = dict(made)
            record.log(f"trigger as it was made: {describe_figures(made)}")
    if crossed is None:
        return {"trigger": hidden}
    (share,) = proportions(model, crossed.pixels, crossed.labels)
    record.log(f"cross ACC {share.percent:.2f} %, on test images with a trigger that must have no effect")
    return {"trigger": hidden, **figures({"cross_acc": share})}
