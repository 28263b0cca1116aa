"""What `attack/NAME.py` and `defense/NAME.py` do, from the flags to a finished record: the order of calls."""

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sau import quality
from sau.attack import ATTACKS, THEIRS, Attack
from sau.attack.triggers import describe_figures, same_trigger
from sau.command import own_network
from sau.command.request import Request
from sau.command.watch import Watch, begin, trigger_session, versioned, warn
from sau.config import Method
from sau.data.images import Images
from sau.data.sources import Source, check_clean_set, clean_subset, fingerprint, index_note, load, source, subset_note
from sau.defense import DEFENSES
from sau.defense.base import Defense
from sau.errors import ConfigError, RecordError
from sau.evaluate import Score, accuracy, der, figures, score, table, verdict
from sau.files import existing, safe_join
from sau.models import build, has_width
from sau.optim import Training
from sau.record import attack_result, lock, schema
from sau.record.folder import CONFIG, Record
from sau.risk import gauge
from sau.runtime import device as machine
from sau.runtime.device import choose_precision
from sau.settings.run import AttackRun, DefenseRun, OwnRun, Run

METHODS: dict[str, Mapping[str, type[Method]]] = {"attack": ATTACKS, "defense": DEFENSES}


def run(kind: str, name: str, argv: Sequence[str]) -> int:
    """The exit status of `attack` or `defend`; one that is stopped says how to go on."""
    try:
        (attack if kind == "attack" else defend)(name, argv)
        return 0
    except KeyboardInterrupt:
        print(f"\n{_onward(kind == 'attack')}", file=sys.stderr)
        return 130
    finally:
        lock.release_all()


def _onward(attacks: bool) -> str:
    """How to resume the stopped command, by the folder that it began."""
    began, settings = lock.first(), dict[str, Any]()
    if began is not None and not Record(began).finished:  # else the one to overwrite was not touched yet
        with suppress(RecordError):
            settings = schema.read_config(began / CONFIG).get("run", {})
    if began is None or not settings:
        return "stopped; repeat the command to go on"
    named = f" with --save_folder_name {began.name}" if attacks and settings.get("save_folder_name") is None else ""
    afresh = " without overwrite" if settings.get("overwrite") else ""
    return f"stopped; repeat the command{named}{afresh} to resume from the last checkpoint"


def attack(name: str, argv: Sequence[str]) -> None:
    """Poison, train, measure, record."""
    started = time.monotonic()
    request = Request(f"sau attack {name}", ATTACKS[name], (AttackRun, Training, ATTACKS[name]), argv)
    dataset = request.said("dataset") or AttackRun.dataset
    origin, (recipe, why) = source(dataset), request.recipe()
    request.help(recipe, dataset)
    run, training, method = request.settle(recipe, dataset)
    _check_name(run.attack or name, name)
    where, threads = machine.prepare(machine.choose_device(run.device)), machine.set_threads(run.threads)
    record = Record(safe_join(run.record_root, run.save_folder_name or time.strftime(f"%Y%m%d_%H%M%S_{name}")))
    train, test = load(dataset, run.dataset_path, run.img_size)
    notes = [note] if (note := subset_note(dataset, train, test)) else []
    data = {"dataset": dataset, "train": fingerprint(train), "test": fingerprint(test)}
    train, test = train.to(where), test.to(where)
    torch.manual_seed(run.random_seed)
    network = _network(request, run, train, origin)
    shape, width = network["shape"], network["width"]
    model = build(run.model, train.num_classes, width=width, shape=shape, mean=origin.mean, std=origin.std).to(where)

    identity = {"attack": name, **method.identity(), **training.params(), **data, **network}
    identity["random_seed"] = run.random_seed
    record.can_start(versioned(identity), run.overwrite, asdict(run))  # before a trigger is made, which may take long
    how = {"augment": origin.augment, "seed": run.random_seed}
    method = method.fit_trigger(train, model, training, session=trigger_session(run, started), **how)
    poisoned, triggered = method.poison_train(train, run.random_seed), method.poison_test(test)
    if poisoned is train and method.pratio and not method.in_batch:
        notes.append(f"pratio {method.pratio:g} of {len(train)} pictures is less than one, so nothing is poisoned")
    begin(record, run, identity, threads)
    same_trigger(record, None if method.trains_trigger else method.trigger)
    settings = {"attack": name, **method.params(), **training.params()}
    record.update_config(method=settings, data=data, model=network, notes=notes)
    size = f", width {width}" if width else ""
    record.log(f"recipe {recipe} ({why}): {run.model}{size}, {training.epochs} epochs; choose another with --recipe")
    warn(record, request, notes)
    epochs = method.classifier_epochs(training)
    choose_precision(record, run, model, method, where)
    plan = method.describe(poisoned, training.batch_size)
    record.log(f"{name} on {dataset}: {plan}, {len(triggered)} triggered test pictures; {record.path}")
    torch.manual_seed(run.random_seed)
    each = machine.seconds_per_image(model.eval(), shape, where) * (len(test) + len(triggered))
    again = partial(method.poison_test, test) if method.trains_trigger else lambda: triggered
    watch = Watch(record, run, epochs, test, again, started, each)
    method.fit(model, poisoned, recipe=training, session=watch.session(), **how)
    triggered = again()
    final = watch.final(model, triggered)
    attack_result.save(record, model, method.poisoned_samples(poisoned), triggered, method.trigger)
    record.log(table({"attacked": final}))
    found = _trigger(record, method, model, test, triggered, run.trigger_radius)
    if gate := method.gate(dataset, final.asr):
        found["gate"] = gate
        _judge(record, gate, final, "this attack", f"try {method.remedy}")
    watch.finish({**final.summary(), **found, "peak_memory_mb": machine.peak_memory_mb(where)})


