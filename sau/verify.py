"""Whether a result folder is whole, and whether its figures come out again when its stored weights are scored."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from sau.data.images import Images
from sau.errors import DataError, RecordError, SauError
from sau.evaluate import Score, Share, der, score
from sau.record import attack_result, schema
from sau.record.folder import Record

SLACK = 0.001  # share of the images whose prediction may differ here: processors round differently
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError)  # raised by a forged file


@dataclass(frozen=True)
class Check:
    """One check of a folder: what was checked, its outcome and the reason."""

    name: str
    state: Literal["ok", "wrong", "not checked"]
    text: str


def verify(path: Path, dataset_path: str | None = None, device: torch.device | None = None) -> list[Check]:
    """Check an attack's folder and the defenses in it: the sums of the manifest, ACC, ASR, R-ACC and DER.

    Args:
        path: folder of the attack.
        dataset_path: folder of the data sets; None is where the attack found them.
        device: where to score the networks; None is the CPU.

    Raises:
        RecordError: there is no folder of an attack at `path`.
    """
    if not (path / "config.yaml").is_file():
        raise RecordError(f"{path} is no result folder; name the folder of an attack")
    checks: list[Check] = []
    record = Record(path)
    if not _check(checks, "files", partial(_files, record)):
        return checks
    kind = schema.kind(record.config)
    if kind == schema.DEFENSE:
        raise RecordError(f"{path} is the folder of a defense; name that of its attack")
    if kind == schema.OWN:
        return [*checks, Check("figures", "not checked", "the code and images of your own network are not here")]
    try:
        attack = attack_result.load(path)
    except (SauError, *MALFORMED) as error:
        return [*checks, _failed("attack", error)]
    try:
        test, text = attack.pictures(dataset_path)[1], f"{attack.dataset} as the attack saw it"
        checks.append(Check("data", "ok", text))
    except SauError as error:
        test = None
        checks.append(_failed("data", error))
    if test is None and attack.triggered is None:
        return checks
    folders = sorted(folder for folder in (path / "defense").glob("*") if folder.is_dir())
    for folder in (path, *folders):
        prefix = "" if folder == path else f"{folder.name}: "
        found = Record(folder)
        if folder == path or _check(checks, f"{prefix}files", partial(_files, found)):
            _check(checks, f"{prefix}figures", partial(_figures, attack, found, test, device or torch.device("cpu")))
    return checks


def _check(checks: list[Check], name: str, work: Callable[[], str]) -> bool:
    """Append the outcome of `work`, which returns a text or raises; whether it is ok."""
    try:
        checks.append(Check(name, "ok", work()))
    except (SauError, *MALFORMED) as error:
        checks.append(_failed(name, error))
    return checks[-1].state == "ok"


def _failed(name: str, error: Exception) -> Check:
    if isinstance(error, SauError):
        return Check(name, "not checked" if isinstance(error, DataError) else "wrong", str(error))
    return Check(name, "wrong", f"a file lacks something or has another type: {ascii(str(error))[:200]}")


def _files(record: Record) -> str:
    record.check()
    return f"{len(record.sealed)} files have the sums of the manifest"


def _figures(attack: attack_result.AttackResult, record: Record, test: Images | None, device: torch.device) -> str:
    """Score the stored networks and compare with the summary; RecordError names the figure that differs."""
    summary, amp = record.summary(), bool(record.config.get("amp"))
    parts = {"before": attack.path, "after": record.path} if "before" in summary else {"": record.path}
    texts, scores = list[str](), dict[str, Score]()
    for part, path in parts.items():
        model = attack.blank()
        attack_result.load_weights(model, path / "model.safetensors")
        model.amp = amp
        clean = test if test is not None else attack.triggered
        assert clean is not None
        bad = attack.triggered and attack.triggered.to(device)
        scores[part] = score(model.to(device).eval(), clean.to(device), bad)
        said = summary[part] if part else summary
        for name, share in scores[part].shares().items():
            if name != "acc" or test is not None:
                texts += _compare(f"{part} {name}".strip(), said, name, share)
    if "der" in summary and test is not None:
        recorded = {part: _recorded(summary[part]) for part in parts}
        if (rating := der(recorded["before"], recorded["after"])) != summary["der"]:
            raise RecordError(f"der is {summary['der']}, but the figures give {rating}")
        texts.append(f"der {rating}")
    return ", ".join(texts)


def _compare(what: str, said: dict[str, Any], name: str, share: Share | None) -> list[str]:
    """RecordError unless the recorded counts give the recorded percentage, and the counts are those measured."""
    if share is None or said.get(name) is None:
        if share is not None or said.get(name) is not None:
            raise RecordError(f"{what} is {said.get(name)} in the summary, measured is {share}")
        return []
    there = Share(*said[f"{name}_count"])
    if (there.percent, list(there.interval)) != (said[name], said[f"{name}_interval"]):
        raise RecordError(f"{what} is {said[name]} %, but its counts {there.hits} of {there.total} give {there}")
    if there.total != share.total or abs(there.hits - share.hits) > max(1, SLACK * there.total):
        raise RecordError(f"{what} is {there} in the summary, measured is {share}")
    return [f"{what} {share.percent} %"]


def _recorded(said: dict[str, Any]) -> Score:
    """The figures of a summary."""
    acc, asr, racc = (Share(*said[key]) if (key := f"{n}_count") in said else None for n in ("acc", "asr", "racc"))
    assert acc is not None
    return Score(acc, asr, racc)
