"""An audit: rows of its parts, the file that they are kept in, and tables of them: a row for each network, a column for
each step of what the attacker spent, means over seeds.

A row has `part`, `curve`, `network`, `x`, `seed`, and shares of images. `x` is what the attacker spent: poisoned images
(relearn), the radius eps (white); or the share of the way from the attacked weights (path).
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from sau.attack.triggers import network_digest
from sau.audit import measure
from sau.audit.case import CONTROL, NONE, PARTS, AuditConfig, Case
from sau.data.images import Images, to_float
from sau.data.sources import fingerprint
from sau.errors import ConfigError, one_line
from sau.evaluate import figures, proportions, score
from sau.files import parse_json, read_json
from sau.files import read as read_bytes
from sau.record.folder import as_json
from sau.report.stats import MeanStd, mean_std
from sau.types import Pixels
from sau.util import generator, markdown

RELEASED, FRESH = "released", "fresh"  # re-learning: augmented once, or every batch anew
BETWEEN, ANEW = "statistics between", "statistics anew"  # the path: of batch norm
TRIGGER, ALONE, NOISE = "trigger + D", "D alone", "trigger + noise"  # what a perturbation is added to
RESULT = "audit.json"
Row = dict[str, Any]
Audit = Mapping[str, Any]  # what `audit.json` holds
Key = tuple[str, str]  # part and curve

TITLES: dict[Key, str] = {
    ("before", ""): "As they are",
    ("relearn", RELEASED): "Re-learning from k poisons, augmented once (as released)",
    ("relearn", FRESH): "Re-learning from k poisons, every batch augmented anew",
    ("path", BETWEEN): "On the path from the attacked weights (0) to the purified ones (1)",
    ("path", ANEW): "On the same path, statistics of batch norm estimated anew",
    ("white", TRIGGER): "White box: trigger and universal D, by radius",
    ("white", ALONE): "White box: D on images without a trigger (gUAA), by radius",
    ("white", NOISE): "Trigger and noise, by radius",
}


def run_audit(case: Case, config: AuditConfig, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Do what is asked, print a line for each row, and return what `audit.json` holds.

    Raises ConfigError for BEC without a control.
    """
    if "bec" in config.parts and CONTROL not in case.networks:
        raise ConfigError("bec needs a network without a backdoor; give --control, or leave bec out of --parts")
    rows, seconds, notes = list[Row](), dict[str, float](), [*case.notes, *_notes(case, config)]
    for note in notes:
        say(f"note: {note}")
    for part in ("before", *(part for part in PARTS if part in config.parts)):
        started = time.monotonic()
        for row in WORK[part](case, config):
            rows.append({"part": part, **row})
            figure = f"ASR {row['asr']:.1f} %" if "asr" in row else f"s {row['s']:.3f}"
            say(f"{part:8}{row['network']:16} {row['curve']:20} {row['x']:<6g} {figure}")
        seconds[part] = round(time.monotonic() - started, 2)
    return {
        "record": case.name, "attack": case.about.get("attack"),
        "networks": {name: network_digest(model.net) for name, model in case.networks.items()},
        "asked": as_json({**asdict(config), "samples": [len(case.test), len(case.triggered)]}), "seconds": seconds,
        "about": as_json({**case.about, "test": fingerprint(case.test)}), "notes": notes, "rows": rows,
    }  # fmt: skip


def _most_shots(case: Case, config: AuditConfig) -> int:
    """The most poisons that the attacker's draw can have."""
    return min(round(config.share * len(case.train)), len(case.poisons))


def _notes(case: Case, config: AuditConfig) -> Iterator[str]:
    if "relearn" in config.parts and (most := _most_shots(case, config)) < max(config.shots):
        yield f"the attacker has {most} poisoned images at most"
    for name, model in case.networks.items():
        if "path" in config.parts and not measure.connected(case.networks[NONE], model):
            yield f"no path leads to {name}, which has other layers"


def _before(case: Case, config: AuditConfig) -> Iterator[Row]:
    """ACC, ASR and R-ACC of every network as it is."""
    for name, model in case.networks.items():
        yield _scored(case, model, network=name, curve="", x=0, seed=0)


