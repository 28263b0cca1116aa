"""The pages of the methods and the tools that draw them: figures are those of the kept results."""

import cards
import pytest
from PIL import Image
from synthetic import attack
from toys import REPOSITORY, the_error

from sau.attack import ATTACKS
from sau.defense import DEFENSES
from sau.grid.store import save
from sau.settings import IGNORED

COMPARED = [name for name in DEFENSES if name != "sau-sam"]  # those of docs/results/table1_cpu.jsonl
PAGES = [("attacks", name) for name in ATTACKS if name != "prototype"] + [("defenses", name) for name in DEFENSES]


@pytest.mark.parametrize(("kind", "name"), PAGES)
def test_every_method_has_its_page(kind, name):
    text = (REPOSITORY / "docs" / kind / f"{name}.md").read_text()
    assert "<!-- measured -->" in text and f"python {kind.removesuffix('s')}/{name}.py" in text
    assert f"({name}.md)" in (REPOSITORY / "docs" / kind / "README.md").read_text()


def test_the_first_line_of_a_defense_and_its_page_agree_on_few_images():
    for name, defense in DEFENSES.items():
        text = " ".join(cards.few(name).split())
        assert text and ("are enough." in text) == defense.few_suffice, name


def test_the_figures_of_the_pages_are_those_of_the_kept_results(script):
    status, out, _ = script("tables.py", "cards", "--check")
    assert (status, out) == (0, "")


def test_the_means_before_are_those_of_the_results():
    text = " ".join((REPOSITORY / "docs" / "defenses" / "README.md").read_text().split())
    for name in COMPARED:
        own = [cell for cell in cards.kept(cards.TABLE) if cell.defense == name]
        own = [cell for cell in own if cell.attack != "prototype" and not cell.oracle]
        acc, asr = cards.means(own, "before_acc", "before_asr")
        assert f"ACC {acc}, ASR {asr}" in text, name


def test_the_page_of_other_networks_shows_what_the_command_prints(script):
    results = REPOSITORY / "docs" / "results" / "own_networks"
    _, out, _ = script("tables.py", "own", f"{results}.jsonl")
    page = [line.strip() for line in results.with_suffix(".md").read_text().splitlines()]
    assert out.count("\n| cifar10 | ") > 10 and [line for line in out.splitlines() if line.strip() not in page] == []


def test_flags_without_effect_stand_on_the_page_for_users_of_backdoorbench():
    text = (REPOSITORY / "docs" / "backdoorbench.md").read_text()
    named = {*IGNORED, *(flag for defense in DEFENSES.values() for flag in defense.ignored)}
    assert [flag for flag in named if f"`--{flag}`" not in text] == []


def test_the_gallery_shows_every_attack(tmp_path, finished, script):
    """From a record where there is one, from the settings where that is cheap, else the command that makes it."""
    argv = ["--dataset", "digits", "--record_root", str(finished / "record"), "--out", str(tmp_path / "gallery.png")]
    status, out, _ = script("gallery.py", *argv)
    assert status == 0 and all(f"\n| {name} | " in out for name in ATTACKS if name != "prototype")
    assert "from the record victim" in out
    assert "attack/inputaware.py --dataset digits" in out and "attack/ssba.py --dataset digits" in out
    with Image.open(tmp_path / "gallery.png") as image:
        assert image.width > 800
    status, _, err = script("gallery.py", "--dataset", "nothing", "--out", str(tmp_path / "none"))
    assert status == 2 and "nothing" in the_error(err) and not (tmp_path / "none").exists()


def test_the_curve_over_ratios_is_of_folders_and_of_summaries(tmp_path, script):
    attack(tmp_path / "a", acc=89.0, asr=95.0)  # its configuration says ratio 0.1
    kept = {"badnet_r0_s0": {"acc": 90.0, "asr": 1.0}, "badnet_r0.1_s1": {"acc": 88.0, "asr": 97.0}}
    save(tmp_path / "b.jsonl", {**kept, "badnet_r0.2_s0": {"asr": 97.0}})
    roots = (str(tmp_path / "a"), str(tmp_path / "b.jsonl"))
    status, out, err = script("tables.py", "ratios", *roots, "--out", str(tmp_path / "x.png"))
    assert status == 0 and "| badnet | 90.00 / 1.00 | 88.50 / 96.00 |" in out and "badnet_r0.2_s0" in err
    with Image.open(tmp_path / "x.png") as image:
        assert image.width > 500
    attack(tmp_path / "a", seed=2, dataset="gtsrb")
    assert "several data sets" in the_error(script("tables.py", "ratios", roots[0])[2])
