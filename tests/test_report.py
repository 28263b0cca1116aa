"""The report: what is averaged and what never, who is ranked best, what does not count, what tables and files say."""

import csv
import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from synthetic import NETWORK, attack, defense, note
from toys import REPOSITORY, refuses, the_error

from sau.errors import RecordError, printable
from sau.evaluate import Proportion, Score, der
from sau.figures import scatter
from sau.grid.store import load, save
from sau.record.folder import Record
from sau.report.cells import Section, TableCell, sections
from sau.report.page import build, rerun_command
from sau.report.results import MeanStd, find_results
from sau.report.tables import PairedComparison, as_csv, as_json, as_latex, mean_row, paired_comparisons, published
from sau.report.tables import published_rows as compare

RESULTS = REPOSITORY / "docs" / "results"


def tables(root: Path, dataset: str | None = None) -> list[Section]:
    return sections(find_results(root)[0], dataset)


def cells(root: Path) -> dict[tuple[str, ...], TableCell]:
    (section,) = tables(root)
    return {tuple(filter(None, (c.attack, c.attack_label, c.defense, c.label))): c for c in section.cells}


def rows_of(text: str) -> list[list[str]]:
    """The cells of all tables of a page, row by row."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def kept(root: Path) -> Path:
    """The summaries below a folder as a file, as grids publish them."""
    found = {str(one.parent.relative_to(root)): json.loads(one.read_text()) for one in root.rglob("summary.json")}
    save(root.with_suffix(".jsonl"), found)
    return root.with_suffix(".jsonl")


def test_intervals_are_students_and_two_values_have_none():
    """t of 2 degrees of freedom at 97.5 % is 4.3027; the standard deviation of 1, 2, 3 is 1."""
    three, two = MeanStd((1.0, 2.0, 3.0)), MeanStd((1.0, 3.0))
    assert three.mean == 2 and three.half_interval == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert (three.text(1), three.text(interval=True)) == ("2.0±1.0", "2.00±2.48")
    assert (two.text(), two.half_interval, two.text(1, sign="+")) == ("1.00, 3.00", None, "+1.0, +3.0")
    assert MeanStd((5.0,)).text() == "5.00" and MeanStd((5.0,)).half_interval is None


def test_seeds_are_averaged_and_a_figure_that_one_lacks_has_no_mean(tmp_path):
    for seed, asr in enumerate((1.0, 2.0, 6.0)):
        path = defense(attack(tmp_path, seed=seed, acc=90.0 + seed), seed=seed, asr=asr)
    found = cells(tmp_path)
    assert found["badnet", "none"].figures["acc"].values == (90, 91, 92)
    assert found["badnet", "sau"].figures["asr"].mean == 3
    assert found["badnet", "sau"].figures["before_acc"].mean == 90
    note(path, {"after": {"acc": 88.0, "asr": 2.0}})
    found = cells(tmp_path)["badnet", "sau"]
    assert found.figures["racc"] is None and len(found.figures["acc"].values) == 3


@pytest.mark.parametrize(("first", "second", "wanted"), [
    ({"ratio": 0.05}, {"ratio": 0.01}, ["ratio=0.01", "ratio=0.05"]),
    ({}, {"ended_early": "round 3 of 9"}, ["", "ended_early=round 3 of 9"]),
    ({"eps": 0.1, "norm": "L2"}, {"norm": "L1", "patience": [0.5]}, ["eps=0.1, norm=L2", "norm=L1, patience=[0.5]"]),
])  # fmt: skip
def test_only_seeds_are_averaged(first, second, wanted, tmp_path):
    for seed, more in enumerate((first, second)):
        defense(attack(tmp_path, seed=seed, folder=f"s{seed}"), seed=seed, **more)
    found = [cell for cell in cells(tmp_path).values() if cell.defense == "sau"]
    assert [len(cell.results) for cell in found] == [1, 1] and sorted(cell.label for cell in found) == wanted


def test_another_precision_is_no_seed(tmp_path):
    for seed, amp in enumerate((True, False, True)):
        note(attack(tmp_path, seed=seed), amp=amp)
    found = {key: [result.seed for result in cell.results] for key, cell in cells(tmp_path).items()}
    assert found == {("badnet", "amp=true", "none"): [0, 2], ("badnet", "amp=false", "none"): [1]}


def test_the_same_seed_twice_is_told_apart_by_the_folder(tmp_path):
    """Equal digests and other figures: the same run on another machine."""
    for folder, acc in (("cpu", 90.0), ("gpu", 91.0)):
        defense(attack(tmp_path, folder=folder, acc=acc), acc=acc - 1)
    assert set(cells(tmp_path)) == {("badnet", name, d) for name in ("cpu", "gpu") for d in ("none", "sau")}


def test_data_sets_test_images_and_networks_are_sections(tmp_path, monkeypatch):
    attack(tmp_path, folder="a")
    attack(tmp_path, folder="b", dataset="gtsrb")
    other = attack(tmp_path, folder="c", seed=1)
    note(other, identity={**Record(other).check()["identity"], "test": "3" * 64})
    monkeypatch.setitem(NETWORK, "width", 64)
    attack(tmp_path, folder="d")
    titles = [section.title.replace(", preactresnet18 of width", "") for section in tables(tmp_path)]
    assert titles == ["cifar10 16", "cifar10 64", "cifar10 16", "gtsrb 16"]


def test_names_of_folders_say_what_a_summary_alone_does_not(tmp_path):
    """Attack, ratio, clean share and seed; whole folders say it themselves, with the same result."""
    for seed in (0, 1):
        for ratio in (0.1, 0.05):
            attacked = attack(tmp_path, seed=seed, folder=f"badnet_r{ratio}_0123{seed}56789_s{seed}", pratio=ratio)
            defense(attacked, "sau", seed).rename(attacked / "defense" / f"sau_c0.05_abcdef012{seed}")
    whole, alone = cells(tmp_path), cells(kept(tmp_path))
    assert {len(cell.results) for cell in whole.values()} == {2} and ("badnet", "pratio=0.1", "sau") in whole
    assert set(alone) == set(whole) and [all(c.verified for c in some.values()) for some in (whole, alone)] == [1, 0]
    assert {result.seed for result in find_results(kept(tmp_path))[0]} == {0, 1}


BROKEN = {
    "is unfinished": lambda path: (path / "manifest.json").unlink(),
    "differs from manifest.json": lambda path: (path / "metrics.jsonl").write_text("{}\n"),
    "not a result folder": lambda path: (path / "config.yaml").write_text("- 1\n"),
    "manifest.json is damaged": lambda path: (path / "manifest.json").write_text("[]"),
    "acc is 'NaN'": lambda path: note(path, {"acc": "NaN"}),
    "acc is 'nan'": lambda path: note(path, {"acc": float("nan")}),
    "asr is '100.5'": lambda path: note(path, {"asr": 100.5}),
    "seconds is": lambda path: note(path, {"seconds": 10**13}),
    "has no acc": lambda path: note(path, {"acc": None}),
    "gate is": lambda path: note(path, {"gate": {"asr": "much", "passed": False}}),
    "summary.json is missing": lambda path: (path / "summary.json").unlink(),
    "model.safetensors is missing or damaged": lambda path: (path / "model.safetensors").write_bytes(b"x"),
}


@pytest.mark.parametrize("reason", BROKEN)
def test_a_broken_folder_is_listed_with_its_reason_and_counts_nothing(tmp_path, reason):
    for seed in (0, 1):
        attack(tmp_path, seed=seed, acc=90.0 + seed)
    BROKEN[reason](tmp_path / "badnet_s1")
    results, (line,) = find_results(tmp_path)
    assert [result.figures["acc"] for result in results] == [90]
    assert line.startswith("badnet_s1: ") and reason in line and "\n" not in line


def test_whose_folder_does_not_count(tmp_path):
    """A network of one's own, a defense without its attack, and one of the attack that was here before."""
    attack(tmp_path)
    note(attack(tmp_path, folder="mine_sau"), own={"model_file": "mine.pt"})
    old = defense(attack(tmp_path, "badnet", seed=5, folder="x"), "ft").rename(tmp_path / "ft")
    shutil.rmtree(tmp_path / "x")
    attack(tmp_path, "blended", folder="x")
    (tmp_path / "x" / "defense").mkdir()
    shutil.copytree(old, tmp_path / "x" / "defense" / "ft")
    results, left_out = find_results(tmp_path)
    assert [result.name for result in results] == ["badnet_s0", "x"]
    wanted = ("a defense without its attack", "a purified network of your own", "it purified another attack")
    assert [name for name, line in zip(wanted, left_out, strict=True) if name not in line] == []


