"""The report: what is averaged and what never, who is marked best, how a folder that is not in order is shown."""

import csv
import io
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import NETWORK, attack, defense
from toys import REPOSITORY, the_error

from sau import formatting
from sau.errors import RecordError, printable
from sau.evaluate import Score, Share, der
from sau.record import schema
from sau.record.attack_result import load
from sau.record.folder import Record
from sau.report import parse, scatter
from sau.report import read as reading
from sau.report.exports import as_csv, as_json, as_latex
from sau.report.page import build
from sau.report.pictures import Pictures
from sau.report.published import alike, compare, mean, published
from sau.report.read import read
from sau.report.scatter import scatters
from sau.report.spread import Spread
from sau.report.table import Cell, Section, sections
from sau.report.variants import variants


def tables(root: Path, dataset: str | None = None) -> list[Section]:
    return sections(read(root)[0], dataset)


def cells(root: Path) -> dict[tuple[str, ...], Cell]:
    (section,) = tables(root)
    return {tuple(filter(None, (c.attack, c.attack_variant, c.defense, c.variant))): c for c in section.cells}


def test_the_interval_is_students():
    """t of 2 degrees of freedom at 97.5 % is 4.3027; the standard deviation of 1, 2, 3 is 1."""
    spread = Spread((1.0, 2.0, 3.0))
    assert spread.mean == 2 and spread.half == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert Spread((5.0,)).half is None and Spread((5.0,)).text() == "5.00" and spread.text(1) == "2.0 ± 1.0"
    two = Spread((1.0, 3.0))
    assert two.text() == "1.00, 3.00" and two.half is None and two.text(1, sign="+") == "+1.0, +3.0"
    assert spread.text(interval=True) == "2.00 ± 2.48"


def test_seeds_are_averaged(tmp_path):
    for seed, asr in enumerate((1.0, 2.0, 6.0)):
        defense(attack(tmp_path, seed=seed, acc=90.0 + seed), seed=seed, asr=asr)
    found = cells(tmp_path)
    assert found["badnet", "none"].figures["acc"].values == (90, 91, 92)
    assert found["badnet", "sau"].figures["asr"].mean == 3 and found["badnet", "sau"].status == "measured"


def test_nothing_but_seeds_is_averaged(tmp_path):
    """Other data sets are other sections; other settings, of attack, defense or clean share, are other cells."""
    attack(tmp_path, folder="a", dataset="cifar10")
    attack(tmp_path, folder="b", dataset="gtsrb")
    assert [section.dataset for section in tables(tmp_path)] == ["cifar10", "gtsrb"]
    root = tmp_path / "variants"
    for seed in (0, 1):
        for ratio in (0.05, 0.01):
            other = attack(root, seed=seed, folder=f"p{ratio}_s{seed}", pratio=ratio * 2)
            defense(other, seed=seed, ratio=ratio)
    found = cells(root)
    assert {len(cell.good) for cell in found.values() if cell.status == "measured"} == {2}
    assert ("badnet", "pratio 0.1", "sau", "ratio 0.05") in found and ("badnet", "pratio 0.02", "none") in found


def test_other_clean_sets_are_no_seeds_of_each_other(tmp_path):
    """A file that lists the pictures beats the share, which then says nothing."""
    for seed in (0, 1):
        defense(attack(tmp_path, seed=seed), seed=seed, index="ten.txt" if seed else None)
    assert {key[-1]: len(cell.good) for key, cell in cells(tmp_path).items() if "sau" in key} == {
        "no index, ratio 0.05": 1,
        "index ten.txt, no ratio": 1,
    }


def test_a_run_that_was_ended_early_is_no_seed_of_the_others(tmp_path):
    """Named for what it is, though only its identity has the entry, and though it stands alone."""
    root, alone = tmp_path / "both", tmp_path / "alone"
    for seed in (0, 1):
        extra = {"ended_early": "round 3 of 9, before batch 1 of 2"} if seed else {}
        defense(attack(root, seed=seed, folder=f"s{seed}"), seed=seed, **extra)
    found = cells(root)
    assert {len(cell.good) for key, cell in found.items() if "sau" in key} == {1}
    assert ("badnet", "sau", "ended in round 3 of 9") in found and ("badnet", "sau") in found
    defense(attack(alone), ended_early="epoch 1 of 2, before batch 1 of 2")
    assert ("badnet", "sau", "ended in epoch 1 of 2") in cells(alone)


def test_a_setting_that_one_run_alone_was_given_tells_them_apart(tmp_path):
    """`patience` is in an identity only where there are any; of folders known by their names alone nobody knows."""
    for seed in (0, 1, 2):
        more = {"patience": [0.5, 1.0]} if seed == 1 else {}
        attack(tmp_path, seed=seed, folder=f"badnet_r0.1_s{seed}", **more)
    alone(tmp_path / "badnet_r0.1_s2")
    runs, _ = read(tmp_path)
    assert [first for first, _ in variants(runs)] == ["no patience", "patience [0.5, 1.0]", ""]


def test_runs_of_another_precision_are_no_seeds_of_each_other(tmp_path):
    for seed, amp in enumerate((True, False, True)):
        noted(attack(tmp_path, seed=seed), amp=amp)
    found = {key: [run.seed for run in cell.good] for key, cell in cells(tmp_path).items()}
    assert found == {("badnet", "amp true", "none"): [0, 2], ("badnet", "amp false", "none"): [1]}


def test_a_purified_network_of_ones_own_is_named_and_not_called_damaged(tmp_path):
    attack(tmp_path)
    noted(attack(tmp_path, folder="mine_sau"), own={"model_file": "mine.pt"})
    page, _ = build(tmp_path)
    assert "mine_sau (a purified network of your own" in page
    assert [run.path.name for run in read(tmp_path)[0]] == ["badnet_s0"]


