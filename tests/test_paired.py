"""One defense against each rival: which networks are compared, and with what result."""

import json
import shutil
from pathlib import Path

import pytest
from synthetic import attack, defense
from toys import REPOSITORY, the_error

from sau.record.summaries import load
from sau.report.paired import duels
from sau.report.read import read
from sau.report.table import sections


def found(root: Path, champion: str = "sau"):
    (section,) = sections(read(root)[0], "cifar10")
    return {duel.rival + ("+" if duel.oracle else ""): duel for duel in duels(section, champion)}


@pytest.fixture
def root(tmp_path) -> Path:
    """SAU on four networks, FT on three of them, ANP as an oracle on one."""
    for seed, name in ((0, "badnet"), (1, "badnet"), (0, "lf"), (0, "wanet")):
        attacked = attack(tmp_path, name, seed)
        defense(attacked, "sau", seed, acc=88.0 + seed, asr=2.0, der=95.0)
        if name != "lf":
            defense(attacked, "ft", seed, acc=90.0, asr=82.0 - 4 * seed, der=55.0 + 2 * seed)
    defense(tmp_path / "badnet_s0", "anp", acc=89.0, asr=1.0, der=97.0, selection="oracle")
    return tmp_path


def test_differences_are_taken_on_the_same_network_and_averaged_over_the_seeds_of_an_attack(root):
    ft, anp = found(root)["ft"], found(root)["anp+"]
    assert (ft.acc.values, ft.asr.values, ft.der.values) == ((-1.5, -2.0), (-78.0, -80.0), (39.0, 40.0))
    assert (ft.networks, ft.wins) == (3, 2) and ft.p == pytest.approx(0.5)
    assert anp.der.values == (-2.0,) and anp.wins == 0 and list(found(root)) == ["ft", "anp+"]
    assert set(found(root, "ft")) == {"sau", "anp+"}


def test_a_clean_network_takes_no_part(root):
    clean = attack(root, "prototype", 0, asr=None)
    defense(clean, "sau", acc=80.0, asr=None, der=None)
    defense(clean, "ft", acc=90.0, asr=None, der=None)
    assert found(root)["ft"].networks == 3


def test_a_summary_without_every_figure_takes_no_part(root, tmp_path):
    """A stranger's may lack R-ACC; the others are compared all the same."""
    for seed in (0, 1):
        place = root / f"badnet_s{seed}" / "defense" / "fst" / "summary.json"
        place.parent.mkdir()
        scores = {"acc": 80.0, "asr": 1.0}
        place.write_text(json.dumps({"before": scores, "after": scores, "der": 90.0, "selection": "defender"}))
    assert list(found(root)) == ["ft", "anp+"]


def test_a_defense_with_one_seed_on_all_networks_is_compared_on_each(root):
    """Its default seed; the seed of a network is its attack's."""
    for seed, rating in ((0, 60.0), (1, 80.0)):
        defense(root / f"badnet_s{seed}", "fp", 0, der=rating)
    assert found(root)["fp"].der.values == (95 - 70.0,) and found(root)["fp"].networks == 2


def test_equals_win_nothing_and_are_left_out_of_the_test(tmp_path):
    for name, rating in (("badnet", 95.0), ("lf", 90.0), ("wanet", 90.0)):
        attacked = attack(tmp_path, name)
        defense(attacked, "sau", der=95.0)
        defense(attacked, "ft", der=rating)
    duel = found(tmp_path)["ft"]
    assert duel.wins == 2 and duel.p == pytest.approx(0.5)  # of two, not of three


def test_a_champion_that_test_data_chose_is_none(root):
    assert found(root, "anp") == {} and found(root)["anp+"].champion == "sau"


def test_one_attack_that_test_data_chose_for_speaks_for_the_rival(root):
    defense(root / "badnet_s0", "nc", der=80.0)
    defense(root / "lf_s0", "nc", der=80.0, selection="oracle")
    assert "nc+" in found(root) and found(root)["nc+"].name == "nc (oracle)"


def test_of_kept_summaries_other_settings_are_no_second_seed(root):
    """Their names say the same but for the digest: two defenses of a network, and two networks of a seed."""
    below = root / "badnet_s0" / "defense"
    for digits, rating in (("1" * 10, 97.5), ("2" * 10, 50.0)):
        defense(below.parent, "fp", der=rating).rename(below / f"fp_c0.05_{digits}")
    shutil.copytree(root / "wanet_s0", root / f"lf_r0.1_{'a' * 10}_s3")
    shutil.copytree(root / "wanet_s0", root / f"lf_r0.1_{'b' * 10}_s3")
    for file in root.rglob("*"):
        if file.is_file() and file.name != "summary.json":
            file.unlink()
    rivals = found(root)
    names = [f"fp folder {digits}" for digits in ("1" * 10, "2" * 10)]
    assert [rivals[name].der.values for name in names] == [(95 - 97.5,), (95 - 50.0,)]
    (section,) = sections(read(root)[0], "cifar10")
    attacks = [(cell.attack_variant, len(cell.good)) for cell in section.cells if cell.attack == "lf" and cell.good]
    assert sorted(set(attacks)) == [("", 1), (f"folder {'a' * 10}", 1), (f"folder {'b' * 10}", 1)]