def test_results_at_any_depth_count_and_links_are_not_followed(tmp_path):
    defense(attack(tmp_path / "grid" / "first", "badnet"), "sau")
    attack(tmp_path, "blended")
    attack(tmp_path / ".hidden", "lf")
    (tmp_path / "grid" / "loop").symlink_to(tmp_path)
    names = ["blended_s0", "grid/first/badnet_s0", "grid/first/badnet_s0/defense/sau"]
    assert [result.name for result in find_results(tmp_path)[0]] == names
    assert "<td>grid/first/badnet_s0/defense/sau</td>" in build(tmp_path)[0]
    names = ["badnet_s0", "badnet_s0/defense/sau"]
    assert [result.name for result in find_results(tmp_path / "grid" / "first" / "badnet_s0")[0]] == names


def test_a_defense_of_a_folder_of_backdoorbench_counts(tmp_path):
    (tmp_path / "badnet_bb").mkdir()
    (tmp_path / "badnet_bb" / "attack_result.pt").write_bytes(b"x")
    defense(tmp_path / "badnet_bb", "sau")
    assert cells(tmp_path)["badnet_bb", "sau"].verified and tables(tmp_path)[0].dataset == "cifar10"


def test_ranks_follow_der_then_asr_and_oracles_take_no_part(tmp_path):
    """Equal DER as shown, to two digits, is decided by the ASR."""
    attacked = attack(tmp_path)
    defense(attacked, "anp", der=99.0, asr=0.0, selection="oracle")
    for name, rating, asr in (("sau", 95.004, 1.0), ("ft", 95.001, 0.5), ("fp", 40.0, 90.0)):
        defense(attacked, name, der=rating, asr=asr)
    (section,) = tables(tmp_path)
    ranks = [(cell.name, cell.rank) for cell in section.cells]
    assert ranks == [("none", 0), ("anp (oracle)", 0), ("ft", 1), ("sau", 2), ("fp", 0)]
    text, _ = build(tmp_path)
    assert text.count("<b>anp (oracle)</b>") == 2  # in the leaderboard, and beside the published table
    assert len(re.findall(r'<span class="tag">best</span> 95.00', text)) == 1


