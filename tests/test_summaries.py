"""Summaries of many folders in one file: nothing is lost, and they are read like the folders."""

import json
from pathlib import Path

import pytest
from toys import REPOSITORY, refuses, the_error

from sau.errors import RecordError
from sau.evaluate import Proportion, Score
from sau.grid.store import load, save
from sau.report.results import find_results

RESULTS = REPOSITORY / "docs" / "results"


def summary(hits: int) -> dict[str, object]:
    return {**Score(Proportion(hits, 100), Proportion(3, 90), Proportion(80, 90)).summary(), "seconds": 1.5}


SUMMARIES = {
    "badnet_s0": summary(90),
    "badnet_s0/defense/ft": {"before": summary(90), "after": summary(80), "der": 50.0, "selection": "defender"},
    "badnet_s1/defense/ft": {"before": summary(90), "after": summary(70), "der": None, "selection": "defender"},
    "prototype_s0": Score(Proportion(95, 100)).summary(),
}


def test_summaries_come_back(tmp_path):
    save(tmp_path / "x.jsonl", SUMMARIES)
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert [json.loads(line)["cell"] for line in lines] == sorted(SUMMARIES) and not any("interval" in x for x in lines)
    again = load(tmp_path / "x.jsonl")
    assert again.keys() == SUMMARIES.keys() and again["badnet_s0"]["acc_count"] == [90, 100]
    assert {**again["badnet_s0/defense/ft"], "before": 0, "after": 0} == {
        **SUMMARIES["badnet_s0/defense/ft"],
        "before": 0,
        "after": 0,
    }
    save(tmp_path / "y.jsonl", again)
    assert (tmp_path / "y.jsonl").read_bytes() == (tmp_path / "x.jsonl").read_bytes()


def test_a_line_that_is_no_result_is_left_out(tmp_path):
    save(tmp_path / "x.jsonl", SUMMARIES)
    with (tmp_path / "x.jsonl").open("a") as file:
        file.write('{"cell": "badnet_s9", "acc": 900}\n')
    found, left_out = find_results(tmp_path / "x.jsonl")
    assert [result.name for result in found] == sorted(SUMMARIES)
    assert left_out[0].startswith("badnet_s9: summary.json: acc is '900'")


@pytest.mark.parametrize("line", ["{", "[1]", '{"acc": 1}', '{"cell": 3}'])
def test_a_line_that_is_no_summary_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"cell": "first"}\n' + line + "\n")
    with refuses(RecordError, "x.jsonl, line 2 is no summary"):
        load(tmp_path / "x.jsonl")


def test_the_results_of_the_documentation_are_few_files():
    assert len([file for file in RESULTS.rglob("*") if file.is_file()]) <= 40
    assert all(load(file) for file in sorted(RESULTS.glob("*_cpu.jsonl")))


def test_an_audit_is_read_from_its_line(script, tmp_path):
    status, out, _ = script("audits.py", str(RESULTS / "audit.jsonl" / "badnet_s0"), "--out", str(Path("x")))
    assert status == 0 and "| control |" in out
    status, _, err = script("audits.py", str(RESULTS / "audit.jsonl" / "nobody"), "--out", "x")
    assert status == 2 and "nobody" in the_error(err)