def _relearn(case: Case, config: AuditConfig) -> Iterator[Row]:
    """The same after RA with so many poisons; 0 is always among them."""
    shots = sorted({min(k, _most_shots(case, config)) for k in (0, *config.shots)})
    for (name, model), curve, seed, k in product(case.networks.items(), (RELEASED, FRESH), config.seeds, shots):
        first, later = (None, case.augment) if curve == FRESH else (case.augment, None)
        images = measure.mixture(case.train, case.poisons, k, share=config.share, seed=seed, augment=first)
        again = measure.relearn(model, images, epochs=config.epochs, seed=seed, augment=later)
        yield _scored(case, again, network=name, curve=curve, x=k, seed=seed)


def _path(case: Case, config: AuditConfig) -> Iterator[Row]:
    """The same along the path from the attacked network to every purified one of its layers."""
    images = measure.mixture(case.train, case.poisons, 0, share=config.share, seed=0)
    start = case.networks[NONE]
    ends = [name for name, model in case.networks.items() if measure.connected(start, model)]
    for name, curve, s in product(ends, (BETWEEN, ANEW), measure.STEPS):
        if name not in (NONE, CONTROL):
            model = measure.interpolate(start, case.networks[name], s)
            model = measure.reestimate_statistics(model, images, case.augment) if curve == ANEW else model
            yield _scored(case, model, network=name, curve=curve, x=s, seed=0)


def _white(case: Case, config: AuditConfig) -> Iterator[Row]:
    """D fitted to each network itself, on triggered images or on clean ones alone.

    With the trigger also: noise of the same size, and the same D on the control.
    """
    for (name, model), curve, seed in product(case.networks.items(), (TRIGGER, ALONE), config.seeds):
        order = torch.randperm(len(case.poisons), generator=generator(seed))
        fitted, shown = case.poisons[order[: config.images]], case.triggered
        if curve == ALONE:
            fitted, shown = _relabel(case.train[fitted.index], fitted), _relabel(case.untriggered, shown)
        yield _shown(model, shown, to_float(shown.pixels), network=name, curve=curve, x=0.0, seed=seed)
        for eps, delta in measure.universal(model, fitted, config.eps, steps=config.steps, seed=seed):
            row, pixels = partial(_shown, shown=shown, network=name, x=eps, seed=seed), measure.shifted(shown, delta)
            if curve == TRIGGER:
                noise = measure.noise(shown, eps, generator(seed))
                yield row(model, pixels=measure.shifted(shown, noise), curve=NOISE)
            if curve == TRIGGER and name != CONTROL and CONTROL in case.networks:
                yield row(case.networks[CONTROL], pixels=pixels, curve=f"same D on {CONTROL}")
            yield row(model, pixels=pixels, curve=curve)


def _bec(case: Case, config: AuditConfig) -> Iterator[Row]:
    """How alike each network's reaction to the trigger is to the attacked one's: `s`, the mean of `layers`, and BEC."""
    attacked = case.networks[NONE]
    channels = measure.top_tac_channels(attacked, case.untriggered, case.triggered)
    layers = {name: measure.similarity(attacked, model, case.triggered, channels)
              for name, model in case.networks.items()}  # fmt: skip
    s = {name: sum(found.values()) / len(found) for name, found in layers.items()}
    for name, value in measure.bec(s, CONTROL).items():
        yield {"network": name, "curve": "", "x": 0, "seed": 0, "s": s[name], "layers": layers[name], "bec": value}


WORK: dict[str, Callable[[Case, AuditConfig], Iterator[Row]]] = {
    "before": _before, "relearn": _relearn, "path": _path, "white": _white, "bec": _bec,
}  # fmt: skip


def _scored(case: Case, model: torch.nn.Module, **where: Any) -> Row:
    return {**where, **score(model, case.test, case.triggered).summary()}


def _shown(model: torch.nn.Module, shown: Images, pixels: Pixels, **where: Any) -> Row:
    """ASR and R-ACC on these pixels, in place of those of the images that are shown."""
    asr, racc = proportions(model, pixels, shown.labels, shown.true_labels)
    return {**where, **figures({"asr": asr, "racc": racc})}


def _relabel(clean: Images, target: Images) -> Images:
    """Clean images with the labels that the attacker wants for them."""
    return Images(clean.pixels, target.labels, target.true_labels, clean.role, clean.index, clean.num_classes)