def dead_and_alive(root: Path) -> None:
    """BadNets took, on three networks; SIG did not, on one of two."""
    for name, asrs in (("badnet", (98.0, 98.0, 98.0)), ("sig", (1.9, 90.0))):
        for seed, asr in enumerate(asrs):
            attacked = attack(root, name, seed, asr=asr, acc=50.0 if name == "sig" else 90.0)
            note(attacked, {"gate": {"asr": 85.0, "passed": asr > 85}})
            good = {"asr": 1.0 + seed, "der": 95.0} if name == "badnet" else {"asr": 0.0, "acc": 10.0, "der": 40.0}
            defense(attacked, "sau", seed, **good)
            if seed < 2:
                defense(attacked, "ft", seed, asr=60.0, acc=89.0, der=70.0 if name == "badnet" else 99.0)


def test_an_attack_that_did_not_take_is_marked_and_in_no_rank_or_mean(tmp_path, script):
    """On the page, in CSV, LaTeX and JSON, in the tables, in comparisons and in the plot."""
    dead_and_alive(tmp_path)
    text, found = build(tmp_path)
    assert (cells(tmp_path)["badnet", "sau"].rank, cells(tmp_path)["sig", "sau"].rank) == (1, 0)
    rows = {(row["attack"], row["defense"]): row for row in json.loads(as_json(found))}
    why = "ASR below 85 or ACC too low on 1 of 2 networks"
    assert rows["sig", "sau"]["did_not_take"] == rows["sig", "none"]["did_not_take"] == why
    assert rows["badnet", "sau"]["did_not_take"] is None and rows["sig", "sau"]["rank"] is None
    outputs = {name: script("tables.py", name, str(tmp_path))[1] for name in ("table", "seeds")}
    for output in (text, as_latex(found), *outputs.values()):
        assert f"means over attacks: sig ({why})." in output
        assert "sig (did not take)" in output and "badnet (did not take)" not in output
    table = outputs["table"]
    assert "| sau | 88.00 | 2.00 | 80.00 | 95.00 |" in table and "| 2.0 (3) | 0.0 (2) |" in table
    assert "| ft | 1 | 2 | -1.00 |" in table and table.index("| sau |") < table.index("| ft |")
    plot = scatter(tables(tmp_path)[0])
    assert plot and plot[0].axes[0].get_title() == "badnet" and plot[1] == ["sau", "ft"]


