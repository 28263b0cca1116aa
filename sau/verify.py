"""Whether a result folder is whole: every file has the sum in the manifest, and the figures come out again."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sau.data.images import Images
from sau.errors import MALFORMED, DataError, RecordError, SauError
from sau.evaluate import Proportion, Score, der, score
from sau.record import attack_result
from sau.record.attack_result import AttackResult
from sau.record.folder import CONFIG, DEFENSE, OWN, SUMMARY, Record, read_config, run_kind

TOLERANCE = 0.001  # share of the images whose prediction may differ: processors round differently


class Check(NamedTuple):
    """One check of a folder: what was checked, its outcome and the reason."""

    name: str
    state: Literal["ok", "wrong", "not checked"]
    text: str


def verify(path: Path, dataset_path: str | None = None, device: torch.device | None = None) -> list[Check]:
    """Check an attack's folder and the defenses in it: the sums of the manifest, ACC, ASR, R-ACC and DER.
    `dataset_path` is the folder of the data sets (None: where the attack found them); the networks are scored on
    `device` (None: the CPU). RecordError if `path` is no folder of an attack."""
    kind = run_kind(read_config(path / CONFIG))
    if kind == DEFENSE:
        raise RecordError(f"{path} is the folder of a defense; name that of its attack")
    where = device or torch.device("cpu")

    @cache
    def attacked() -> tuple[AttackResult, Images, Images | None]:
        """The attack, and the clean and the triggered test images."""
        found = attack_result.load(path)
        return found, found.images(dataset_path)[1].to(where), found.triggered and found.triggered.to(where)

    @cache
    def measured(folder: Path, amp: bool) -> Score:
        """The score of the network that is stored in a folder."""
        attack, test, triggered = attacked()
        model = attack.model()
        attack_result.load_weights(model, folder / "model.safetensors")
        model.amp = amp
        return score(model.to(where), test, triggered)

    checks = [_check("files", _files, path)]
    if checks[0].state != "ok":
        return checks
    if kind == OWN:
        return [*checks, Check("figures", "not checked", "the code and images of your own network are not here")]
    checks.append(_check("data", lambda: f"{attacked()[0].dataset} as the attack saw it"))
    if checks[-1].state != "ok":
        return checks
    checks.append(_check("figures", _figures, path, {"": path}, measured))
    for folder in sorted(folder for folder in (path / "defense").glob("*") if folder.is_dir()):
        if (folder / CONFIG).exists() and not Record(folder).finished and not (folder / SUMMARY).exists():
            checks.append(Check(folder.name, "not checked", "it is unfinished; repeat its command to go on"))
            continue
        checks.append(_check(f"{folder.name}: files", _files, folder))
        if checks[-1].state == "ok":
            parts = {"before": path, "after": folder}
            checks.append(_check(f"{folder.name}: figures", _figures, folder, parts, measured))
    return checks


def _check(name: str, work: Callable[..., str], *given: Any) -> Check:
    """The outcome of `work(*given)`, which returns a text or raises."""
    try:
        return Check(name, "ok", work(*given))
    except SauError as error:
        return Check(name, "not checked" if isinstance(error, DataError) else "wrong", str(error))
    except MALFORMED as error:
        return Check(name, "wrong", f"a file lacks something or has another type: {ascii(str(error))[:200]}")


def _files(folder: Path) -> str:
    Record(folder).check()
    return "they match the manifest"


def _figures(folder: Path, parts: dict[str, Path], measured: Callable[[Path, bool], Score]) -> str:
    """Compare the summary's `parts` with the score of the network in each one's folder; RecordError names the figure
    that differs."""
    summary, amp = Record(folder).summary(), bool(read_config(folder / CONFIG).get("amp"))
    texts, recorded = list[str](), dict[str, Score]()
    for part, place in parts.items():
        figures = summary[part] if part else summary
        counts = (figures.get(f"{name}_count") for name in ("acc", "asr", "racc"))
        recorded[part] = Score(*(count and Proportion(*count) for count in counts))  # type: ignore[arg-type]
        for name, value in recorded[part].summary().items():
            if figures.get(name) != value:
                raise RecordError(f"{part} {name} is {figures.get(name)}, but the counts give {value}".strip())
        for name, share in measured(place, amp).shares().items():
            check_share(f"{part} {name}".strip(), recorded[part].shares()[name], share)
            texts += [f"{part} {name} {share.percent} %".strip()] if share else []
    if "der" in summary:
        rating = der(recorded["before"], recorded["after"])
        if rating != summary["der"]:
            raise RecordError(f"der is {summary['der']}, but the figures give {rating}")
        texts += [] if rating is None else [f"der {rating}"]
    return ", ".join(texts)


def check_share(name: str, recorded: Proportion | None, measured: Proportion | None) -> None:
    """RecordError if the counts differ by more than `TOLERANCE`, and by more than one image."""
    (hits, total), (found, count) = ((one.hits, one.total) if one else (0, 0) for one in (recorded, measured))
    if total != count or abs(hits - found) > max(1, TOLERANCE * total):
        raise RecordError(f"{name} is {recorded} in the summary, measured is {measured}")
