"""The wheel, alone in an empty environment: it works without the repository."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from toys import QUICK, REPOSITORY, environment, summary

import sau

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what the wheel is made of, so that the repository stays as it is."""
    source = tmp_path_factory.mktemp("source")
    for name in ("sau", "configs"):
        subprocess.run(["cp", "-r", str(REPOSITORY / name), str(source)], check=True)
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        (source / name).write_bytes((REPOSITORY / name).read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    done = subprocess.run(argv, cwd=source, capture_output=True, text=True)
    if done.returncode and ("BackendUnavailable" in done.stderr or "No module named 'setuptools'" in done.stderr):
        pytest.skip("setuptools is not installed here, and the package index is not asked for it")
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_the_package_and_its_recipes_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "sau").rglob("*.py")}
    recipes = {f"sau/{file.relative_to(REPOSITORY)}" for file in (REPOSITORY / "configs").rglob("*.yaml")}
    files = "own.html page.html page.css page.js published.json table.tex".split()
    data = {f"sau/report/{name}" for name in files}
    packed = {name for name in names if ".dist-info/" not in name}
    assert packed == modules | recipes | data and len(recipes) > 5


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of a new environment that has the wheel, and everything else but `sau` from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    argv = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(argv, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # A path in a .pth file is added as it is: .pth files of that folder, which lead to the repository, are not read.
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run(python: Path, *argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in environment().items() if name != "VIRTUAL_ENV"}
    return subprocess.run([str(python), *argv], cwd=cwd, env=env, capture_output=True, text=True, timeout=280)


def test_attack_and_defense_without_the_repository(python, tmp_path):
    flags = ("--dataset", "digits", "--epochs", "1", *QUICK, "--save_folder_name", "a")
    done = run(python, "-m", "sau", "attack", "badnet", *flags, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "width 16" in done.stdout
    done = run(python, "-m", "sau", "defense", "sau", "--result_file", "a", "--epochs", "1", *QUICK, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "143 clean images" in done.stdout  # 10 %, from the YAML of the defense
    found = summary(tmp_path / "record/a/defense/sau")
    assert found["before"]["acc"] >= 0 and found["selection"] == "defender" and os.listdir(tmp_path) == ["record"]


def test_the_command_of_the_wheel(python, tmp_path):
    done = run(python, "-c", "import sau; print(sau.__file__)", cwd=tmp_path)
    place = Path(done.stdout.strip())
    assert place.is_relative_to(python.parents[1]) and not place.is_relative_to(REPOSITORY), done.stderr
    assert (place.parent / "configs" / "defense" / "sau.yaml").is_file()
    sau_command = str(python.parent / "sau")
    done = run(python, sau_command, "defense", "ft", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--result_file" in done.stdout
    assert "  badnet " in run(python, sau_command, "list", cwd=tmp_path).stdout
    assert run(python, sau_command, "--version", cwd=tmp_path).stdout == f"sau {sau.__version__}\n"
    code = "from importlib.metadata import version; print(version('shared-adversarial-unlearning'))"
    assert run(python, "-c", code, cwd=tmp_path).stdout == f"{sau.__version__}\n"