def defend(name: str, argv: Sequence[str]) -> None:
    """Load what an attack left, purify, measure before and after, record."""
    started = time.monotonic()
    request = Request(f"sau defense {name}", DEFENSES[name], (DefenseRun, OwnRun, DEFENSES[name]), argv)
    if request.said("result_file") is None:
        own = "folder" if request.said("model_file") is not None else None
        request.help(request.recipe()[0], own or request.said("dataset") or Run.dataset)
    if request.said("model_file") is not None and request.said("result_file") is None:
        return own_network.purify(name, request)
    attacked = attack_result.load(existing(request.said("record_root") or Run.record_root, _target(request)))
    recipe, why = request.recipe(attacked.recipe)
    request.help(recipe, attacked.dataset, _says(attacked))
    run, _, method = request.settle(recipe, attacked.dataset, _says(attacked))
    request.ignore((field.name for field in fields(OwnRun)), "it is about a network of your own")
    where, threads = machine.prepare(machine.choose_device(run.device)), machine.set_threads(run.threads)
    offered = attacked.offers("poisoned" if method.data_use == "poisoned" else "clean")
    place_of_data = run.dataset_path if "dataset_path" in request.asked else None
    given, test, notes = _given(attacked, run, method, offered, place_of_data)
    given, test, triggered = given.to(where), test.to(where), attacked.triggered and attacked.triggered.to(where)
    model = attacked.model().to(where)
    method = request.adapted(method, model, len(given))

    record = Record(safe_join(attacked.path, "defense", run.save_folder_name or name))
    identity = {"defense": name, **method.identity(), "clean": fingerprint(given), "attacked": attacked.digest}
    begin(record, run, {**identity, "random_seed": run.random_seed}, threads)
    facts = {"data": {"dataset": attacked.dataset}, "model": attacked.network, "attacked": attacked.digest}
    record.update_config(
        method={"defense": name, **method.params()}, **facts, notes=notes, clean_index=given.index.tolist()
    )
    looks = method.data_use != "none"
    pictures = f"{len(given):,} {offered} pictures of {attacked.dataset}" if looks else "it looks at no pictures"
    record.log(f"recipe {recipe} ({why}): {pictures}; {record.path}")
    warn(record, request, notes)
    epochs = getattr(method, "epochs", 1)
    choose_precision(record, run, model, method, where)
    torch.manual_seed(run.random_seed)
    begun, before = time.monotonic(), score(model, test, triggered)
    _judge(record, attacked.gate, before, "the attack of this record", "what a defense does with it says nothing")
    risks = None
    if run.track_risk:  # `purify` leaves the attacked network as it is, so that it is the reference throughout
        risks = gauge(model, test, triggered, run.risk_samples, run.search(), run.random_seed)
    threat = risks(model).summary() if risks else None
    evaluation = time.monotonic() - begun
    watch = Watch(record, run, epochs, test, lambda: triggered, started, evaluation, risks)
    augment = source(attacked.dataset).augment
    judge = partial(score, clean=test, triggered=triggered if method.by_asr else None)
    session = replace(watch.session(), judge=judge if method.selection == "oracle" else None)
    how: Any = {"augment": augment, "seed": run.random_seed, "settings": "as_given"}
    fixed = method.purify(model, given, session=session, **how)
    after = watch.final(fixed, triggered)
    record.save_tensors("model", fixed.get_submodule("net").state_dict())
    rating = der(before, after)
    record.log(table({"before": before, "oracle" if method.selection == "oracle" else "after": after}))
    record.log(verdict(before, after, not attacked.gate or attacked.gate["passed"], looks))
    scores: dict[str, Any] = {"before": before.summary(), "after": after.summary(), "der": rating}
    scores |= {"selection": method.selection, "data": offered}
    scores |= {"gate": attacked.gate} if attacked.gate else {}
    if risks:
        scores["risk"] = {"before": threat, "after": watch.last_risks(fixed), "search": asdict(run.search())}
    watch.finish({**scores, "peak_memory_mb": machine.peak_memory_mb(where)})