def test_of_kept_summaries_the_oracles_stay_apart(root, script):
    for name in ("badnet_s0", "badnet_s1"):
        shutil.copytree(root / name, root / "kept" / name)
    below = root / "kept" / "badnet_s0" / "defense"
    (below / "anp").rename(below / "anp_c0.05_oracle_0123456789")
    defense(below.parent, "anp", acc=70.0, asr=9.0, der=80.0).rename(below / "anp_c0.05_abcdef0123")
    for file in (root / "kept").rglob("*"):
        if file.is_file() and file.name != "summary.json":
            file.unlink()
    rivals = found(root / "kept")
    assert {name for name in rivals if name.startswith("anp")} == {"anp select defender", "anp select oracle+"}
    status, out, _ = script("table.py", str(root / "kept"), "--dataset", "cifar10")
    assert status == 0 and "\n| anp | " in out and "\n| anp (oracle) | " in out and "select" not in out


def test_the_script_shows_them(root, script):
    status, out, _ = script("table.py", str(root), "--against", "sau")
    assert status == 0
    assert "| ft | 2 | 3 | -1.50, -2.00 | -78.00, -80.00 | +0.00, +0.00 | +39.00, +40.00 | 2 | 0.500 |" in out
    assert "anp (oracle)" in out and "| sau | 88.5 / 2.0 (2) | 88.0 / 2.0 | 88.0 / 2.0 |" in out


def test_the_published_means_are_over_the_same_attacks(root, tmp_path, script):
    """Of the seven attacks three: BadNets, LF, WaNet; and none beside other pictures or another share of poisons."""
    status, out, _ = script("table.py", str(root))
    assert status == 0 and "ours and the published ones over the same attacks" in out
    assert "| 88.17 | 2.00 | 80.00 | 95.00 | 90.30 | 2.24 | 86.88 | 95.41 |" in out  # (89.31 + 90.32 + 91.26) / 3, ...
    for place, more in (("digits", {"dataset": "digits"}), ("few", {"pratio": 0.01})):
        attacked = attack(tmp_path / "other" / place, "badnet", 0, **more)
        defense(attacked, "sau", dataset=more.get("dataset", "cifar10"))
        status, out, _ = script("table.py", str(attacked.parent))
        assert status == 0 and "mean DER |" in out and "paper" not in out


@pytest.mark.parametrize(("wanted", "status"), [("foo", 2), ("none", 2), ("ft", 0), (None, 0)])
def test_a_defense_that_is_nowhere_in_the_results_is_refused(root, script, wanted, status):
    found, out, err = script("table.py", str(root), *(("--against", wanted) if wanted else ()))
    assert found == status
    if status:
        assert f"--against is '{wanted}'" in the_error(err) and "has the defenses anp, ft, sau; name one" in err
    else:
        assert f"{wanted or 'sau'} - rival" in out


def test_a_page_gets_the_tables_between_its_marks(root, tmp_path, script):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    assert script("table.py", str(root), "--into", str(page))[0] == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n\nACC") and text.endswith("\n<!-- /table -->\nafter\n")
    assert "old" not in text and "| ft | 2 | 3 |" in text
    page.write_text("nothing\n")
    status, _, err = script("table.py", str(root), "--into", str(page))
    assert status == 2 and "has no <!-- table -->" in the_error(err)


def test_the_page_of_the_kept_table_says_what_the_kept_table_says(tmp_path, script):
    page = REPOSITORY / "docs" / "results" / "table1_cpu.md"
    copy = shutil.copy(page, tmp_path)
    script("table.py", str(page.with_suffix(".jsonl")), "--dataset", "cifar10", "--into", str(copy))
    assert Path(copy).read_text() == page.read_text()
    cells = len(load(page.with_suffix(".jsonl")))
    for text in (page.read_text(), (REPOSITORY / "README.md").read_text()):
        assert f" {cells} of 284 " in text


def cells_of(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_the_means_of_the_readme_are_those_of_the_kept_table():
    page = (REPOSITORY / "docs" / "results" / "table1_cpu.md").read_text().partition("sau - rival")[0]
    theirs = {row[0]: row[9:] for row in map(cells_of, page.splitlines()) if len(row) == 17}
    readme = (REPOSITORY / "README.md").read_text().partition("## Results")[2]
    ours = {row[0]: row[3:] for row in map(cells_of, readme.splitlines()) if len(row) == 8}
    assert {"none", "sau", "fst"} <= set(ours)
    for name in set(ours) - {"defense", "---"}:
        acc, asr, _, der = theirs[name][4:]
        published = " / ".join([acc, asr, der]) if acc != "-" else "-"
        assert ours[name] == [*theirs[name][:4], published], name


def test_the_kept_table_has_rivals():
    assert found(REPOSITORY / "docs" / "results" / "cifar10_cpu.jsonl")["ft"].wins > 0
