"""The gate of an attack: the ASR that it must have before a defense of it says anything."""

import json
import re

import pytest
from toys import QUICK, REPOSITORY

from sau.attack import ATTACKS, BadNet
from sau.errors import RecordError
from sau.evaluate import Share
from sau.record import attack_result, schema
from sau.record.folder import Record

ATTACK = ("attack", "badnet", "--dataset", "digits", "--width", "2", "--epochs", "0", "--save_folder_name", "a", *QUICK)
DEFENSE = ("defense", "ft", "--result_file", "a", "--epochs", "0", *QUICK)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def warnings(out):
    return [line for line in out.splitlines() if line.startswith("warning:") and "did not take" in line]


def test_an_attack_below_its_gate_says_so_and_a_defense_repeats_it(here, tmp_path, few_digits):
    """An untrained network: the line at the end, `gate` in both summaries, and the warning before the defense works."""
    status, out, err = here(*ATTACK)
    assert status == 0, err
    found = summary(tmp_path / "record/a")
    assert found["gate"] == {"asr": 85.0, "passed": False} and found["asr"] < 85
    (line,) = warnings(out)
    asr = f"ASR {found['asr']:.1f}, gate 85"
    assert line == f"warning: this attack did not take: {asr}; try more --epochs or a larger --pratio"
    assert line in (tmp_path / "record/a/log.txt").read_text()
    assert attack_result.load(tmp_path / "record/a").gate == found["gate"]

    status, out, err = here(*DEFENSE)
    assert status == 0, err
    (line,) = warnings(out)
    assert line.startswith(f"warning: the attack of this record did not take: {asr}; ")
    assert summary(tmp_path / "record/a/defense/ft")["gate"] == found["gate"]
    assert "\nNo verdict on the backdoor, for the attack did not take: ASR " in out


def test_an_attack_at_its_gate_is_silent(here, tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(BadNet, "gates", {"digits": 0.0})
    _, out, _ = here(*ATTACK)
    _, later, _ = here(*DEFENSE)
    assert not warnings(out + later)
    for folder in ("record/a", "record/a/defense/ft"):
        assert summary(tmp_path / folder)["gate"] == {"asr": 0.0, "passed": True}


@pytest.mark.parametrize("flags", [("--pratio", "0"), ("--attack_label_trans", "all2all")])
def test_without_a_gate_nothing_is_said(here, tmp_path, few_digits, flags):
    """No backdoor was asked for, or one whose ASR is bounded by the accuracy."""
    _, out, _ = here(*ATTACK, *flags)
    assert not warnings(out) and "gate" not in summary(tmp_path / "record/a")


def test_clean_training_has_no_gate(here, tmp_path, few_digits):
    _, out, _ = here("attack", "prototype", *ATTACK[2:])
    assert not warnings(out) and "gate" not in summary(tmp_path / "record/a")
    assert attack_result.load(tmp_path / "record/a").gate is None


def test_a_record_without_a_gate_is_judged_by_nothing(here, tmp_path, few_digits):
    """As older versions left it."""
    here(*ATTACK)
    record = Record(tmp_path / "record/a")
    found = summary(record.path)
    del found["gate"]
    (record.path / "manifest.json").unlink()
    record.finish(found)
    assert attack_result.load(record.path).gate is None
    status, out, err = here(*DEFENSE)
    assert status == 0 and not warnings(out), err
    assert "gate" not in summary(record.path / "defense/ft")


@pytest.mark.parametrize(
    "gate", [True, [], {}, {"asr": "85", "passed": True}, {"asr": 85.0, "passed": 1}, {"asr": 101, "passed": False}]
)
def test_a_gate_that_is_none_is_refused(tmp_path, gate):
    with pytest.raises(RecordError, match=r"gate is .*, allowed is .*make the folder again"):
        schema.gate({"gate": gate}, tmp_path)


@pytest.mark.parametrize(("hits", "passed"), [(949, False), (950, True), (1000, True)])
def test_the_gate_itself_passes(hits, passed):
    assert ATTACKS["sig"]().gate("cifar10", Share(hits, 1000)) == {"asr": 95.0, "passed": passed}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "prototype"])
def test_the_pages_state_the_gates_of_the_program(name):
    """The table of docs/attacks/README.md, and the page of the attack."""
    here = ATTACKS[name]().gate("cifar10", Share(1, 1))
    other = ATTACKS[name]().gate("digits", Share(1, 1))
    pages = REPOSITORY / "docs" / "attacks"
    rows = re.findall(rf"^\| `{name}` \| (\d+) \| (\d+) \|$", (pages / "README.md").read_text(), re.M)
    assert rows == [(f"{here['asr']:g}", f"{other['asr']:g}")]
    assert f"ASR at least {here['asr']:g}" in " ".join((pages / f"{name}.md").read_text().split())
