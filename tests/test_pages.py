"""The pages of the methods: there is one for each, and its figures are those of the kept summaries."""

import argparse
import json
import runpy
import subprocess
import sys

import gallery
import pytest
from PIL import Image
from toys import REPOSITORY, environment, the_error, toy_images

from sau.attack import ATTACKS
from sau.defense import DEFENSES
from sau.report.read import Run
from sau.settings.config import IGNORED

PAGES = [("attacks", name) for name in ATTACKS if name != "prototype"] + [("defenses", name) for name in DEFENSES]


@pytest.mark.parametrize(("kind", "name"), PAGES)
def test_every_method_has_its_page(kind, name):
    text = (REPOSITORY / "docs" / kind / f"{name}.md").read_text()
    assert "<!-- measured -->" in text and f"python {kind.removesuffix('s')}/{name}.py" in text
    assert f"({name}.md)" in (REPOSITORY / "docs" / kind / "README.md").read_text()


def test_the_figures_of_the_pages_are_those_of_the_summaries():
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "cards.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_the_cards_have_a_help(script):
    status, out, err = script("cards.py", "--help")
    assert (status, err) == (0, "") and "--check" in out


def test_the_page_of_nc_says_which_classes_were_flagged():
    """Over seeds, of each attack; summaries of before say nothing, and where none does there is no line."""
    cards = runpy.run_path(str(REPOSITORY / "scripts" / "cards.py"), run_name="cards")

    def run(flagged: list[int] | None) -> Run:
        summary = {"findings": {"flagged": flagged}} if flagged is not None else {}
        return Run(REPOSITORY, "x", "nc", 0, None, "unverified", summary=summary)

    found = {"badnet": [run([0]), run([0, 3])], "prototype": [run([]), run([5])], "sig": [run(None)]}
    assert "`prototype` is a false alarm:\nbadnet 0 / 0, 3; prototype none / 5.\n" in cards["flagged"](found)
    assert cards["flagged"]({"sig": [run(None)]}) == ""


def test_a_row_says_who_chose_and_what_is_published():
    """FP was published as the test sets chose, CLP as nobody did; RNP was not published."""
    cards = runpy.run_path(str(REPOSITORY / "scripts" / "cards.py"), run_name="cards")

    def row(defense: str, selection: str, attack: str = "badnet") -> list[str]:
        figures = {name: 50.0 for name in ("before_acc", "before_asr", "acc", "asr", "racc", "der", "seconds")}
        summary = {"selection": selection}
        run = Run(REPOSITORY, attack, defense, 0, None, "unverified", figures=figures, summary=summary)
        return cards["defense_row"](attack, [run]).strip("| ").split(" | ")

    assert row("fp", "oracle")[1:3] == ["**oracle**", "1"] and row("fp", "defender")[1] == "defender"
    assert row("fp", "oracle")[-1] == "91.31 / 57.13 / 68.95" and row("fp", "defender")[-1].endswith("68.95 †")
    assert row("clp", "defender")[-1] == "90.07 / 77.56 / 58.11" and row("clp", "oracle")[-1] == "-"
    assert (
        row("clp", "defender", "prototype")[-1] == "-" and len(row("rnp", "defender")) == len(row("fp", "oracle")) - 1
    )


def test_flags_without_effect_stand_on_the_page_for_users_of_backdoorbench():
    text = (REPOSITORY / "docs" / "backdoorbench.md").read_text()
    named = {*IGNORED, *(flag for defense in DEFENSES.values() for flag in defense.ignored)}
    assert [flag for flag in named if f"`--{flag}`" not in text] == []
    for method in (*ATTACKS.values(), *DEFENSES.values()):
        assert all(method.ignored.values())


def test_the_gallery_shows_every_attack(tmp_path, finished):
    """From a record where there is one, from the settings where that is cheap, else the command that makes it."""
    argv = ["--dataset", "digits", "--record_root", str(finished / "record"), "--out", str(tmp_path / "gallery")]
    script = [sys.executable, str(REPOSITORY / "scripts" / "gallery.py"), *argv]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=200)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "gallery" / "digits.html").read_text()
    assert all(f"<th>{attack.__name__}</th>" in page for name, attack in ATTACKS.items() if name != "prototype")
    assert "from the record victim" in page
    assert "attack/inputaware.py --dataset digits" in page and "attack/ssba.py --dataset digits" in page
    with Image.open(tmp_path / "gallery" / "digits.png") as picture:
        assert picture.width > 800