def test_the_gate_in_the_summary_of_a_defense_marks_its_attack(tmp_path):
    note(defense(attack(tmp_path, "sig", asr=1.9), "sau"), {"gate": {"asr": 85.0, "passed": False}})
    assert {cell.dead for cell in cells(tmp_path).values()} == {"ASR below 85 or ACC too low on 1 of 1 networks"}


def test_a_run_is_repeated_by_its_script_or_by_the_package():
    recorded = ("attack/badnet.py --pratio 0.1", "/x/sau/__main__.py list", "sau list")
    wanted = ["python attack/badnet.py --pratio 0.1", "python -m sau list", "python -m sau list"]
    assert [rerun_command(each) for each in recorded] == wanted


def compared(root: Path, name: str = "sau") -> dict[str, PairedComparison]:
    (section,) = tables(root, "cifar10")
    return {rival: found for rival, _, found in paired_comparisons(section, name)}


@pytest.fixture
def rivals(tmp_path) -> Path:
    """SAU on four networks, FT on three of them, ANP as an oracle on one."""
    for seed, name in ((0, "badnet"), (1, "badnet"), (0, "lf"), (0, "wanet")):
        attacked = attack(tmp_path, name, seed)
        defense(attacked, "sau", seed, acc=88.0 + seed, asr=2.0, der=95.0)
        if name != "lf":
            defense(attacked, "ft", seed, acc=90.0, asr=82.0 - 4 * seed, der=55.0 + 2 * seed)
    defense(tmp_path / "badnet_s0", "anp", acc=89.0, asr=1.0, der=97.0, selection="oracle")
    return tmp_path


def test_differences_are_of_the_same_networks_and_averaged_over_the_seeds_of_an_attack(rivals, script):
    clean = attack(rivals, "prototype", 0, asr=None)  # without a trigger, so it takes no part
    for name in ("sau", "ft"):
        defense(clean, name, asr=None, der=None)
    ft, anp = compared(rivals)["ft"], compared(rivals)["anp (oracle)"]
    assert (ft.acc.values, ft.asr.values, ft.der.values) == ((-1.5, -2.0), (-78.0, -80.0), (39.0, 40.0))
    assert (ft.networks, ft.wins) == (3, 2) and ft.p == pytest.approx(0.5)
    assert anp.der.values == (-2.0,) and anp.wins == 0 and list(compared(rivals)) == ["ft", "anp (oracle)"]
    assert set(compared(rivals, "ft")) == {"sau", "anp (oracle)"} and compared(rivals, "anp") == {}
    status, out, _ = script("tables.py", "table", str(rivals))
    assert status == 0
    assert "| ft | 2 | 3 | -1.50, -2.00 | -78.00, -80.00 | +0.00, +0.00 | +39.00, +40.00 | 2 | 0.500 |" in out


def test_ties_are_left_out_of_the_sign_test(tmp_path):
    for name, rating in (("badnet", 95.0), ("lf", 90.0), ("wanet", 90.0)):
        attacked = attack(tmp_path, name)
        defense(attacked, "sau", der=95.0)
        defense(attacked, "ft", der=rating)
    assert compared(tmp_path)["ft"].wins == 2 and compared(tmp_path)["ft"].p == pytest.approx(0.5)  # of two, not three


