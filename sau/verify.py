"""Whether a result folder is whole: every file has the sum in the manifest, and the figures come out again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sau.data.images import Images
from sau.errors import DataError, RecordError, SauError
from sau.evaluate import Proportion, Score, der, score
from sau.record import attack_result
from sau.record.attack_result import AttackResult
from sau.record.folder import CONFIG, DEFENSE, OWN, Record, read_config, run_kind

TOLERANCE = 0.001  # share of the images whose prediction may differ: processors round differently
MALFORMED = (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError)  # raised by wrong content


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
    if not (path / CONFIG).is_file():
        raise RecordError(f"{path} is no result folder; name the folder of an attack")
    kind = run_kind(read_config(path / CONFIG))
    if kind == DEFENSE:
        raise RecordError(f"{path} is the folder of a defense; name that of its attack")
    checks = [_check("files", _files, path)]
    if checks[0].state != "ok":
        return checks
    if kind == OWN:
        return [*checks, Check("figures", "not checked", "the code and images of your own network are not here")]
    try:
        attack = attack_result.load(path)
        test = attack.images(dataset_path)[1]
    except (SauError, *MALFORMED) as error:
        return [*checks, _failed("data", error)]
    checks.append(Check("data", "ok", f"{attack.dataset} as the attack saw it"))
    checks.append(_check("figures", _figures, attack, test, path, device))
    for folder in sorted(folder for folder in (path / "defense").glob("*") if folder.is_dir()):
        checks.append(_check(f"{folder.name}: files", _files, folder))
        if checks[-1].state == "ok":
            checks.append(_check(f"{folder.name}: figures", _figures, attack, test, folder, device))
    return checks


def _check(name: str, work: Callable[..., str], *args: Any) -> Check:
    """The outcome of `work(*args)`, which returns a text or raises."""
    try:
        return Check(name, "ok", work(*args))
    except (SauError, *MALFORMED) as error:
        return _failed(name, error)


def _failed(name: str, error: Exception) -> Check:
    if isinstance(error, SauError):
        return Check(name, "not checked" if isinstance(error, DataError) else "wrong", str(error))
    return Check(name, "wrong", f"a file lacks something or has another type: {ascii(str(error))[:200]}")


def _files(folder: Path) -> str:
    Record(folder).check()
    return "they match the manifest"


def _figures(attack: AttackResult, test: Images, folder: Path, device: torch.device | None) -> str:
    """Score the stored networks and compare with the summary; RecordError names the figure that differs."""
    record, where = Record(folder), device or torch.device("cpu")
    summary, amp = record.summary(), bool(record.check(light=True).get("amp"))
    triggered = attack.triggered and attack.triggered.to(where)
    texts, recorded = list[str](), dict[str, Score]()
    for part, place in {"before": attack.path, "after": folder}.items() if "before" in summary else [("", folder)]:
        figures = summary[part] if part else summary
        counts = (figures.get(f"{name}_count") for name in ("acc", "asr", "racc"))
        recorded[part] = Score(*(count and Proportion(*count) for count in counts))  # type: ignore[arg-type]
        for name, value in recorded[part].summary().items():
            if figures.get(name) != value:
                raise RecordError(f"{part} {name} is {figures.get(name)}, but the counts give {value}".strip())
        model = attack.blank()
        attack_result.load_weights(model, place / "model.safetensors")
        model.amp = amp
        for name, share in score(model.to(where).eval(), test.to(where), triggered).shares().items():
            compare(f"{part} {name}".strip(), recorded[part].shares()[name], share)
            texts += [f"{part} {name} {share.percent} %".strip()] if share else []
    if "der" in summary:
        rating = der(recorded["before"], recorded["after"])
        if rating != summary["der"]:
            raise RecordError(f"der is {summary['der']}, but the figures give {rating}")
        texts.append(f"der {rating}")
    return ", ".join(texts)


def compare(name: str, recorded: Proportion | None, measured: Proportion | None) -> None:
    """RecordError if the counts differ by more than `TOLERANCE`, and by more than one image."""
    same = recorded is measured  # both None
    if recorded is not None and measured is not None:
        allowed = max(1, TOLERANCE * recorded.total)
        same = recorded.total == measured.total and abs(recorded.hits - measured.hits) <= allowed
    if not same:
        raise RecordError(f"{name} is {recorded} in the summary, measured is {measured}")