def test_a_trigger_that_does_not_fit_spoils_no_other_row_of_the_gallery():
    small, asked = toy_images(24, size=8), argparse.Namespace(record_root="nowhere", columns=2, radius=0.2)
    patch, blended = (gallery.line(ATTACKS[name], small, small, asked) for name in ("badnet", "blended"))
    assert patch.found is None and patch.note.startswith("no trigger here: the pictures are 8 x 8")
    assert blended.found is not None
    assert gallery.draw([patch, blended], 2) and "no trigger here" in gallery.page([patch, blended], "digits", 0.2)


def test_the_gallery_refuses_what_it_cannot_draw(tmp_path):
    script = [
        sys.executable,
        str(REPOSITORY / "scripts" / "gallery.py"),
        "--dataset",
        "nothing",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=240)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown data set") and not list(tmp_path.iterdir())


def test_the_curve_over_ratios_is_drawn_from_summaries(tmp_path):
    for name, acc, asr in (
        ("badnet_r0_s0", 90.0, 1.0),
        ("badnet_r0.1_s0", 89.0, 95.0),
        ("b/badnet_r0.1_s1", 88.0, 97.0),
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "summary.json").write_text(json.dumps({"acc": acc, "asr": asr}))
    script = [sys.executable, str(REPOSITORY / "scripts" / "ratios.py")]
    done = subprocess.run(
        [*script, str(tmp_path), str(tmp_path / "b"), "--out", str(tmp_path / "x.png")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| badnet | 90.00 / 1.00 | 88.50 / 96.00 |" in done.stdout
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 500
    none = subprocess.run([*script, str(tmp_path / "none")], capture_output=True, text=True)
    assert none.returncode != 0 and none.stderr.startswith("error: ") and len(none.stderr.splitlines()) == 1


def test_two_results_of_a_seed_are_no_seeds_of_a_curve(script, tmp_path):
    """Names say attack, ratio and seed; what else two grids differ in stands in their digests alone."""
    for mark in ("a" * 10, "b" * 10):
        (tmp_path / f"badnet_r0.1_{mark}_s0").mkdir()
        (tmp_path / f"badnet_r0.1_{mark}_s0" / "summary.json").write_text('{"acc": 90.0, "asr": 1.0}')
    status, _, err = script("ratios.py", str(tmp_path), "--out", str(tmp_path / "x"))
    assert status == 2 and "one attack, ratio and seed" in the_error(err) and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "acc is missing"), ('{"acc": 90.0, "asr": null}', "asr is None"), ('{"acc": "x", "asr": 1}', "acc is x"),
        ("[]", "holds a list"), ("{", "damaged"), ('{"acc": NaN, "asr": 1}', "acc is nan"),
        ('{"acc": true, "asr": 1}', "acc is True"), ('{"acc": 90, "asr": 1e300}', "asr is 1e+300"),
        ('{"acc": 101, "asr": 1}', "acc is 101"),
    ],
)  # fmt: skip
def test_a_summary_without_scores_is_one_line(script, tmp_path, text, words):
    place = tmp_path / "badnet_r0.1_0123456789_s0"
    place.mkdir()
    (place / "summary.json").write_text(text)
    status, _, err = script("ratios.py", str(tmp_path))
    assert status == 2 and str(place) in the_error(err) and words in err
    assert not (tmp_path / "ratios.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attacks", "defenses"])
def test_the_benchmarks_of_the_methods_run(part, tmp_path):
    small = {"attacks": ("--steps", "1", "--batch_size", "16"), "defenses": ("--pictures", "32", "--only", "ft,clp")}
    flags = ("--width", "4", "--repeats", "1", "--threads", "1", "--json", str(tmp_path / "out.json"), *small[part])
    script = [sys.executable, str(REPOSITORY / "scripts" / "bench.py"), part, *flags]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) > 3 and all(row["ours"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_a_card_says_what_a_whole_run_costs(tmp_path):
    cards = runpy.run_path(str(REPOSITORY / "scripts" / "cards.py"), run_name="cards")
    row = {"name": "whole run: nc", "ours": 1234.5, "reference": 10.0, "passes_per_image": 1600.25}
    setting = {"pictures": 128, "recipe": "cpu", "threads": 1}
    (tmp_path / "results").mkdir()
    line = json.dumps({"name": cards["COSTS"], "setting": setting, "rows": [row]})
    (tmp_path / "results" / "bench.jsonl").write_text(f'{{"name": "other"}}\n{line}\n')
    cost = cards["cost"]
    cost.__globals__["DOCS"] = tmp_path
    assert "takes 1,234.5 s, 123.45 times as long as FT, and 1,600.2 forward-equivalents a picture" in cost("nc")
    assert cost("fp") == ""