def test_the_best_has_the_highest_der_and_the_oracle_takes_no_part(tmp_path):
    attacked = attack(tmp_path)
    defense(attacked, "anp", der=99.0, asr=0.0, selection="oracle")
    for name, rating, asr in (("sau", 96.0, 1.0), ("ft", 96.0, 4.0), ("fp", 60.0, 80.0)):
        defense(attacked, name, der=rating, asr=asr)
    found = cells(tmp_path)
    ranks = {key[1]: cell.rank for key, cell in found.items()}
    assert ranks == {"none": 0, "anp": 0, "sau": 1, "ft": 2, "fp": 0}
    page, _ = build(tmp_path)
    assert page.count("<b>anp (oracle)</b>") == 2  # in the leaderboard, and beside the published table
    assert len(re.findall(r'<span class="tag">best</span> 96.00', page)) == 1


BROKEN = {
    "unfinished": lambda path: (path / "manifest.json").unlink(),
    "no JSON": lambda path: (path / "summary.json").write_text("{"),
    "holds a list": lambda path: ((path / "summary.json").write_text("[]"), alone(path)),
    "differs from manifest.json": lambda path: (path / "metrics.jsonl").write_text("{}\n"),
    "it is not a result folder": lambda path: (path / "config.yaml").write_text("- 1\n"),
    "manifest.json is damaged": lambda path: (path / "manifest.json").write_text("[]"),
    "acc is 'NaN'": lambda path: (edit(path, acc="NaN"), alone(path)),
    "acc is 'nan'": lambda path: (edit(path, acc=float("nan")), alone(path)),
    "has no acc": lambda path: (edit(path, acc=None), alone(path)),
    "summary.json is missing": lambda path: (path / "summary.json").unlink(),
}


def alone(path: Path) -> None:
    for name in ("config.yaml", "manifest.json"):
        (path / name).unlink()


def edit(path: Path, **values: object) -> None:
    (path / "summary.json").write_text(json.dumps({**json.loads((path / "summary.json").read_text()), **values}))


def noted(path: Path, **facts: object) -> None:
    """A finished folder with further facts in its configuration."""
    record = Record(path)
    record.check()
    summary = record.summary()
    (path / "manifest.json").unlink()
    record.update_config(**facts)
    record.finish(summary)


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_folder_is_shown_with_its_reason_and_counts_nothing(tmp_path, reason):
    for seed in (0, 1):
        attack(tmp_path, seed=seed, acc=90.0 + seed)
    BROKEN[reason](tmp_path / "badnet_s1")
    if reason == "no JSON":
        alone(tmp_path / "badnet_s1")
    cell = next(cell for section in tables(tmp_path) for cell in section.cells if "badnet_s1" in cell.runs[-1].name)
    assert reason in cell.reason and "\n" not in cell.reason
    assert cell.status in ("partly", "unfinished", "damaged")
    assert all(run.figures["acc"] == 90 for run in cell.good)
    page, _ = build(tmp_path)
    assert f"<b>{cell.status}</b>" in page and reason.replace("'", "&#39;") in page


ODD = {
    "notes that are a number": lambda path: (path / "config.yaml").write_text(
        "schema: 1\ndigest: x\nidentity: {}\nnotes: 5\n"
    ),
    "rows of no end": lambda path: _instead(path / "metrics.jsonl"),
    "epochs beyond counting": lambda path: (path / "metrics.jsonl").write_text('{"epoch": 1e16, "loss": 1}\n'),
    "a figure of 400 digits": lambda path: (path / "summary.json").write_text(
        json.dumps({"acc": 90.0, "trigger": {"psnr": 10**400}, "risk": {"before": {"r_adv": 10**400}}})
    ),
    "a log that leads elsewhere": lambda path: (path / "log.txt").symlink_to(_elsewhere(path)),
}


def _elsewhere(path):
    (file := path / "defense" / "secret").parent.mkdir(exist_ok=True)
    file.write_text("a secret")
    return file


def _instead(file):
    file.unlink(missing_ok=True)
    os.mkfifo(file)


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("sealed", [True, False])
def test_one_odd_folder_does_not_take_the_report_down(tmp_path, odd, sealed):
    attack(tmp_path, seed=0)
    path = attack(tmp_path, seed=1, rows=2)
    for name in ("manifest.json", *(() if sealed else ("config.yaml",)), *(("log.txt",) if "log" in odd else ())):
        (path / name).unlink(missing_ok=True)
    ODD[odd](path)
    page, _ = build(tmp_path)
    assert "badnet_s0" in page and "a secret" not in page


def test_an_unfinished_run_says_how_far_it_came(tmp_path):
    path = attack(tmp_path, rows=3)
    (path / "manifest.json").unlink()
    (path / "log.txt").write_text("one\nepoch 3/8  loss 0.5\n")
    (cell,) = cells(tmp_path).values()
    assert cell.status == "unfinished" and "it reached epoch 3; last in its log: epoch 3/8  loss 0.5" in cell.reason
    (path / "log.txt").write_text("one\n\x1b]0;evil\x07\n")
    assert next(iter(cells(tmp_path).values())).reason.endswith(r"last in its log: \x1b]0;evil\x07")


def test_what_a_grid_gave_up_is_shown_with_its_reason(tmp_path):
    """Also a cell that died before it had a folder; not one that a later try finished."""
    path = attack(tmp_path, rows=3)
    (path / "manifest.json").unlink()
    done = attack(tmp_path, seed=1)
    kept = tmp_path / ".grid" / "failed"
    kept.mkdir(parents=True)
    below = f"{done.name}/defense/sau_c0.05_0123456789"
    for name in (path.name, done.name, below.replace("/", "__")):
        (kept / name).write_text(json.dumps({"reason": "killed by signal 9", "tries": 2}))
    (kept / "half").write_text("{")
    (tmp_path / "empty").mkdir()
    (kept / "empty").write_text(json.dumps({"reason": "no end", "tries": 1}))
    runs, others = read(tmp_path)
    assert ["killed by signal 9" in run.reason for run in runs] == [True, False]
    assert "it reached epoch 3" in runs[0].reason
    why = "the grid gave it up after"
    assert others == [f"{below} ({why} 2 tries: killed by signal 9)", f"empty ({why} 1 tries: no end)"]
    shutil.rmtree(path)
    shutil.rmtree(done)
    with pytest.raises(RecordError, match="killed by signal 9"):
        read(tmp_path)