def test_published_figures_agree_with_themselves():
    """DER follows from ACC and ASR before and after, to the rounding of the last digit."""
    tables = published()["tables"]
    assert {name for name, table in tables.items() if table["selection"] == "oracle"} == {"anp", "fp"}
    assert set(tables) >= {"none", "sau", "anp", "fp", "nc", "nad", "ep", "i-bau"}
    for table in tables.values():
        before = table.get("before", tables["none"]["rows"])
        assert set(table["rows"]) <= set(before) and table["source"]
        for name, (acc, asr, _, rating) in table["rows"].items():
            if rating is not None:
                pairs = [[Proportion(round(100 * v), 10_000) for v in pair] for pair in (before[name][:2], (acc, asr))]
                assert der(Score(*pairs[0]), Score(*pairs[1])) == pytest.approx(rating, abs=0.011), (table, name)
    for name, wanted in (("ft", (92.09, 38.86, 53.46, 78.77)), ("bnp", (91.83, 65.76, 30.63, 65.31))):
        assert mean_row(list(tables[name]["rows"].values())) == pytest.approx(wanted, abs=0.006)  # those of the sources
    assert mean_row([[1.0, 2.0], [3.0, None]]) == [2.0, None]


def test_only_runs_of_the_published_setting_stand_beside_the_published(tmp_path, monkeypatch):
    defense(attack(tmp_path, seed=0), "sau", acc=89.0)
    defense(attack(tmp_path, seed=1, pratio=0.01), "sau", seed=1, acc=50.0)
    pairs = [(cell.figures["acc"].mean, row[0]) for cell, row in compare(tables(tmp_path)[0]) if cell.defense == "sau"]
    assert pairs == [(89.0, 89.31)]
    for seed in (0, 1):
        defense(tmp_path / f"badnet_s{seed}", "ft", seed, acc=90.0)
    assert compared(tmp_path)["ft"].acc.values == (-40.0, -1.0)  # another ratio is another attack
    defense(attack(tmp_path / "few"), "sau", ratio=0.01)  # of the images, as another rival has more of them
    defense(tmp_path / "few" / "badnet_s0", "ft", ratio=0.1)
    assert [cell.defense for cell, _ in compare(tables(tmp_path / "few")[0])] == ["none"]
    assert compared(tmp_path / "few") == {}
    attack(tmp_path / "other", dataset="gtsrb")
    assert compare(tables(tmp_path / "other")[0]) == []
    monkeypatch.setitem(NETWORK, "name", "vgg19_bn")
    attack(tmp_path / "vgg")
    assert compare(tables(tmp_path / "vgg")[0]) == []


def test_published_means_stand_beside_rows_that_were_chosen_alike(tmp_path, script):
    for seed, select in enumerate(("defender", "oracle")):
        attacked = attack(tmp_path, seed=seed)
        defense(attacked, "sau", seed)
        for name in ("fp", "clp", "rnp"):
            defense(attacked, name, seed, select=select, selection=select)
    status, out, _ = script("tables.py", "table", str(tmp_path))
    acc = {row[0]: row[5] for row in rows_of(out.partition("sau - rival")[0]) if len(row) > 5}
    assert status == 0 and (acc["fp (oracle)"], acc["fp"]) == ("91.31", "-")
    assert (acc["clp"], acc["clp (oracle)"], acc["rnp (oracle)"], acc["sau"]) == ("90.07", "-", "-", "89.31")


def test_the_published_means_are_over_the_same_attacks(rivals, tmp_path, script):
    """Of the seven attacks three: BadNets, LF, WaNet; and none beside another data set."""
    out = script("tables.py", "table", str(rivals))[1]
    assert "| 88.17 | 2.00 | 80.00 | 95.00 | 90.30 | 2.24 | 86.88 | 95.41 |" in out  # (89.31 + 90.32 + 91.26) / 3, ...
    defense(attack(tmp_path / "other", dataset="digits"), dataset="digits")
    assert "mean DER | badnet |\n" in script("tables.py", "table", str(tmp_path / "other"))[1]


