"""Records that say the truth, and every way not to, with all sums made right again."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from toys import QUICK, VICTIM

from sau.command.attack_and_defend import attack, defend
from sau.data import sources
from sau.errors import DataError, RecordError
from sau.evaluate import Score, Share, score
from sau.record import schema
from sau.record.folder import CONFIG, MANIFEST, SUMMARY, Record
from sau.verify import claims, verification
from sau.verify.findings import BROKEN, PARTLY, VERIFIED
from sau.verify.verification import Verification


@pytest.fixture(scope="module", autouse=True)
def few_digits_here(few: sources.Source) -> Iterator[None]:
    """Every figure is measured again and again, so of few pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sources.SOURCES, "digits", few)
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
    """A copy of it, free to be changed."""
    return Path(shutil.copytree(defended, tmp_path / "record" / "victim"))


def change(folder: Path, file: str, how: Callable[[Any], Any]) -> None:
    """Change a file of a record and make every sum right again."""
    place = folder / file
    if file == CONFIG:
        config = schema.opened(yaml.safe_load(place.read_text()), place)
        how(config)
        place.write_text(yaml.safe_dump(schema.signed(config), sort_keys=False))
    elif file == SUMMARY:
        content = json.loads(place.read_text())
        how(content)
        place.write_text(json.dumps(content))
    else:
        tensors = load_file(place)
        how(tensors)
        save_file(tensors, place)
    reseal(folder)


def reseal(folder: Path) -> None:
    """The manifest that a forger writes."""
    kept = [one for one in sorted(folder.iterdir()) if one.is_file() and one.name != MANIFEST]
    (folder / MANIFEST).write_bytes(schema.manifest(kept))


def broken(found: Verification) -> list[str]:
    return [finding.what for finding in found.findings if finding.state == "broken"]


def test_an_honest_record_is_verified_to_the_last_picture(defended):
    found = Verification(defended).run()
    assert found.findings.status == VERIFIED and broken(found) == []
    whats = [finding.what for finding in found.findings]
    assert {"files", "settings", "versions", "data", "weights", "acc", "asr", "racc", "ft: der", "npd: after asr"} <= {
        *whats
    }
    figures = [finding.text for finding in found.findings if finding.what.split()[-1] in ("acc", "asr", "racc")]
    assert {"trigger", "ft: selection", "npd: end"} <= {*whats}
    assert len(figures) == 3 + 2 * 6 and all(text.endswith("equal") for text in figures)


def test_figures_are_measured_in_the_precision_of_each_run(copied, monkeypatch):
    change(copied / "defense" / "ft", CONFIG, lambda config: config.update(amp=True))
    seen: list[bool] = []

    def scored(model: Any, *given: Any) -> Any:
        seen.append(model.amp)
        return score(model, *given)

    monkeypatch.setattr(verification, "score", scored)
    Verification(copied).run()
    assert sorted(seen) == [False, False, True, True]  # the attack; npd; the attack for ft, and ft


def pop(*names: str) -> Callable[[Any], Any]:
    return lambda content: [content.pop(name) for name in names]


def less(content: Any) -> None:
    content["acc_count"][0] -= 5
    share = 100 * content["acc_count"][0] / content["acc_count"][1]
    content["acc"] = round(share, 2)


def louder(tensors: dict[str, torch.Tensor]) -> None:
    tensors["linear.bias"][3] += 30