def read(place: Path) -> dict[str, Any]:
    """One audit: of its folder or record, or FILE.jsonl/NAME, the line of a file whose `name` this is.

    Raises OSError, or ValueError if there is none.
    """
    if place.parent.is_file():
        lines = [parse_json(line) for line in read_bytes(place.parent).decode().splitlines()]
        found = next((line for line in lines if isinstance(line, dict) and line.get("name") == place.name), {})
    else:
        found = read_json((place if (place / RESULT).is_file() else place / "audit") / RESULT)
    if not {"rows", "asked", "about", "networks"} <= found.keys():
        raise ValueError("it is no result of scripts/audit.py, or no line has the name")
    return found


# Tables


def curves(audits: Sequence[Audit]) -> dict[Key, dict[str, dict[Any, MeanStd]]]:
    """ASR by part and curve, network, and what the attacker spent: one value for each audit, or draw of a lone one."""
    found: dict[Key, dict[str, dict[Any, list[float]]]] = {}
    for audit in audits:
        drawn: dict[tuple[Key, str, Any], list[float]] = {}
        for row in audit["rows"]:
            if "asr" in row:
                drawn.setdefault(((row["part"], row["curve"]), row["network"], row["x"]), []).append(row["asr"])
        for (key, network, x), values in drawn.items():
            line = found.setdefault(key, {}).setdefault(network, {})
            line.setdefault(x, []).extend(_independent(values, audits))
    return {
        key: {network: {x: MeanStd(tuple(values)) for x, values in line.items()} for network, line in lines.items()}
        for key, lines in found.items()
    }


def _independent(values: Sequence[float], audits: Sequence[Audit]) -> Sequence[float]:
    """Draws of the attacker's on one network do not count as networks where several are compared."""
    return values if len(audits) == 1 else [statistics.mean(values)]


def coefficients(audits: Sequence[Audit]) -> dict[str, dict[str, MeanStd | None]]:
    """`s` and `bec` by network; None where a value is not defined."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for audit in audits:
        for row in (row for row in audit["rows"] if row["part"] == "bec"):
            for name, values in found.setdefault(row["network"], {"s": [], "bec": []}).items():
                values.append(row[name])
    return {network: {name: mean_std(values) for name, values in some.items()} for network, some in found.items()}


def tables(audits: Sequence[Audit]) -> str:
    """Markdown: ASR in percent for every part, then BEC; mean ± standard deviation where there are several seeds."""
    n, draws = len(audits), len(audits[0]["asked"]["seeds"])
    over = f"{n} attacked networks" if n > 1 else f"{draws} draws of the attacker's"
    texts = [f"Mean ± standard deviation over {over}."] if n > 1 or draws > 1 else []
    for key, lines in curves(audits).items():
        steps = list(dict.fromkeys(x for line in lines.values() for x in line))
        heads = ["network", *(_step(key[0], x) for x in steps)]
        body = [[name, *(_text(line.get(x)) for x in steps)] for name, line in lines.items()]
        if key[0] in ("before", "relearn"):
            heads += ["ACC" if key[0] == "before" else f"ACC at {_step('relearn', steps[-1])}"]
            body = [[*cells, _text(_acc(audits, key, cells[0], steps[-1]))] for cells in body]
        texts.append(_table(TITLES.get(key, f"{key[0]}: trigger and the {key[1]}"), heads, body))
    found = coefficients(audits)
    if found:
        body = [[name, *(_text(value, 3) for value in values.values())] for name, values in found.items()]
        texts.append(_table("Backdoor existence coefficient", ["network", "s", "BEC"], body))
    return "\n\n".join(texts)


def _acc(audits: Sequence[Audit], key: Key, network: str, x: Any) -> MeanStd | None:
    values: list[float | None] = []
    for audit in audits:
        rows = (row for row in audit["rows"] if (row["part"], row["curve"]) == key)
        values += _independent([row["acc"] for row in rows if (row["network"], row["x"]) == (network, x)], audits)
    return mean_std(values)


def _step(part: str, x: Any) -> str:
    """The head of a column."""
    return {"before": "ASR", "relearn": f"k = {x}"}.get(part, str(x))


def _text(value: MeanStd | None, digits: int = 1) -> str:
    return "-" if value is None else value.text(digits)


def _table(title: str, heads: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return f"{one_line(title)}\n\n{markdown(heads, body)}".rstrip()
