"""Records that are right, and forged ones whose sums were made right again."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from toys import QUICK, VICTIM, refuses

from sau.cli import attack, defend
from sau.data import sources
from sau.errors import DataError, RecordError
from sau.evaluate import Proportion, score
from sau.record.folder import CONFIG, MANIFEST, SUMMARY, Record, read_config
from sau.verify import check_share, verify


@pytest.fixture(scope="module", autouse=True)
def few_digits_here(few: sources.Source) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "digits", few)
        patch.setattr("sau.pgd.STEPS", 0)
        yield


@pytest.fixture(scope="module")
def defended(few_digits_here: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An attack with FT and NPD in it; do not change it, copy it."""
    root = tmp_path_factory.mktemp("defended")
    attack("badnet", [*VICTIM, "--record_root", str(root), "--save_folder_name", "victim"])
    for name, more in (("ft", ()), ("npd", ("--warm_epochs", "1"))):
        defend(name, ["--record_root", str(root), "--result_file", "victim", "--epochs", "1", *more, *QUICK])
    return root / "victim"


@pytest.fixture
def copied(defended: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(defended, tmp_path / "record" / "victim"))


def change(folder: Path, file: str, how: Callable[[Any], Any]) -> None:
    """Change a file of a record and make every sum right again, as a forger does."""
    place, tensors = folder / file, file.endswith(".safetensors")
    content = load_file(place) if tensors else read_config(place) if file == CONFIG else json.loads(place.read_text())
    how(content)
    save_file(content, place) if tensors else place.write_text(json.dumps(content))
    (folder / MANIFEST).unlink()
    (record := Record(folder)).finish(record.summary())


def states(path: Path) -> dict[str, str]:
    return {check.name: check.state for check in verify(path)}


def test_a_right_record_is_verified(defended, script, monkeypatch):
    scored = list[object]()
    monkeypatch.setattr("sau.verify.score", lambda *given: scored.append(given) or score(*given))
    names = ("files", "data", "figures", "ft: files", "ft: figures", "npd: files", "npd: figures")
    assert states(defended) == dict.fromkeys(names, "ok") and len(scored) == 3
    root = ("--record_root", str(defended.parent), "--threads", "1", "--device", "cpu")
    assert script("verify.py", "victim", *root)[0] == 0


def other(said: dict[str, Any]) -> None:
    share = Proportion((said["acc_count"][0] + 5) % said["acc_count"][1], said["acc_count"][1])
    said.update(acc=share.percent, acc_interval=list(share.interval), acc_count=[share.hits, share.total])


FORGERIES = {
    "a figure": ("", SUMMARY, lambda s: s.update(asr=s["asr"] - 3), "figures"),
    "a figure and its counts": ("", SUMMARY, other, "figures"),
    "counts that are none": ("", SUMMARY, lambda s: s.update(acc_count=["1"]), "figures"),
    "weights": ("", "model.safetensors", lambda t: t["linear.bias"][3].add_(30), "figures"),
    "labels of the triggered": ("", "triggered.safetensors", lambda t: t["true_labels"].add_(1).remainder_(10), "data"),
    "a data set": ("", CONFIG, lambda c: c["data"].update(train="0" * 64), "data"),
    "a defense's network": ("npd", "model.safetensors", lambda t: t["linear.bias"][3].add_(30), "npd: figures"),
    "a rating": ("npd", SUMMARY, lambda s: s.update(der=99.9), "npd: figures"),
    "scores that are a list": ("ft", SUMMARY, lambda s: s.update(before=[]), "ft: figures"),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_is_found(name, copied):
    where, file, how, expected = FORGERIES[name]
    change(copied / "defense" / where if where else copied, file, how)
    assert states(copied)[expected] == "wrong"


def test_damage_is_found(copied):
    (copied / "defense" / "ft" / "log.txt").write_text("x")
    assert states(copied)["ft: files"] == "wrong" and "ft: figures" not in states(copied)
    (copied / "defense" / "ft" / "manifest.json").unlink()
    assert states(copied)["ft: files"] == "wrong"
    (copied / "defense" / "ft" / "summary.json").unlink()  # as of a run that was interrupted
    assert (found := states(copied))["ft"] == "not checked" and "wrong" not in found.values()


def test_without_the_data_set_nothing_is_scored(copied, monkeypatch):
    def gone(dataset: str, path: str, size: int) -> None:
        raise DataError("no such data set here")

    monkeypatch.setattr(sources, "load", gone)
    assert states(copied) == {"files": "ok", "data": "not checked"}


def test_one_prediction_in_a_thousand_may_differ():
    there = Proportion(9000, 10_000)
    check_share("acc", there, Proportion(9010, 10_000))
    for other in (Proportion(9011, 10_000), Proportion(8989, 10_000), Proportion(9000, 9500), None):
        with pytest.raises(RecordError, match="measured is"):
            check_share("acc", there, other)


@pytest.mark.parametrize("what", ["nothing", "defense"])
def test_what_is_no_attack_is_refused(what, defended, tmp_path):
    place = {"nothing": tmp_path / "x", "defense": defended / "defense" / "ft"}[what]
    with refuses(RecordError, str(place)):
        verify(place)