FORGERIES = {
    "a figure": ("", SUMMARY, lambda s: s.update(asr=s["asr"] - 3), ["asr"]),
    "a figure and its count": ("", SUMMARY, less, ["acc"]),
    "a count of one number": ("", SUMMARY, lambda s: s.update(acc_count=[1]), ["acc"]),
    "a count of nothing": ("", SUMMARY, lambda s: s.update(asr_count=[0, 0]), ["asr"]),
    "an interval": ("", SUMMARY, lambda s: s.update(asr_interval=[0.0, 100.0]), ["asr"]),
    "a digest": ("", CONFIG, lambda c: c.update(digest="0" * 64), ["settings"]),
    "a count of texts": (
        "ft",
        SUMMARY,
        lambda s: s["after"].update(acc_count=["1", "2"]),
        ["ft: after acc", "ft: der"],
    ),
    "scores that are a list": ("ft", SUMMARY, lambda s: s.update(before=[]), ["ft: record"]),
    "a width that is a text": ("", CONFIG, lambda c: c["model"].update(width="4"), ["contents"]),
    "a width below 1": ("", CONFIG, lambda c: c["model"].update(width=-3), ["contents"]),
    "a folder that is a number": ("", CONFIG, lambda c: c["run"].update(dataset_path=5), ["contents"]),
    "a ratio that is a text": ("", CONFIG, lambda c: c["method"].update(pratio="x"), ["contents"]),
    "a method that is a list": ("", CONFIG, lambda c: c.update(method=[1]), ["contents"]),
    "a network that there is not": ("", CONFIG, lambda c: c["model"].update(name="evil"), ["weights"]),
    "one mean for three channels": ("", CONFIG, lambda c: c["model"].update(mean=[0.5]), ["contents"]),
    "pictures of another size": (
        "",
        "triggered.safetensors",
        lambda t: t.update(pixels=t["pixels"][:, :, 1:].clone()),
        ["contents"],
    ),
    "versions that are a list": ("", CONFIG, lambda c: c.update(versions=[]), ["versions"]),
    "no clean set": ("ft", CONFIG, lambda c: c.update(clean_index=[]), ["ft: clean set"]),
    "a clean set of texts": ("ft", CONFIG, lambda c: c.update(clean_index=["x"]), ["ft: clean set"]),
    "a count that is missing": ("", SUMMARY, pop("acc_count"), ["acc"]),
    "weights": ("", "model.safetensors", louder, ["acc", "asr", "racc", "ft: before acc", "npd: before acc"]),
    "weights of another network": ("", "model.safetensors", pop("linear.bias"), ["weights"]),
    "labels of the triggered": (
        "",
        "triggered.safetensors",
        lambda t: t["true_labels"].add_(1).remainder_(10),
        ["data"],
    ),
    "no labels": ("", "triggered.safetensors", pop("labels"), ["contents"]),
    "an identity": ("", CONFIG, lambda c: c["identity"].update(lr=7.0), ["settings"]),
    "a setting": ("", CONFIG, lambda c: c["method"].update(pratio=0.9), ["settings"]),
    "a data set": ("", CONFIG, lambda c: c["data"].update(train="0" * 64), ["data", "settings"]),
    "a clean set": ("ft", CONFIG, lambda c: c.update(clean_index=c["clean_index"][1:]), ["ft: clean set"]),
    "another attack": ("ft", CONFIG, lambda c: c.update(attacked="0" * 64), ["ft: attack"]),
    "an attack that is not said": ("ft", CONFIG, pop("attacked"), ["ft: attack"]),
    "an attack that is none": ("ft", CONFIG, lambda c: c.update(attacked=None), ["ft: attack"]),
    "a defense's figure": ("ft", SUMMARY, lambda s: less(s["after"]), ["ft: after acc"]),
    "a defense's network": ("npd", "model.safetensors", louder, ["npd: after acc"]),
    "a polarizer": ("npd", "model.safetensors", pop("layer4.1.conv1.norm.bias"), ["npd: weights"]),
    "a polarizer elsewhere": (
        "npd",
        "model.safetensors",
        lambda t: t.update({"layer9.polarizer.weight": t["layer4.1.conv1.polarizer.weight"].clone()}),
        ["npd: weights"],
    ),
    "a rating": ("npd", SUMMARY, lambda s: s.update(der=99.9), ["npd: der"]),
    "who chose": ("npd", SUMMARY, lambda s: s.update(selection="oracle"), ["npd: selection"]),
    "a chooser that the settings have": (
        "ft",
        CONFIG,
        lambda c: c["method"].update(select="oracle"),
        ["ft: selection"],
    ),
    "an early end": ("ft", SUMMARY, lambda s: s.update(ended_early="epoch 1"), ["ft: end"]),
    "an attack's early end": ("", SUMMARY, lambda s: s.update(ended_early="epoch 1"), ["end"]),
    "no early end": ("ft", CONFIG, lambda c: c["identity"].update(ended_early="epoch 1"), ["ft: end"]),
    "how well the trigger hides": (
        "",
        SUMMARY,
        lambda s: s["trigger"].update(psnr=s["trigger"]["psnr"] + 1),
        ["trigger"],
    ),
    "a trigger in the ball": ("", SUMMARY, lambda s: s["trigger"].update(in_ball=100.0), ["trigger"]),
    "no trigger": ("", SUMMARY, lambda s: s.update(trigger=None), ["trigger"]),
    "no summary of a defense": ("npd", SUMMARY, pop("before"), ["npd: record"]),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_every_forgery_is_found_where_it_is(name, copied):
    where, file, how, expected = FORGERIES[name]
    change(copied / "defense" / where if where else copied, file, how)
    found = Verification(copied).run()
    assert found.findings.status == BROKEN and {*expected} <= {*broken(found)}, broken(found)
    others = [what for what in broken(found) if where and not what.startswith(where)]
    assert others == []


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000])
def test_a_summary_that_is_no_object_is_broken(text, copied):
    for folder in (copied, copied / "defense" / "ft"):
        (folder / SUMMARY).write_text(text)
        reseal(folder)
    found = Verification(copied).run()
    assert found.findings.status == BROKEN and {"summary", "ft: record"} <= {*broken(found)}


