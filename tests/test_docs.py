"""The documentation site is built without a warning: every link leads somewhere, every docstring can be read."""

import importlib.util
import os
import shutil
import subprocess
import sys

import pytest
from toys import REPOSITORY, environment

PARTS = ("sphinx", "myst_parser", "furo")


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    missing = [name for name in PARTS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed; pip install -e '.[docs]'")
    shutil.copytree(REPOSITORY / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("api"))
    os.symlink(REPOSITORY / "sau", tmp_path / "sau")
    argv = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "site"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    for page, text in (
        ("index", "Shared Adversarial Unlearning"),
        ("theory", "R_share(h)"),
        ("defenses/sau", "90.41"),
        ("api/sau.defense.sau", "weight_shared"),
    ):
        assert text in (tmp_path / "site" / f"{page}.html").read_text(), page
