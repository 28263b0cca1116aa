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

from sau import wording
from sau.errors import RecordError, printable
from sau.evaluate import Score, Share, der
from sau.record import schema
from sau.record.folder import Record
from sau.record.victim import load
from sau.report import read as reading
from sau.report.curves import charts
from sau.report.exports import as_csv, as_json, as_latex
from sau.report.page import build
from sau.report.pictures import Pictures
from sau.report.published import alike, compare, mean, published
from sau.report.read import read
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
    """`sides` is in an identity only where there are any; of folders known by their names alone nobody knows."""
    for seed in (0, 1, 2):
        more = {"sides": [0.5, 1.0]} if seed == 1 else {}
        attack(tmp_path, seed=seed, folder=f"badnet_r0.1_s{seed}", **more)
    alone(tmp_path / "badnet_r0.1_s2")
    runs, _ = read(tmp_path)
    assert [first for first, _ in variants(runs)] == ["no sides", "sides [0.5, 1.0]", ""]


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
    assert re.findall(r'<td class="t">(\S+) <span class="tag oracle">oracle', page) == [
        "anp",
        "anp",
    ]  # of all, of the rivals
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
    record.note(**facts)
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
    (section,) = tables(REPOSITORY / "docs" / "results" / "cifar10_cpu", "cifar10")
    assert {cell.status for cell in section.cells} == {"unverified", "not run"}
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


def test_what_was_not_run_is_shown_with_its_command(tmp_path):
    defense(attack(tmp_path, "badnet"), "sau")
    attack(tmp_path, "lf")
    assert cells(tmp_path)["lf", "sau"].status == "not run"
    page, _ = build(tmp_path)
    assert f"python defense/sau.py --result_file lf_s0 --record_root {tmp_path}" in page


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
    tagged = r'>(fp|clp) <span class="v">select (\w+)</span>((?: <span class="tag oracle">\w+: oracle</span>)*)</td>'
    rows = re.findall(tagged, build(tmp_path)[0])
    marks = {(name, select): re.findall(r"(\w+): oracle", tags) for name, select, tags in rows}
    assert marks["fp", "defender"] == ["theirs"] and marks["fp", "oracle"] == ["theirs", "ours"]
    assert marks["clp", "defender"] == [] and marks["clp", "oracle"] == ["ours"]


def test_curves_begin_before_the_defense_and_go_on_through_its_stages(tmp_path):
    path = defense(attack(tmp_path), rows=3, risks=True)
    drawn = {chart.title: chart for chart in charts(cells(tmp_path)["badnet", "sau"])}
    assert set(drawn) == {"Scores", "Risks", "Adversarial examples by type", "Loss"}
    acc = drawn["Scores"].lines[0]
    assert acc.label == "ACC" and acc.dots.count("h0") == 2 and acc.last == 88 and drawn["Scores"].ends == ("0", "3")
    assert drawn["Risks"].ends == ("0", "3") and "2.00 ≤ 72.00." in build(tmp_path)[0]
    rows = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}, {"stage": 1, "epoch": 1, "loss": 3.0}]
    alone(path)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"epoch":')
    (loss,) = (c for c in charts(cells(tmp_path)["badnet", "sau"]) if c.title == "Loss")
    assert loss.ends == ("1", "3") and loss.lines[0].last == 3


def test_counts_of_types_are_no_shares(tmp_path):
    """SAU's rows once counted adversarial examples by type under these names; only tracked risks are percentages."""
    defense(attack(tmp_path), risks=False)
    assert {chart.title for chart in charts(cells(tmp_path)["badnet", "sau"])} == {"Scores", "Loss"}


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
    row = "| badnet | sau | 2 | 88.00 ± 0.00 | 2.00 ± 1.41 | 80.00 ± 0.00 | 96.00 ± 0.00 | 2.00 ± 0.00 | 50 ± 0 |"
    assert status == 0 and row in out.splitlines()


def test_a_curve_goes_down_where_its_values_do(tmp_path):
    """Points are drawn by hand: 100 % is 16 units below the top, 0 % as high as the axis."""
    attacked = attack(tmp_path, rows=1, acc=75.0)
    (path,) = attacked.glob("metrics.jsonl")
    rows = [{"epoch": 1, "acc": 100.0, "loss": 0.0}, {"epoch": 3, "acc": 0.0, "loss": 0.0}]
    alone(attacked)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {chart.title: chart for chart in charts(cells(tmp_path)["badnet", "none"])}
    (acc,) = drawn["Scores"].lines
    assert acc.path == "M68 16l560 272" and drawn["Scores"].ends == ("1", "3") and drawn["Scores"].across == "epoch"
    assert drawn["Loss"].ticks[0] == (288, "0") and drawn["Loss"].lines[0].path == "M68 288l560 0"
    path.write_text(json.dumps(rows[0]) + "\n")  # one epoch is a point
    drawn = {chart.title: chart for chart in charts(cells(tmp_path)["badnet", "none"])}
    assert drawn["Scores"].lines[0].path == "M68 16h0" and drawn["Scores"].ends == ("1", "2")


def test_a_curve_is_the_mean_where_every_run_has_a_value_and_is_thinned_to_its_ends(tmp_path):
    for seed, rows in ((0, 300), (1, 299)):
        attack(tmp_path, seed=seed, rows=rows)
    (loss,) = (chart for chart in charts(cells(tmp_path)["badnet", "none"]) if chart.title == "Loss")
    assert loss.ends == ("1", "299") and loss.lines[0].last == 1 / 299
    assert len(re.findall(r"-?\d+ -?\d+", loss.lines[0].path)) == 60 and loss.lines[0].dots == ""