def test_triggers_that_must_do_nothing_are_measured_where_they_can_be_made(few_digits_here, tmp_path):
    """WaNet's noise can be drawn again; Input-Aware's networks are not read back, and that is said."""
    root = ("--record_root", str(tmp_path))
    for name, state, *more in (("wanet", "held"), ("inputaware", "not checked", "--clean_train_epochs", "1")):
        attack(name, [*VICTIM, *root, "--save_folder_name", name, *more])
        found = Verification(tmp_path / name).run()
        assert broken(found) == []
        assert [finding.state for finding in found.findings if finding.what == "cross_acc"] == [state]
    change(tmp_path / "wanet", SUMMARY, lambda said: said["cross_acc_count"].__setitem__(0, 1))
    assert broken(Verification(tmp_path / "wanet").run()) == ["cross_acc"]
    change(tmp_path / "wanet", CONFIG, lambda config: config.update(device="cuda"))  # which draws another noise
    assert broken(Verification(tmp_path / "wanet").run()) == []


def test_what_was_measured_on_the_way_is_said_not_to_be_checked(copied):
    for name in ("risk", "findings"):
        change(copied / "defense" / "ft", SUMMARY, lambda said, name=name: said.update({name: {"x": 1}}))
    found = Verification(copied).run()
    assert found.findings.status == PARTLY
    assert {"ft: risk", "ft: findings"} == {one.what for one in found.findings if one.state == "not checked"}


def test_without_a_trigger_in_the_summary_nothing_of_it_is_held(copied):
    change(copied, SUMMARY, lambda said: said["trigger"].update(made={"psnr": 99.0}))
    found = {one.what: one.state for one in Verification(copied).run().findings}
    assert (found["trigger"], found["trigger as it was made"]) == ("held", "not checked")
    change(copied, SUMMARY, lambda said: said.update(cross_acc=99.0) or said.pop("trigger"))
    found = {one.what: one.state for one in Verification(copied).run().findings}
    assert (found["trigger"], found["cross_acc"]) == ("not checked", "not checked")


def test_a_manifest_that_vouches_for_nothing_is_broken(copied):
    (copied / MANIFEST).write_text(json.dumps({"schema": schema.SCHEMA, "files": {}}))
    found = Verification(copied).run()
    assert found.findings.status == BROKEN and broken(found) == ["files"]


def test_an_attack_that_still_runs_is_not_called_broken(copied):
    (copied / MANIFEST).unlink()
    found = Verification(copied).run()
    assert found.findings.status == PARTLY and broken(found) == []
    assert [f.text for f in found.findings] == ["unfinished; repeat the command that made it to finish it"]


def test_damage_ends_the_check_of_a_folder(copied):
    (copied / "defense" / "ft" / "log.txt").write_text("x")
    found = Verification(copied).run()
    assert broken(found) == ["ft: files"] and not any(f.what == "ft: der" for f in found.findings)
    (copied / "log.txt").write_text("x")
    found = Verification(copied).run()
    assert broken(found) == ["files"] and len(found.findings) == 1


def test_what_cannot_be_checked_is_said(copied, monkeypatch):
    """Without the data set ASR and R-ACC remain; an unfinished defense and an added file are named."""

    def gone(dataset: str, path: str, size: int) -> None:
        raise DataError("no such data set here")

    monkeypatch.setattr(sources, "load", gone)
    (copied / "defense" / "ft" / MANIFEST).unlink()
    (copied / "mine.txt").write_text("x")
    found = Verification(copied).run()
    texts = {finding.what: f"{finding.state}: {finding.text}" for finding in found.findings}
    assert found.findings.status == PARTLY and broken(found) == []
    assert texts["data"] == "not checked: no such data set here" and texts["acc"].startswith("not checked")
    assert texts["asr"].startswith("held") and texts["npd: after asr"].endswith("equal")
    assert texts["npd: clean set"].startswith("not checked") and "unfinished" in texts["ft: files"]
    assert "mine.txt" in texts["files"]


def test_other_data_and_no_folder_of_data(copied):
    change(copied, CONFIG, lambda config: config["data"].update(dataset="cifar10"))
    found = Verification(copied, str(copied / "nowhere")).run()
    texts = {finding.what: finding.text for finding in found.findings if finding.state == "not checked"}
    assert "no folder" in texts["data"] and "--dataset_path" in texts["data"]


def test_another_version_of_a_library_is_no_fault(copied):
    change(copied, CONFIG, lambda config: config["versions"].update(torch="1.0"))
    found = Verification(copied).run()
    (text,) = [finding.text for finding in found.findings if finding.what == "versions"]
    assert found.findings.status == VERIFIED and "torch 1.0 there" in text


