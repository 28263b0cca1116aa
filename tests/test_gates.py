"""The gate of an attack: the ASR that it must have before a defense of it says anything."""

import re

import pytest
from toys import QUICK, REPOSITORY, summary

from sau.attack import ATTACKS, BadNet
from sau.errors import RecordError
from sau.evaluate import Proportion
from sau.record import attack_result

ATTACK = ("--dataset", "digits", "--width", "2", "--epochs", "0", "--save_folder_name", "a", *QUICK)
DEFENSE = ("defense", "ft", "--result_file", "a", "--epochs", "0", *QUICK)


def warnings(out):
    return [line for line in out.splitlines() if line.startswith("warning:") and "did not take" in line]


def test_an_attack_below_its_gate_warns_and_a_defense_repeats_it(here, tmp_path, few_digits):
    """An untrained network: a line at the end, `gate` in both summaries, and a warning before the defense."""
    status, out, err = here("attack", "badnet", *ATTACK)
    assert status == 0, err
    found = summary(tmp_path / "record/a")
    assert found["gate"] == {"asr": 85.0, "passed": False} and found["asr"] < 85
    (line,) = warnings(out)
    assert f"ASR {found['asr']:.1f}, gate 85" in line and BadNet.remedy in line
    assert (loaded := attack_result.load(tmp_path / "record/a")).gate == found["gate"]
    assert loaded.doubts == ["the attack of this record did not take, so that its figures say nothing"]
    status, out, err = here(*DEFENSE)
    assert status == 0 and len(warnings(out)) == 1, err
    assert summary(tmp_path / "record/a/defense/ft")["gate"] == found["gate"]


@pytest.mark.parametrize("passed", [True, False])
def test_an_attack_at_its_gate_is_silent_unless_nothing_was_learned(here, tmp_path, monkeypatch, few_digits, passed):
    monkeypatch.setattr("sau.attack.base.GATE", 0.0)
    monkeypatch.setattr("sau.evaluate.LEARNED", -1.0 if passed else 0.2)
    _, out, _ = here("attack", "badnet", *ATTACK)
    _, later, _ = here(*DEFENSE)
    assert (" is too low for an ASR to count" in out) == len(warnings(out + later)) == (not passed)  # the defense's
    for folder in ("record/a", "record/a/defense/ft"):
        assert summary(tmp_path / folder)["gate"] == {"asr": 0.0, "passed": passed}


@pytest.mark.parametrize(("name", "flags"), [
    ("badnet", ("--pratio", "0")), ("prototype", ()),
    ("badnet", ("--attack_label_trans", "all2all", "--attack_target", "3")),
])  # fmt: skip
def test_without_a_backdoor_or_with_other_label_rules_there_is_no_gate(here, tmp_path, few_digits, name, flags):
    """The ASR of all2all is bounded by the accuracy."""
    _, out, _ = here("attack", name, *ATTACK, *flags)
    assert ("warning: flags without effect here: --attack_target: labels follow all2all\n" in out) == ("3" in flags)
    assert not warnings(out) and "gate" not in summary(tmp_path / "record/a")
    assert attack_result.load(tmp_path / "record/a").gate is None


@pytest.mark.parametrize(("hits", "passed"), [(949, False), (950, True), (1000, True)])
def test_the_gate_itself_passes(hits, passed):
    assert ATTACKS["sig"]().gate("cifar10", Proportion(hits, 1000)) == {"asr": 95.0, "passed": passed}


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "prototype"])
def test_the_pages_state_the_gates_of_the_program(name):
    """The table of docs/attacks/README.md, the sentence below it, and the page of the attack."""
    here, other = (ATTACKS[name]().gate(dataset, Proportion(1, 1)) for dataset in ("cifar10", "digits"))
    pages = REPOSITORY / "docs" / "attacks"
    text = (pages / "README.md").read_text()
    assert re.findall(rf"\({name}\.md\).*\| (\d+) \|$", text, re.M) == [f"{here['asr']:g}"]
    assert other["asr"] == min(85, here["asr"]) and "on other data sets they are at most 85" in " ".join(text.split())
    assert f"ASR at least {here['asr']:g}" in " ".join((pages / f"{name}.md").read_text().split())


@pytest.mark.parametrize("gate", [True, {}, {"asr": "85", "passed": True}, {"asr": 101, "passed": False}])
def test_a_damaged_gate_is_refused(tmp_path, gate):
    with pytest.raises(RecordError, match="gate is"):
        attack_result.gate({"gate": gate}, tmp_path)