def test_a_defense_without_scores_has_no_curve_of_the_one_before(tmp_path):
    path = defense(attack(tmp_path))
    alone(path)
    (path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0}\n')
    (loss,) = charts(cells(tmp_path)["badnet", "sau"])
    assert loss.title == "Loss" and loss.across == "round"


def test_the_exports_have_intervals_and_round_as_the_page_does(tmp_path):
    """Half of the interval of 1 and 3 is 12.7062 x sqrt(2) / sqrt(2)."""
    for seed, asr in enumerate((1.0, 3.0)):
        attacked = attack(tmp_path, seed=seed)
        defense(attacked, "sau", seed, asr=asr)
        defense(attacked, "ft", seed, der=50.0)
    found = tables(tmp_path)
    none, sau, ft = json.loads(as_json(found))
    assert (sau["asr"], sau["asr_ci95"], sau["seeds"], ft["rank"]) == (2.0, 12.71, 2, 2)
    assert (none["rank"], none["selection"], none["data"]) == (None, None, None)
    assert (sau["selection"], sau["data"]) == ("defender", "clean")
    row = next(line for line in as_latex(found).splitlines() if "& sau &" in line)
    figures = [text.strip() for text in row.removesuffix(r" \\").split("&")][3:]
    assert figures[1:2] == [r"2.00 $\pm$ 12.71"] and figures[3] == r"\textbf{96.00 $\pm$ 0.00}"
    assert figures[0] == r"88.00 $\pm$ 0.00" and figures[4:] == [r"50 $\pm$ 0", r"900 $\pm$ 0"]


def test_the_exports_say_what_is_missing_and_who_saw_poisons(tmp_path):
    defense(attack(tmp_path, "badnet"), "sau")
    other = defense(attack(tmp_path, "lf"), "d3")
    edit(other, data="poisoned")
    alone(other)
    found = tables(tmp_path)
    rows = {(row["attack"], row["defense"]): row for row in json.loads(as_json(found))}
    assert rows["lf", "d3"]["data"] == "poisoned" and rows["badnet", "sau"]["data"] == "clean"
    assert rows["lf", "sau"]["status"] == "not run" and rows["lf", "sau"]["selection"] is None
    assert "lf & sau & not run & -- &" in as_latex(found)


def test_sections_number_their_rows_apart(tmp_path):
    """The overview links to them."""
    attack(tmp_path, folder="a", dataset="cifar10")
    attack(tmp_path, folder="b", dataset="gtsrb")
    assert re.findall(r'<tbody id="(c\d+)"', build(tmp_path)[0]) == ["c1", "c2"]


def test_the_overview_has_a_column_for_each_defense_that_ran(tmp_path):
    """The undefended network first; a cell that was not run stands under every variant of its defense."""
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
    assert texts == ["98.0", "80.0", "91.0", "90.0", "70.0", "not run", "not run", "not run"]


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


def test_a_command_can_be_pasted_whatever_the_folder_is_called(tmp_path):
    root = tmp_path / "my results; ls"
    defense(attack(root, "badnet"), "sau")
    attack(root, "lf")
    page, _ = build(root)
    assert f"--result_file lf_s0 --record_root &#39;{root}&#39;" in page


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
    assert [row["epoch"] for row in read(tmp_path)[0][0].rows] == [1]


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
    assert sum(pair.cell is None for pair in compare(section)) > 50  # what is published and was not run here
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


def test_what_was_not_run_is_shown_of_folders_of_the_benchmark_too(tmp_path):
    for folder, name in (("badnet_bb", "sau"), ("blended_bb", "ft")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "attack_result.pt").write_bytes(b"x")
        defense(tmp_path / folder, name)
    found = cells(tmp_path)
    assert found["badnet_bb", "ft"].status == found["blended_bb", "sau"].status == "not run"


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
    assert {value: wording.duration(value) for value in seconds} == seconds
    numbers = {3.0: "3", -120.0: "-120", 0.0: "0", 1.5: "1.5", 0.12344: "0.1234", 123456.0: "123456"}
    assert {value: wording.short(value) for value in numbers} == numbers
    for bound in (0.0123456, 0.99996, 1.00004, 9.9999, 12.345, 72.0, 1234.56):
        written = float(wording.at_most(bound))
        assert bound * (1 - 1e-3) < written <= bound, bound
    assert wording.at_most(12.345) == "12.34" and wording.at_most(12.348) == "12.34" and wording.at_most(72.0) == "72"


def test_the_page_says_what_a_row_cannot(tmp_path):
    """How the trigger hides, who saw poisons, who chose by test data, what does not hold, and how many seeds lack."""
    attacked = attack(tmp_path, seed=0)
    attack(tmp_path, seed=1)
    path = defense(attacked, "sau", selection="oracle", risks=True)
    edit(attacked, trigger={"psnr": 31.2, "ssim": 0.9})
    edit(path, data="poisoned", risk={"after": {"bound": {"r_bd": 80.0, "at_most": 72.0}}})
    alone(path)
    files = [file for file in attacked.iterdir() if file.is_file() and file.name != "manifest.json"]
    (attacked / "manifest.json").write_bytes(schema.manifest(files))
    page, _ = build(tmp_path)
    for text in (
        "Trigger: PSNR dB 31.200, SSIM 0.900.", "poisoned data</span>", ">96.0*</a>", "80.00 ≤ 72.00 does not hold.",
        '<td data-v="1">1<span class="ci"> of 2</span></td>',
    ):  # fmt: skip
        assert text in page, text