def test_one_picture_in_a_thousand_may_differ(copied):
    change(copied, SUMMARY, lambda said: said.update(acc_count=[said["acc_count"][0] - 1, said["acc_count"][1]]))

    def mended(said: Any) -> None:
        from sau.evaluate import Share

        share = Share(*said["acc_count"])
        said.update(acc=share.percent, acc_interval=list(share.interval))

    change(copied, SUMMARY, mended)
    found = Verification(copied).run()
    (text,) = [finding.text for finding in found.findings if finding.what == "acc"]
    assert "1 of 60 pictures answered otherwise" in text and "acc" not in broken(found)


@pytest.mark.parametrize("what", ["nothing", "empty", "defense"])
def test_what_is_no_attack_is_refused(what, defended, tmp_path, one_line):
    (tmp_path / "empty").mkdir()
    place = {"nothing": tmp_path / "x", "empty": tmp_path / "empty", "defense": defended / "defense" / "ft"}[what]
    with pytest.raises(RecordError) as refusal:
        Verification(place).run()
    assert str(place) in one_line(refusal.value)


def test_the_script(defended, script):
    root = ("--record_root", str(defended.parent), "--threads", "1", "--device", "cpu")
    for argv, status, word in (
        (["victim", *root], VERIFIED, "victim: verified"),
        (["../victim", *root], 2, "no folder ../victim"),
        (["victim", "--threads", "-1"], 2, "threads"),
    ):
        found, out, err = script("verify.py", *argv)
        assert found == status and word in (err if status == 2 else out.splitlines()[-1])


def test_one_answer_in_a_thousand_may_differ_and_no_more():
    there = Share(9000, 10_000)
    said = {"acc": there.percent, "acc_interval": list(there.interval), "acc_count": [9000, 10_000]}
    assert "10 of 10000" in claims.equal(said, "acc", Share(9010, 10_000))
    with pytest.raises(claims.Otherwise, match="here"):
        claims.equal(said, "acc", Share(9011, 10_000))


@pytest.mark.parametrize(
    ("device", "hits", "state"),
    [("cuda", 5100, "not checked"), ("cuda", 5101, "broken"), ("cpu", 5100, "broken"), ("abacus", 5100, "broken")],
)
def test_a_cpu_does_not_refute_what_is_near_to_it_on_a_card(device, hits, state):
    """One in a hundred answered otherwise is left open there, and no more."""
    found = Verification(Path("a"))
    found.data, record = (), Record(Path("a"))
    record.config = {"device": device}
    there = Share(5000, 10_000)
    said = {"acc": 50.0, "acc_interval": list(there.interval), "acc_count": [5000, 10_000]}
    found._compare("", record, said, Score(Share(hits, 10_000)))
    (finding,) = found.findings
    assert (finding.what, finding.state) == ("acc", state) and "50.0 % there" in finding.text


def test_a_share_of_other_pictures_is_another_one():
    there = Share(9000, 10_000)
    said = {"acc": there.percent, "acc_interval": list(there.interval), "acc_count": [9000, 10_000]}
    claims.equal(said, "acc", there)
    with pytest.raises(claims.Otherwise):
        claims.equal(said, "acc", Share(9000, 9500))


@pytest.mark.parametrize("count", [[61, 60], [-1, 60], [True, 60], [0, 0], [1.0, 60], [1], None])
def test_counts_are_hits_among_pictures(count, one_line):
    assert claims.counted({"acc_count": [60, 60]}, "acc") == Share(60, 60)
    with pytest.raises(RecordError) as refusal:
        claims.counted({"acc_count": count}, "acc")
    assert f"acc_count is {count}" in one_line(refusal.value)


def test_a_trigger_is_there_and_here_and_alike_or_it_is_broken():
    there = {"psnr": 20.0, "ssim": 0.9, "ssim_count": 4}
    assert claims.trigger({"trigger": there}, there) == "as its pictures show it"
    assert claims.trigger({"trigger": None}, None) == "there is none"
    for unseen in ({**there, "ssim": None, "ssim_count": 0}, {**there, "ssim": None}):
        assert "SSIM was not compared" in claims.trigger({"trigger": there}, unseen)
    for found in (None, {**there, "ssim": 0.8}, {**there, "ssim_count": 5}, {**there, "psnr": None}):
        for one, other in ((there, found), (found, there)):
            with pytest.raises(RecordError):
                claims.trigger({"trigger": one}, other)


@pytest.mark.parametrize(("said", "score"), [({"asr": 90.0}, None), ({"asr": None}, Share(1, 2)), ({}, Share(1, 2))])
def test_a_figure_that_is_on_one_side_alone_is_broken(said, score):
    found = Verification(Path("a"))
    found.data, record = None, Record(Path("a"))
    found._compare("", record, {"racc": None, **said}, Score(Share(1, 2), score))
    assert [(one.what, one.state) for one in found.findings if one.state == "broken"] == [("asr", "broken")]