def test_tables_are_written_between_the_marks_of_a_page(rivals, tmp_path, script):
    file = tmp_path / "page.md"
    for text, status in (("before\n<!-- table -->\nformer\n<!-- /table -->\nafter\n", 0), ("no marks", 2)):
        file.write_text(text)
        assert script("tables.py", "table", str(rivals), "--into", str(file))[0] == status
        assert file.read_text() == text or not status
        if not status:
            first, _, rest = file.read_text().partition("<!-- table -->\n\nMeans")
            assert first == "before\n" and rest.endswith("<!-- /table -->\nafter\n") and "former" not in rest


def test_the_kept_tables_are_those_of_the_kept_summaries(script):
    _, out, _ = script("tables.py", "table", str(RESULTS / "table1_cpu.jsonl"), "--dataset", "cifar10")
    page = (RESULTS / "table1_cpu.md").read_text().replace("\n\n\n", "\n\n")
    assert f"<!-- table -->\n\n{out.rstrip()}\n\n<!-- /table -->" in page
    text = as_csv(tables(RESULTS / "table1_cpu.jsonl", "cifar10"))
    digest = "f69a98cac139be5a364d9b3475c669ac8491d605bcf1d0365126157a2869ec4a"  # of the table's CSV
    assert hashlib.sha256(text.encode()).hexdigest() == digest


@pytest.mark.parametrize("name", ["fp32_cpu", "gpu", "cifar10_cpu"])
def test_rows_of_a_page_are_those_that_its_command_prints(name, script):

    def table(text: str) -> list[dict[str, str]]:
        head, _, *rows = rows_of(text[text.index("| attack | defense |") :].partition("\n\n")[0])
        return [dict(zip(head, row, strict=True)) for row in rows]

    shown = table((RESULTS / f"{name}.md").read_text())
    printed = table(script("tables.py", "seeds", str(RESULTS / f"{name}.jsonl"))[1])
    assert shown and all(any(row.items() <= line.items() for line in printed) for row in shown)


def test_the_results_of_the_readme_are_those_that_its_command_prints_and_its_page_has(script):
    text = (REPOSITORY / "README.md").read_text().partition("## Results")[2]
    page = (REPOSITORY / "docs/defenses/sau-sam.md").read_text().partition("Beside the clean network")[2]
    attacks = ("badnet", "blended", "lf", "sig", "ssba", "wanet")
    assert f"clean docs/results/audit.jsonl/gpu_{{{','.join(attacks)}}}_s{{0,1,2}}\n" in text
    audits = [str(RESULTS / f"audit.jsonl/gpu_{attack}_s{seed}") for attack in attacks for seed in range(3)]
    theirs = {row[0]: [row[at] for at in (2, 3, 5, 7, 9)] for row in rows_of(script("tables.py", "clean", *audits)[1])}
    linked = {row[0]: [row[at] for at in (1, 2, 4, 6, 8)] for row in rows_of(page.partition("\n\n    ")[0])}
    ours = {row[0]: row[1:] for row in rows_of(text) if len(row) == 6}
    names = {"none", "sau", "sau-sam", "fst", "ft-sam", "d3", "control"}
    assert theirs["network"] == ["ACC", "ASR", "R-ACC", "statistics anew", "k = 5"] and names < set(ours) == set(linked)
    assert all(ours[name] == theirs[name] == linked[name] for name in names)