def _given(
    attacked: attack_result.AttackResult, run: DefenseRun, method: Defense, offered: str, place: str | None
) -> tuple[Images, Images, list[str]]:
    """What the method is given of the `offered` kind, the clean test set, and what there is to say about them; `place`
    is the folder of the data sets, if the user has named one."""
    train, test, notes = attacked.pictures(place)
    pool = attacked.given(train, offered)
    given = clean_subset(pool, run.ratio, run.random_seed, run.index)
    notes += [note] if (note := index_note(run.index, len(pool))) else []
    return (
        given,
        test,
        notes + (check_clean_set(given, test, method.batch_size, offered) if method.data_use != "none" else []),
    )


def _judge(record: Record, gate: dict[str, Any] | None, found: Score, which: str, advice: str) -> None:
    """Warn of an attack that is below its gate; see `Attack.gate`."""
    if gate and not gate["passed"] and found.asr:
        asr = f"ASR {found.asr.percent:.1f}, gate {gate['asr']:g}"
        record.log(f"warning: {which} did not take: {asr}; {advice}")


def _trigger(
    record: Record, method: Attack, model: nn.Module, test: Images, triggered: Images, radius: float
) -> dict[str, Any]:
    """How well the trigger hides and how well it was made, and what the network answers to triggers that must do
    nothing; for the summary, and in lines."""
    hidden, crossed = quality.of_attack(test, triggered, radius), method.cross_test_set(test)
    if hidden is not None:
        record.log(quality.describe(hidden))
        if method.figures:
            hidden["made"] = dict(method.figures)
            record.log(f"as it was made: {describe_figures(method.figures)}")
    if crossed is None:
        return {"trigger": hidden}
    share = accuracy(model, crossed.pixels, crossed.labels)
    record.log(f"cross ACC {share.percent:.2f} %, on test pictures with triggers that must do nothing")
    return {"trigger": hidden, **figures({"cross_acc": share})}


def _says(attacked: attack_result.AttackResult) -> dict[str, Any]:
    """What the record says of settings: where pictures are looked for unless a flag says so, all else for good."""
    net = attacked.network
    network = {"model": net["name"], "width": net["width"], "num_classes": net["classes"]}
    return {"dataset": attacked.dataset, "dataset_path": attacked.dataset_path, **network}


def _target(request: Request) -> str:
    """What the user calls the folder of the attack."""
    target: str | None = request.said("result_file")
    if target is None or request.said("model_file") is not None:
        raise ConfigError("give one of --result_file, an attack's folder, and --model_file, a network of your own")
    return target


def _check_name(said: str, name: str) -> None:
    """ConfigError if `said`, what the user calls the attack, is not `name`, the one that runs."""
    asked = THEIRS.get(said.lower(), said.lower())
    if asked != name:
        other = f" or run attack/{asked}.py" if asked in ATTACKS else f"; attacks are {', '.join(ATTACKS)}"
        raise ConfigError(f"--attack is {said!r}, but this is {name}; leave it out{other}")


def _network(request: Request, run: AttackRun, train: Images, origin: Source) -> dict[str, Any]:
    """What a defense must know to build the network again; a width is refused only where the user asked for it."""
    width = run.width if has_width(run.model) or "width" in request.given else None
    shape = {"name": run.model, "classes": train.num_classes, "width": width, "shape": list(train.pixels.shape[1:])}
    return {**shape, "mean": list(origin.mean), "std": list(origin.std)}
