"""The pages of the methods: there is one for each, and its figures are those of the kept summaries."""

import subprocess
import sys

import pytest
from PIL import Image
from toys import REPOSITORY, environment

from sau.attack import ATTACKS
from sau.defense import DEFENSES

PAGES = [("attacks", name) for name in ATTACKS if name != "prototype"] + [("defenses", name) for name in DEFENSES]


@pytest.mark.parametrize(("kind", "name"), PAGES)
def test_every_method_has_its_page(kind, name):
    text = (REPOSITORY / "docs" / kind / f"{name}.md").read_text()
    assert "<!-- measured -->" in text and f"{kind.removesuffix('s')}/{name}.py" in text
    assert f"({name}.md)" in (REPOSITORY / "docs" / kind / "README.md").read_text()


def test_the_figures_of_the_pages_are_those_of_the_summaries():
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "scripts" / "cards.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


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


def test_the_gallery_refuses_what_it_cannot_draw(tmp_path):
    script = [
        sys.executable,
        str(REPOSITORY / "scripts" / "gallery.py"),
        "--dataset",
        "nothing",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=100)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown data set") and not list(tmp_path.iterdir())