def test_the_exports_hold_every_value_and_a_deviation_of_three(tmp_path):
    for seed, asr in enumerate((1.0, 3.0)):
        attacked = attack(tmp_path, seed=seed)
        note(defense(attacked, "sau", seed, asr=asr), {"data": "poisoned"})
        defense(attacked, "ft", seed, der=50.0)
    none, sau, ft = json.loads(as_json(tables(tmp_path)))
    assert (sau["asr"], sau["asr_sd"], sau["asr_values"], sau["seeds"], ft["rank"]) == (2.0, None, [1.0, 3.0], 2, 2)
    assert (none["rank"], none["selection"], none["data"]) == (None, None, None)
    assert (sau["selection"], sau["data"], ft["data"], sau["status"]) == ("defender", "poisoned", "clean", "measured")
    row = next(line for line in as_latex(tables(tmp_path)).splitlines() if "& sau &" in line)
    assert [text.strip() for text in row.removesuffix(r" \\").split("&")][3:] == [
        "88.00, 88.00", "1.00, 3.00", "80.00, 80.00", r"\textbf{96.00, 96.00}", "50, 50", "900, 900"
    ]  # fmt: skip
    defense(attack(tmp_path, seed=2), "sau", 2, asr=5.0)
    sau = next(row for row in json.loads(as_json(tables(tmp_path))) if row["defense"] == "sau")
    assert (sau["asr"], sau["asr_sd"]) == (3.0, 2.0) and r"3.00$\pm$2.00" in as_latex(tables(tmp_path))


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@x", "\t=1", " =1", "\r@x", "a\r=1+1", "a\n=1", "\tx"])
def test_no_text_of_the_csv_is_a_formula_or_ends_its_line(tmp_path, text):
    attack(tmp_path, text, folder="x_s0")
    written = as_csv(tables(tmp_path))
    (row,) = csv.DictReader(io.StringIO(written, newline=""))
    assert row["attack"] == ("'" if text.lstrip()[0] in "=+-@" else "") + printable(text)
    assert len(written.splitlines()) == 2


def test_the_page_needs_nothing_else_and_names_stay_text(tmp_path):
    name = "<script>alert(1)</script>"
    note(defense(attack(tmp_path, name, folder="x_s0"), "sau"), odd={"a100": 100})
    text, _ = build(tmp_path)
    assert name not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<script>") == 1 and not re.search(r"(src|href)=\"(?!#|data:)", text)
    assert not re.search(r"https?://|@import", text) and text.startswith("<!doctype html>")
    assert "a100&#34;: 100" in text


def test_the_command_writes_what_is_asked_for(tmp_path, script):
    defense(attack(tmp_path / "record"), "sau")
    status, out, err = script("report.py", "record", "--csv", "t.csv", "--latex", "t.tex", "--json", "t.json")
    files = ["report.html", "t.csv", "t.tex", "t.json"]
    assert (status, err) == (0, "") and [line.split(":")[0] for line in out.splitlines()] == files
    assert all("badnet" in (tmp_path / name).read_text() for name in files)


def test_a_point_lies_where_its_figures_are(tmp_path):
    """Over attacks stands only who ran on all; the attacked network is a square, what test data chose is hollow."""
    for name in ("badnet", "lf"):
        attacked = attack(tmp_path, name, asr=100.0, acc=90.0)
        defense(attacked, "sau", acc=80.0, asr=25.0)
    defense(tmp_path / "lf_s0", "anp", acc=85.0, asr=9.0, selection="oracle")
    found = scatter(tables(tmp_path)[0])
    assert found and found[1] == ["sau"]
    shutil.rmtree(tmp_path / "badnet_s0")
    found = scatter(tables(tmp_path)[0])
    assert found and found[1] == ["anp (oracle)", "sau"]
    points = [(line.get_marker(), *line.get_xydata()[0], line.get_markerfacecolor() == "none")
              for line in found[0].axes[0].get_lines()]  # fmt: skip
    assert points == [("o", 9.0, 85.0, True), ("o", 25.0, 80.0, False), ("s", 100.0, 90.0, False)]
    shutil.rmtree(tmp_path / "lf_s0" / "defense")
    assert scatter(tables(tmp_path)[0]) is None


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
    one, other = (each["badnet_s0/defense/ft"] | {"before": 0, "after": 0} for each in (again, SUMMARIES))
    assert one == other
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


def test_an_audit_is_read_from_its_line(script):
    status, out, _ = script("audits.py", str(RESULTS / "audit.jsonl" / "badnet_s0"), "--out", "x")
    assert status == 0 and "| control |" in out
    status, _, err = script("audits.py", str(RESULTS / "audit.jsonl" / "nobody"), "--out", "x")
    assert status == 2 and "nobody" in the_error(err)
