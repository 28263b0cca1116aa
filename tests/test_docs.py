"""The documentation site is built without a warning; its page of the API has every parameter."""

import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys

import pytest
from toys import REPOSITORY, environment

import sau
from sau.attack import ATTACKS
from sau.config import options
from sau.defense import DEFENSES
from sau.grid.plan import Block, Grid
from sau.optim import Training

DOCS = REPOSITORY / "docs"
PARTS = ("sphinx", "myst_nb", "furo", "sphinx_copybutton")


def test_the_api_has_every_parameter(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    reference = importlib.import_module("reference")
    paths = reference.MARK.findall((DOCS / "api.md").read_text())
    shown = [(path, thing) for path in paths for _, thing in reference.named(path)]
    methods = {*DEFENSES.values(), *ATTACKS.values()} - {ATTACKS["prototype"]}  # which has none
    assert methods | {Training, Grid, Block} <= {thing for _, thing in shown if reference.is_settings(thing)}
    assert {getattr(sau, name) for name in sau._MODULES} <= {thing for _, thing in shown}
    for path, thing in shown:
        found = {*re.findall(r"^\| `(\w+)` \|", reference.described(thing), re.MULTILINE)}
        known = {*inspect.signature(thing).parameters} - {"self"}
        if reference.is_settings(thing):
            assert found == {*options(thing)} and all(each.help for each in options(thing).values()), path
        else:
            assert found in (known, set()), path


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    missing = [name for name in PARTS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[docs]'")
    shutil.copytree(DOCS, tmp_path / "docs")
    os.symlink(REPOSITORY / "sau", tmp_path / "sau")
    argv = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "site"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    for page, text in (
        ("index", "the sau authors"),
        ("theory", "R_{share}(h)"),
        ("defenses/sau", "90.41"),
        ("api", "weight_shared"),
        ("notebooks/1_purify", "cell_output"),
    ):
        assert text in (tmp_path / "site" / f"{page}.html").read_text(), page