def test_a_changed_text_is_noticed_and_a_changed_weight_where_it_is_looked_at(tmp_path):
    path = attack(tmp_path)
    raw = bytearray((path / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (path / "model.safetensors").write_bytes(raw)
    assert cells(tmp_path)["badnet", "none"].status == "measured"  # the size is right; no figure comes from it
    with pytest.raises(RecordError, match="model.safetensors is missing or damaged"):
        Record(path).check()
    (path / "model.safetensors").write_bytes(raw + b"x")
    assert cells(tmp_path)["badnet", "none"].status == "damaged"


def test_summaries_alone_are_unverified_and_their_names_say_the_rest(tmp_path):
    alone(attack(tmp_path, "badnet", 3))
    (section,) = tables(tmp_path)
    (cell,) = section.cells
    assert (cell.attack, cell.status, cell.runs[0].seed, section.dataset) == ("badnet", "unverified", 3, None)
    assert compare(section) == [] and compare(tables(tmp_path, "cifar10")[0])


def test_the_names_of_a_grid_say_ratio_share_and_seed(tmp_path):
    """Whole folders say it themselves; of kept summaries the names do, and the digests in them keep nothing apart."""
    for seed in (0, 1):
        for ratio, pratio in ((0.1, 0.1), (0.05, 0.05)):
            attacked = attack(tmp_path, seed=seed, folder=f"badnet_r{ratio}_0123{seed}56789_s{seed}", pratio=pratio)
            (attacked / "defense" / "sau_c0.05_abcdef0123").parent.mkdir()
            defense(attacked, "sau", seed).rename(attacked / "defense" / f"sau_c0.05_abcdef012{seed}")
    whole = cells(tmp_path)
    assert {len(cell.good) for cell in whole.values()} == {2} and ("badnet", "pratio 0.1", "sau") in whole
    for manifest in list(tmp_path.rglob("manifest.json")):
        alone(manifest.parent)
    assert set(cells(tmp_path)) == set(whole)


def test_the_kept_results_are_shown():
    (section,) = tables(REPOSITORY / "docs" / "results" / "cifar10_cpu.jsonl", "cifar10")
    assert {cell.status for cell in section.cells} == {"unverified"}
    sau = next(pair for pair in compare(section) if (pair.attack, pair.defense) == ("BadNets", "sau"))
    assert sau.theirs == [89.31, 1.53, 88.81, 95.74] and sau.differences[1] == pytest.approx(sau.ours[1] - 1.53)


def test_defenses_on_one_machine_of_attacks_on_two_are_two(tmp_path):
    """A digest says nothing of the machine, of the attack's neither; each purified other weights."""
    for amp in (True, False):
        attacked = attack(tmp_path, folder=f"badnet_{amp}")
        noted(attacked, amp=amp, threads=1)
        noted(defense(attacked, "sau"), amp=False, threads=1)
    runs, _ = read(tmp_path)
    assert {run.status for run in runs} == {"verified"} and len(runs) == 4


def test_a_defense_of_the_attack_that_was_here_before_does_not_count(tmp_path):
    left = defense(attack(tmp_path, "badnet", folder="x"), "ft")
    left.rename(tmp_path / "kept")
    shutil.rmtree(tmp_path / "x")
    left.parent.mkdir(parents=True)
    (tmp_path / "kept").rename(left)
    attack(tmp_path, "blended", folder="x")
    old = next(run for run in read(tmp_path)[0] if run.defense == "ft")
    assert (old.status, old.reason) == ("damaged", "it purified another attack than the one that is here now")


def test_a_copy_is_no_second_seed(tmp_path):
    attack(tmp_path, folder="first")
    attack(tmp_path, folder="second")
    (cell,) = cells(tmp_path).values()
    assert len(cell.good) == 1 and "the same run as first" in cell.reason


@pytest.mark.parametrize("copy", ["after", "before"])
def test_a_copy_without_its_attack_is_no_row_and_takes_no_place(tmp_path, copy):
    """Whichever of the two folders is read first; and also beside an attack that nothing purified."""
    defense(attack(tmp_path, folder="middle"), "sau")
    shutil.copytree(tmp_path / "middle", tmp_path / copy)
    for name in ("config.yaml", "manifest.json", "summary.json"):
        (tmp_path / copy / name).unlink()
    assert {cell.status for cell in cells(tmp_path).values()} == {"measured"}
    assert [(cell.attack, cell.defense) for cell in cells(tmp_path).values()] == [("badnet", "none"), ("badnet", "sau")]


def test_the_same_run_on_another_machine_is_no_copy_and_no_second_seed(tmp_path):
    """Equal digests, for precision, device and threads are not in them; what differs is the variant of all seeds."""
    for seed, amp in ((0, True), (0, False), (1, True)):
        attacked = attack(tmp_path, seed=seed, folder=f"badnet_{amp}_s{seed}")
        for path in (attacked, defense(attacked, "sau", seed)):
            noted(path, amp=amp, threads=1)
    found = cells(tmp_path)
    assert {key: len(cell.good) for key, cell in found.items()} == {
        ("badnet", "amp true", "none"): 2, ("badnet", "amp true", "sau"): 2,
        ("badnet", "amp false", "none"): 1, ("badnet", "amp false", "sau"): 1,
    }  # fmt: skip


def test_a_defended_folder_of_the_benchmark_is_shown(tmp_path):
    (tmp_path / "badnet_bb").mkdir()
    (tmp_path / "badnet_bb" / "attack_result.pt").write_bytes(b"x")
    defense(tmp_path / "badnet_bb", "sau")
    found = cells(tmp_path)
    assert found["badnet_bb", "sau"].status == "measured" and tables(tmp_path)[0].dataset == "cifar10"


def test_a_published_figure_agrees_with_itself():
    """DER follows from ACC and ASR before and after, to the rounding of the last digit."""
    tables = published()["tables"]
    assert {name for name, table in tables.items() if table["selection"] == "oracle"} == {"anp", "fp"}
    assert set(tables) >= {"none", "sau", "anp", "fp", "nc", "nad", "ep", "i-bau"}
    for table in tables.values():
        before = table.get("before", tables["none"]["rows"])
        assert list(table["rows"]) == [name for name in published()["names"] if name in table["rows"]]
        assert table["source"] and table["selection"] in ("fixed", "oracle") and set(table["rows"]) <= set(before)
        for name, (acc, asr, _, rating) in table["rows"].items():
            if rating is not None:
                pairs = [[Share(round(100 * v), 10_000) for v in pair] for pair in (before[name][:2], (acc, asr))]
                assert der(Score(*pairs[0]), Score(*pairs[1])) == pytest.approx(rating, abs=0.011), (table, name)


def test_only_the_published_setting_is_set_beside_the_published(tmp_path):
    defense(attack(tmp_path, seed=0), "sau", acc=89.0)
    defense(attack(tmp_path, seed=1, pratio=0.01), "sau", seed=1, acc=50.0)
    pairs = [pair for pair in compare(tables(tmp_path)[0]) if (pair.attack, pair.defense) == ("BadNets", "sau")]
    assert [pair.differences[0] for pair in pairs] == [pytest.approx(89 - 89.31)]
    attack(tmp_path / "other", dataset="gtsrb")
    assert compare(tables(tmp_path / "other")[0]) == []


def test_the_means_of_tables_that_name_them_are_those_of_the_sources():
    """FT 92.09 / 38.86 with DER 78.77 over seven attacks, MBNS 91.83 / 65.76 with DER 65.31 over six."""
    for name, count, wanted in (("ft", 7, (92.09, 38.86, 53.46, 78.77)), ("bnp", 6, (91.83, 65.76, 30.63, 65.31))):
        rows = list(published()["tables"][name]["rows"].values())
        assert len(rows) == count and mean(rows) == pytest.approx(wanted, abs=0.006)


def test_published_figures_stand_beside_rows_that_were_chosen_alike(tmp_path, script):
    """FP's were chosen by the test sets, SAU's by nobody; the page shows all and marks them."""
    for seed, select in enumerate(("defender", "oracle")):
        victim = attack(tmp_path, seed=seed)
        defense(victim, "sau", seed)
        for name in ("fp", "clp"):
            defense(victim, name, seed, select=select, selection=select)
    assert alike("fp", True) and alike("clp", False) and not alike("fp", False) and not alike("clp", True)
    assert not alike("rnp", False) and not alike("rnp", True)  # nothing is published
    status, out, _ = script("table.py", str(tmp_path))
    overview = [line.strip("| ").split(" | ") for line in out.partition("sau - rival")[0].splitlines() if "|" in line]
    published_acc = {line[0]: line[-4] for line in overview}
    assert status == 0 and published_acc["fp (oracle)"] == "91.31" and published_acc["fp"] == "-"
    assert published_acc["clp"] == "90.07" and published_acc["clp (oracle)"] == "-" and published_acc["sau"] == "89.31"
    page = build(tmp_path)[0].partition("Beside the published table")[2]
    marks = dict(re.findall(r"<b>((?:fp|clp)(?: \(oracle\))?)</b>(.*?)</td>", page))
    theirs = {name: "theirs: oracle" in tags for name, tags in marks.items()}
    assert theirs == {"fp": True, "fp (oracle)": True, "clp": False, "clp (oracle)": False}


FORMULA = "=SUM(A1) & <b>100%"


def test_the_exports_hold_the_table(tmp_path):
    attacked = attack(tmp_path, FORMULA, folder="odd_s0")
    defense(attacked, "sau", der=96.0)
    defense(attacked, "ft", der=50.0, asr=90.0)
    found = tables(tmp_path)
    rows = json.loads(as_json(found))
    assert [row["defense"] for row in rows] == ["none", "sau", "ft"] and rows[1]["der"] == 96 and rows[1]["rank"] == 1
    lines = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert (
        lines[0]["attack"] == "'" + FORMULA and lines[1]["asr"] == "2.0" and lines[1]["folders"] == "odd_s0/defense/sau"
    )
    latex = as_latex(found)
    assert r"=SUM(A1) \& \textless{}b\textgreater{}100\% & sau & 1" in latex
    assert r"\textbf{96.00}" in latex and r"\underline{50.00}" in latex


def test_the_dagger_of_latex_is_explained_in_print(tmp_path):
    """Below the table, where a comment would not be printed; without an oracle's row there is none to explain."""
    attacked = attack(tmp_path)
    defense(attacked, "sau")
    assert r"\dagger" not in as_latex(tables(tmp_path))
    defense(attacked, "anp", selection="oracle")
    _, row, note = as_latex(tables(tmp_path)).split(r"$^\dagger$")
    assert (
        row.startswith(" & 1")
        and r"\end{tabular}" in row
        and "%" not in row.partition(r"\end{tabular}")[2].replace(r"\%", "")
    )
    assert note.strip() == r": chosen by test data.\par}"


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\t=1", " =1", "\r@x"])
def test_no_cell_of_the_csv_is_a_formula(tmp_path, text):
    attack(tmp_path, text, folder="x_s0")
    (row,) = csv.DictReader(io.StringIO(as_csv(tables(tmp_path))))
    assert row["attack"] == "'" + printable(text)


@pytest.mark.parametrize("text", ["a\r=1+1", "\rx", "a\n=1", "\tx"])
def test_no_text_of_the_csv_ends_its_line(tmp_path, text):
    attack(tmp_path, text, folder="x_s0")
    written = as_csv(tables(tmp_path))
    (row,) = csv.DictReader(io.StringIO(written, newline=""))
    assert row["attack"] == printable(text) and len(written.splitlines()) == 2


def test_the_page_needs_nothing_else_and_names_stay_text(tmp_path):
    name = "<script>alert(1)</script>"
    defense(attack(tmp_path, name, folder="x_s0"), "sau")
    page, _ = build(tmp_path)
    assert name not in page and "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert page.count("<script>") == 1 and not re.search(r"(src|href)=\"(?!#|data:)", page)
    assert not re.search(r"https?://|@import", page) and page.startswith("<!doctype html>")


def test_pictures_of_a_real_record(finished, tmp_path):
    """Digits need no files, so the clean pictures are there; a damaged picture is said, and the rest is shown."""
    page, _ = build(finished / "record")
    assert "Rows: clean, triggered, difference." in page and page.count("data:image/png;base64,") == 1
    copy = tmp_path / "record"
    shutil.copytree(finished / "record", copy)
    file = copy / "victim" / "triggered.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    page, _ = build(copy)
    assert "triggered.safetensors is missing or damaged" in page and "data:image/png" not in page


def test_the_command_writes_what_is_asked_for(tmp_path, script):
    defense(attack(tmp_path / "record"), "sau")
    status, out, err = script("report.py", "record", "--csv", "t.csv", "--latex", "t.tex", "--json", "t.json")
    assert status == 0 and err == ""
    files = ["report.html", "t.csv", "t.tex", "t.json"]
    assert [line.split(":")[0] for line in out.splitlines()] == files
    assert all("badnet" in (tmp_path / name).read_text() for name in files)


def test_the_command_refuses_a_folder_without_results(tmp_path, script):
    (tmp_path / "empty" / "notes").mkdir(parents=True)
    for root, text in (("none", "there is no folder none"), ("empty", "empty holds no results of attacks")):
        status, _, err = script("report.py", root)
        assert status == 2 and text in the_error(err)
    assert not (tmp_path / "report.html").exists()


def test_the_table_over_seeds_is_the_same_reading(tmp_path, script):
    for seed, asr in enumerate((1.0, 3.0)):
        defense(attack(tmp_path, seed=seed), seed=seed, asr=asr)
    status, out, _ = script("seeds.py", str(tmp_path))
    row = "| badnet | sau | 2 | 88.00, 88.00 | 1.00, 3.00 | 80.00, 80.00 | 96.00, 96.00 | 2.00, 2.00 | 50, 50 |"
    assert status == 0 and row in out.splitlines()


def test_the_exports_say_what_is_missing_and_who_saw_poisons(tmp_path):
    defense(attack(tmp_path, "badnet"), "sau")
    other = defense(attack(tmp_path, "lf"), "d3")
    edit(other, data="poisoned")
    alone(other)
    found = tables(tmp_path)
    rows = {(row["attack"], row["defense"]): row for row in json.loads(as_json(found))}
    assert rows["lf", "d3"]["data"] == "poisoned" and rows["badnet", "sau"]["data"] == "clean"
    assert ("lf", "sau") not in rows and "lf & sau" not in as_latex(found)


def test_sections_number_their_rows_apart(tmp_path):
    """The overview links to them."""
    attack(tmp_path, folder="a", dataset="cifar10")
    attack(tmp_path, folder="b", dataset="gtsrb")
    assert re.findall(r'<tbody id="(c\d+)"', build(tmp_path)[0]) == ["c1", "c2"]


def test_the_overview_has_a_column_for_each_defense_that_ran(tmp_path):
    """The undefended network first; what was not run is blank."""
    for seed, ratio in enumerate((0.05, 0.01)):
        attacked = attack(tmp_path, seed=seed)
        defense(attacked, "sau", seed, ratio=ratio, der=90.0 + seed)
        defense(attacked, "anp", seed, der=80.0)
    attack(tmp_path, "lf", asr=70.0)
    page, _ = build(tmp_path)
    ((head, body),) = re.findall(r'<table class="heat">\n<thead>(.*?)</thead>\n<tbody>(.*?)</tbody>', page, re.S)
    names = [re.sub("<[^>]*>", " ", name).split() for name in re.findall(r'<th scope="col">(.*?)</th>', head)]
    assert names == [["none"], ["anp"], ["sau", "ratio", "0.01"], ["sau", "ratio", "0.05"]]
    texts = re.findall(r"<a [^>]*>(.*?)</a>", body)
    assert texts == ["98.0", "80.0", "91.0", "90.0", "70.0"]
    assert body.count("<td></td>") == 3 and "not run" not in page.partition("<main>")[2].replace("Blank: not run", "")


def test_the_overview_does_not_repeat_a_cell_where_another_one_ended_early(tmp_path):
    for name, more in (("badnet", {}), ("wanet", {"ended_early": "round 3 of 9, before batch 1 of 2"})):
        defense(attack(tmp_path, name), "sau", der=90.0 + len(more), **more)
    ((_, body),) = re.findall(
        r'<table class="heat">\n<thead>(.*?)</thead>\n<tbody>(.*?)</tbody>', build(tmp_path)[0], re.S
    )
    assert sorted(re.findall(r"<a [^>]*>(.*?)</a>", body)) == ["90.0", "91.0", "98.0", "98.0"]


def test_settings_of_no_end_are_cut(tmp_path):
    noted(attack(tmp_path), odd={f"a{number}": number for number in range(1000)})
    page, _ = build(tmp_path)
    assert "odd.a100: 100\n" in page and "odd.a500" not in page and "…\n" in page


def test_a_figure_that_cannot_be_is_damage(tmp_path):
    for number, (change, reason) in enumerate((
        ({"acc": -1.0}, "acc is '-1.0', allowed is a number from 0 to 100"),
        ({"asr": 100.5}, "asr is '100.5', allowed is a number from 0 to 100"),
        ({"seconds": 10**13}, "seconds is"),
    )):  # fmt: skip
        path = attack(tmp_path / str(number))
        edit(path, **change)
        alone(path)
        (cell,) = cells(tmp_path / str(number)).values()
        assert cell.status == "damaged" and reason in cell.reason
    path = defense(attack(tmp_path / "d"))
    edit(path, before={"asr": 98.0})
    alone(path)
    assert "lacks the scores before or after" in cells(tmp_path / "d")["badnet", "sau"].reason


def test_rows_count_up_to_the_first_that_is_none(tmp_path):
    path = attack(tmp_path, rows=1)
    alone(path)
    (path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 2}\n{"loss": 9}\n{"epoch": 3, "loss": 7}\n')
    assert [row["epoch"] for row in parse.rows(path / "metrics.jsonl")] == [1]


def test_the_clean_pictures_of_a_strip_are_those_that_were_triggered(finished, tmp_path, monkeypatch):
    """Row by row: what is clean, what is triggered, and their difference; and none of a data set that changed."""
    shown: list[Any] = []
    monkeypatch.setattr("sau.report.pictures._png", lambda *rows: shown.append(rows) or "data:,")
    (run,) = (run for run in read(finished / "record")[0] if run.path.name == "victim")
    strip = Pictures().strip(run)
    victim = load(finished / "record" / "victim")
    _, test, _ = victim.pictures(None)
    (clean, triggered, difference), bad = shown[0], victim.triggered
    at = [int((bad.pixels == picture).flatten(1).all(1).nonzero()[0]) for picture in triggered]
    assert len(at) == 4 and torch.equal(clean, test.pixels[bad.index[at]])
    assert torch.equal((difference > 0), (triggered.float() - clean.float()) != 0)
    assert list(strip.columns) == [f"class {int(bad.true_labels[i])}, wanted {int(bad.labels[i])}" for i in at]
    other = replace(test, labels=test.labels.flip(0))
    monkeypatch.setattr("sau.report.pictures._test_pictures", lambda *place: other)
    strip = Pictures().strip(run)
    assert "holds other pictures than the attack saw" in strip.note and strip.rows == ("triggered",)


def test_published_means_need_every_row_and_other_networks_stand_alone(tmp_path):
    assert mean([[1.0, 2.0], [3.0, None]]) == [2.0, None]
    attack(tmp_path)
    (section,) = tables(tmp_path)
    assert [pair.attack for pair in compare(section)] == ["BadNets"]  # what was not run here has no row
    assert compare(replace(section, network={**section.network, "name": "vgg19_bn"})) == []


def test_a_folder_that_cannot_be_read_is_named_and_the_others_are_shown(tmp_path, monkeypatch):
    attack(tmp_path, seed=0)
    attack(tmp_path, seed=1)
    really = reading._below

    def denied(folder: Path) -> Any:
        if folder.name == "badnet_s1":
            raise PermissionError(13, "Permission denied")
        return really(folder)

    monkeypatch.setattr(reading, "_below", denied)
    runs, others = read(tmp_path)
    assert [run.path.name for run in runs] == ["badnet_s0"]
    assert others == ["badnet_s1 (cannot be read: Permission denied)"]


def test_a_figure_that_one_seed_lacks_has_no_mean(tmp_path):
    """A mean over fewer seeds than the others in its row would not say so."""
    for seed in (0, 1):
        path = defense(attack(tmp_path, seed=seed), seed=seed)
    edit(path, after={"acc": 88.0, "asr": 2.0})
    alone(path)
    found = cells(tmp_path)["badnet", "sau"].figures
    assert found["racc"] is None and len(found["acc"].values) == 2


def test_seeds_that_do_not_count_are_not_wanted_and_copies_spoil_nothing(tmp_path):
    for seed in (0, 1):
        attack(tmp_path, seed=seed)
    attack(tmp_path, seed=0, folder="copy")
    found = cells(tmp_path)["badnet", "none"]
    assert (found.status, found.wanted, len(found.good)) == ("measured", 2, 2)
    (tmp_path / "badnet_s1" / "manifest.json").unlink()
    found = cells(tmp_path)["badnet", "none"]
    assert (found.status, found.wanted, len(found.good)) == ("partly", 1, 1)


def test_equal_means_are_told_apart_by_the_asr_and_what_does_not_count_comes_last(tmp_path):
    """Equal as they are shown: to two digits."""
    attacked = attack(tmp_path)
    for name, rating, asr in (("sau", 95.004, 1.0), ("ft", 95.001, 0.5), ("fp", 40.0, 90.0)):
        defense(attacked, name, der=rating, asr=asr)
    (defense(attacked, "anp", der=99.0) / "manifest.json").unlink()
    (section,) = tables(tmp_path)
    assert [(cell.defense, cell.rank) for cell in section.cells] == [
        ("none", 0), ("ft", 1), ("sau", 2), ("fp", 0), ("anp", 0)
    ]  # fmt: skip
    clean = attack(tmp_path / "clean", "prototype", asr=None)
    defense(clean, "sau", asr=None, der=None)
    (defense(clean, "anp", asr=None, der=None) / "manifest.json").unlink()
    assert [cell.defense for cell in tables(tmp_path / "clean")[0].cells] == ["none", "sau", "anp"]


def test_the_scores_before_are_those_of_the_attacked_network(tmp_path):
    defense(attack(tmp_path), acc=70.0)
    found = cells(tmp_path)["badnet", "sau"]
    assert found.before("acc").values == (90.0,) and found.before("asr").values == (98.0,)
    assert found.runs[0].lost == 20 and "Before: ACC 90.00, ASR 98.00, R-ACC 1.50." in build(tmp_path)[0]


def test_other_networks_and_other_test_pictures_are_other_sections(tmp_path, monkeypatch):
    """Where the data set is the same, like a subset of it."""
    attack(tmp_path, folder="a")
    monkeypatch.setitem(NETWORK, "width", 64)
    attack(tmp_path, folder="b")
    found = tables(tmp_path)
    assert [(len(section.cells), section.title) for section in found] == [
        (1, f"cifar10, preactresnet18 of width {width}") for width in (16, 64)
    ]
    monkeypatch.setitem(NETWORK, "width", 16)
    shutil.rmtree(tmp_path / "b")
    config = attack(tmp_path, folder="b", seed=1) / "config.yaml"
    config.write_text(config.read_text().replace("2" * 64, "3" * 64))
    assert [len(section.cells) for section in tables(tmp_path)] == [1, 1]


def test_long_settings_that_begin_alike_are_told_apart(tmp_path):
    for seed, end in enumerate("ab"):
        attack(tmp_path, seed=seed, layers="a long name of a layer, " + end)
    variants_of = [cell.attack_variant for cell in cells(tmp_path).values()]
    assert len({*variants_of}) == 2 and all(len(text) < 40 for text in variants_of)


def test_a_folder_that_is_not_ours_is_damaged_and_not_unfinished(tmp_path):
    """Nothing could be resumed."""
    path = attack(tmp_path)
    (path / "manifest.json").unlink()
    (path / "config.yaml").write_text("- 1\n")
    (cell,) = cells(tmp_path).values()
    assert cell.status == "damaged"


def test_numbers_are_written_short_and_bounds_never_too_high():
    seconds = {
        45.4: "45 s",
        99.4: "99 s",
        100.0: "2 min",
        5_969.0: "99 min",
        6_000.0: "1 h 40 min",
        12_000.0: "3 h 20 min",
    }
    assert {value: formatting.duration(value) for value in seconds} == seconds
    numbers = {3.0: "3", -120.0: "-120", 0.0: "0", 1.5: "1.5", 0.12344: "0.1234", 123456.0: "123456"}
    assert {value: formatting.short(value) for value in numbers} == numbers
    for bound in (0.0123456, 0.99996, 1.00004, 9.9999, 12.345, 72.0, 1234.56):
        written = float(formatting.at_most(bound))
        assert bound * (1 - 1e-3) < written <= bound, bound
    assert (
        formatting.at_most(12.345) == "12.34"
        and formatting.at_most(12.348) == "12.34"
        and formatting.at_most(72.0) == "72"
    )


def test_the_page_says_what_a_row_cannot(tmp_path):
    """How the trigger hides, who saw poisons, who chose by test data, what does not hold, and how many seeds lack."""
    attacked = attack(tmp_path, seed=0)
    attack(tmp_path, seed=1)
    path = defense(attacked, "sau", selection="oracle", risks=True)
    edit(attacked, trigger={"psnr": 31.2, "ssim": 0.9})
    edit(path, data="poisoned", risk={"after": {"bound": {"r_bd": 80.0, "at_most": 72.0}}})
    alone(path)
    files = [file for file in attacked.iterdir() if file.is_file() and file.name != "manifest.json"]
    (attacked / "manifest.json").write_bytes(schema.dump_manifest(files))
    page, _ = build(tmp_path)
    for text in (
        "Trigger: PSNR dB 31.200, SSIM 0.900.", "poisoned data</span>", "sau (oracle)</th>",
        "80.00 ≤ 72.00 does not hold.",
        '<td data-v="1">1<span class="v"> of 2</span></td>',
    ):  # fmt: skip
        assert text in page, text


def judged(path: Path, asr: float, passed: bool) -> Path:
    """The folder with a gate in its summary."""
    (path / "manifest.json").unlink()
    record = Record(path)
    record.finish({**record.summary(), "gate": {"asr": asr, "passed": passed}})
    return path


def dead_and_alive(root: Path) -> None:
    """BadNets took, on three networks; SIG did not, on one of two."""
    for seed in range(3):
        defense(judged(attack(root, "badnet", seed), 85.0, True), "sau", seed, asr=1.0 + seed, der=95.0)
    for seed, asr in enumerate((1.9, 90.0)):
        attacked = judged(attack(root, "sig", seed, asr=asr, acc=50.0), 85.0, asr > 85)
        defense(attacked, "sau", seed, asr=0.0, acc=10.0, der=40.0)


def test_an_attack_that_did_not_take_is_marked_and_ranked_nowhere(tmp_path, script):
    """On the page, in CSV, LaTeX and JSON, and in the tables of both scripts."""
    dead_and_alive(tmp_path)
    found = cells(tmp_path)
    assert (found["badnet", "sau"].rank, found["sig", "sau"].rank) == (1, 0)
    page, sections_ = build(tmp_path)
    rows = {(row["attack"], row["defense"]): row for row in json.loads(as_json(sections_))}
    assert (
        rows["sig", "sau"]["did_not_take"] == rows["sig", "none"]["did_not_take"] == "ASR below 85 on 1 of 2 networks"
    )
    assert rows["badnet", "sau"]["did_not_take"] is None and rows["sig", "sau"]["rank"] is None
    assert [row["did_not_take"] for row in csv.DictReader(io.StringIO(as_csv(sections_)))].count("") == 2
    line = "means over attacks: sig (ASR below 85 on 1 of 2 networks)."
    tables_ = [script(name, str(tmp_path))[1] for name in ("table.py", "seeds.py")]
    for text in (page, as_latex(sections_), *tables_):
        assert line in text and "sig (did not take)" in text and "badnet (did not take)" not in text
    assert ", below its gate of 85" in page and 'class="dead"' in page


def test_an_attack_that_did_not_take_is_in_no_mean_over_attacks(tmp_path, script):
    """Nor in the differences from the rivals, nor in the drawing."""
    dead_and_alive(tmp_path)
    for name in ("badnet", "sig"):
        for seed in (0, 1):
            defense(
                tmp_path / f"{name}_s{seed}", "ft", seed, asr=60.0, acc=89.0, der=70.0 if name == "badnet" else 99.0
            )
    _, out, _ = script("table.py", str(tmp_path))
    assert "| sau | 88.0 / 2.0 (3) | 10.0 / 0.0 (2) | 88.00 | 2.00 | 80.00 | 95.00 |" in out
    assert "| ft | 1 | 2 | -1.00 |" in out and out.index("| sau |") < out.index("| ft |")  # by the mean DER
    (drawn,) = scatters(tables(tmp_path)[0])
    assert drawn.title == "badnet" and [point.name for point in drawn.points] == ["before", "sau", "ft"]


def test_a_record_without_a_gate_is_judged_by_nothing_and_a_broken_gate_is_damage(tmp_path):
    """As older versions left it."""
    defense(attack(tmp_path, "sig", asr=1.9), "sau")
    assert cells(tmp_path)["sig", "sau"].rank == 1 and tables(tmp_path)[0].dead == ""
    path = judged(tmp_path / "sig_s0", 85.0, True)
    (path / "manifest.json").unlink()
    record = Record(path)
    record.finish({**record.summary(), "gate": {"asr": "much", "passed": False}})
    assert cells(tmp_path)["sig", "none"].status == "damaged" and "gate is" in cells(tmp_path)["sig", "none"].reason


def test_the_gate_of_a_defense_alone_marks_its_attack(tmp_path):
    """Of an attack whose folder is older, or gone but for its defenses."""
    judged(defense(attack(tmp_path, "sig", asr=1.9), "sau"), 85.0, False)
    assert {cell.dead for cell in cells(tmp_path).values()} == {"ASR below 85 on 1 of 1 networks"}


def test_results_at_any_depth_are_shown(tmp_path):
    """Grids below the root, and the folder of one attack; what holds none is named once, by its topmost folder."""
    defense(attack(tmp_path / "grid" / "first", "badnet"), "sau")
    attack(tmp_path, "blended")
    (tmp_path / "notes" / "old" / "older").mkdir(parents=True)
    (tmp_path / "grid" / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    attack(tmp_path / ".hidden", "lf")
    (tmp_path / "grid" / "loop").symlink_to(tmp_path)
    runs, others = read(tmp_path)
    assert [run.name for run in runs] == ["blended_s0", "grid/first/badnet_s0", "grid/first/badnet_s0/defense/sau"]
    assert others == ["grid/empty", "notes"]
    page, _ = build(tmp_path)
    assert "<td>grid/first/badnet_s0/defense/sau</td>" in page
    runs, others = read(tmp_path / "grid" / "first" / "badnet_s0")
    assert [run.name for run in runs] == ["badnet_s0", "badnet_s0/defense/sau"] and others == []


def test_a_defense_without_its_attack_is_no_attack(tmp_path):
    """A folder `defense` alone was once read as attacks called sau and ft."""
    defense(attack(tmp_path), "sau")
    with pytest.raises(
        RecordError, match="sau .a defense without its attack; name the folder of the attack or one above"
    ):
        read(tmp_path / "badnet_s0" / "defense")


def test_what_a_grid_below_the_root_gave_up_is_shown_with_its_reason(tmp_path):
    attack(tmp_path / "grid", "badnet")
    failed = tmp_path / "grid" / ".grid" / "failed"
    failed.mkdir(parents=True)
    (failed / "lf_s0").write_text(json.dumps({"reason": "no memory", "tries": 2}))
    assert read(tmp_path)[1] == ["grid/lf_s0 (the grid gave it up after 2 tries: no memory)"]


def test_equal_names_in_two_folders_of_summaries_are_no_seeds_of_each_other(tmp_path):
    """A seed that is there twice tells the folders apart; inside each, seeds are averaged as they are elsewhere."""
    for place, asr in (("one", 90.0), ("two", 80.0)):
        for seed in (0, 1):
            alone(attack(tmp_path / place, "badnet", seed, asr=asr))
    found = {cell.attack_variant: cell for cell in cells_of_all(tmp_path)}
    assert {name: cell.figures["asr"].values for name, cell in found.items()} == {
        "folder one": (90.0, 90.0), "folder two": (80.0, 80.0)
    }  # fmt: skip


def cells_of_all(root: Path) -> list[Cell]:
    return [cell for section in tables(root) for cell in section.cells]


def test_the_exports_have_every_value_and_a_deviation_of_three(tmp_path):
    for seed, asr in enumerate((1.0, 3.0)):
        attacked = attack(tmp_path, seed=seed)
        defense(attacked, "sau", seed, asr=asr)
        defense(attacked, "ft", seed, der=50.0)
    found = tables(tmp_path)
    none, sau, ft = json.loads(as_json(found))
    assert (sau["asr"], sau["asr_sd"], sau["asr_values"], sau["seeds"], ft["rank"]) == (2.0, None, [1.0, 3.0], 2, 2)
    assert (none["rank"], none["selection"], none["data"]) == (None, None, None)
    assert (sau["selection"], sau["data"]) == ("defender", "clean")
    row = next(line for line in as_latex(found).splitlines() if "& sau &" in line)
    assert [text.strip() for text in row.removesuffix(r" \\").split("&")][3:] == [
        "88.00, 88.00", "1.00, 3.00", "80.00, 80.00", r"\textbf{96.00, 96.00}", "50, 50", "900, 900"
    ]  # fmt: skip
    defense(attack(tmp_path, seed=2), "sau", 2, asr=5.0)
    sau = next(row for row in json.loads(as_json(tables(tmp_path))) if row["defense"] == "sau")
    assert (sau["asr"], sau["asr_sd"]) == (3.0, 2.0) and r"3.00 $\pm$ 2.00" in as_latex(tables(tmp_path))


def test_the_drawing_has_a_point_for_each_defense_where_its_figures_are(tmp_path):
    """ASR 25 % lies in the middle of a square-root scale; an oracle is hollow; over attacks only who ran on all."""
    for name in ("badnet", "lf"):
        attacked = attack(tmp_path, name, asr=100.0, acc=90.0)
        defense(attacked, "sau", acc=80.0, asr=25.0)
    defense(tmp_path / "lf_s0", "anp", acc=85.0, asr=25.0, selection="oracle")
    mean, badnet, lf = scatters(tables(tmp_path)[0])
    assert (mean.title, badnet.title, lf.title) == ("mean over 2 attacks", "badnet", "lf")
    assert [point.name for point in mean.points] == ["before", "sau"]
    before, anp, sau = sorted(lf.points, key=lambda point: -point.acc)
    kinds = [(point.name, point.kind) for point in (before, anp, sau)]
    assert kinds == [("before", "before"), ("anp (oracle)", "oracle"), ("sau", "defense")]
    left, right = scatter.LEFT, scatter.WIDTH - scatter.RIGHT
    assert (before.x, sau.x) == (right, (left + right) / 2) and before.y == scatter.TOP
    assert sau.y == scatter.HEIGHT - scatter.BOTTOM and anp.y == (before.y + sau.y) / 2
    assert lf.across[0] == (left, "0") and [label for _, label in lf.up] == ["80", "82", "84", "86", "88", "90"]
    page, _ = build(tmp_path)
    assert page.count("<svg") == 3 and "before 90.00 100.00; sau 80.00 25.00" in page


def test_no_names_in_the_drawing_overlap(tmp_path):
    """Twenty defenses beside each other: a name is placed where it is free, or left to the tooltip."""
    attacked = attack(tmp_path)
    for number in range(20):
        defense(attacked, f"defense{number}", acc=85.0 + number / 20, asr=1.0 + number / 10)
    (drawn,) = scatters(tables(tmp_path)[0])
    boxes = [(*point.text, scatter.LETTER * len(point.name)) for point in drawn.points if point.text]
    assert 5 < len(boxes) <= 21
    for i, (x, y, wide) in enumerate(boxes):
        assert not [
            1 for a, b, far in boxes[:i] if abs(b - y) < scatter.LINE - 0.2 and a < x + wide - 0.2 and x < a + far - 0.2
        ]
