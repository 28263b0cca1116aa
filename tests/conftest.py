"""Fixtures: the scripts in a subprocess, the command line in this process, a finished record, real data."""

import atexit
import importlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jaxtyping
import pytest
import torch
from filelock import FileLock
from toys import REPOSITORY, VICTIM, command, environment, the_error

from sau.cli import main
from sau.data import sources

_CACHE = tempfile.TemporaryDirectory(prefix="sau-cache-")  # of triggers and pictures that tests make
atexit.register(_CACHE.cleanup)
os.environ["SAU_CACHE"] = _CACHE.name  # also where the user has one, in which older code may have made them
os.environ["MPLBACKEND"] = "Agg"  # figures open no window

Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads for every test, so that sums have the same rounding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def short_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search at the end of `purify` takes longer than what most tests purify."""
    monkeypatch.setattr("sau.pgd.STEPS", 0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run the library: without the checks of shapes and types that pytest adds, which would come first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def closed_figures() -> Iterator[None]:
    yield
    importlib.import_module("matplotlib.pyplot").close("all")


@pytest.fixture
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own, that does not exist yet, beside its `tmp_path`."""
    place = tmp_path_factory.mktemp("own") / "cache"
    monkeypatch.setenv("SAU_CACHE", str(place))
    return place


@pytest.fixture(scope="session")
def cli() -> Cli:
    """`cli("attack", "badnet", *flags, cwd=folder)` runs a script of the repository from a foreign folder."""

    def run(kind: str, name: str, *flags: str, cwd: Path, **extra: str) -> subprocess.CompletedProcess[str]:
        assert not Path(cwd).resolve().is_relative_to(REPOSITORY)
        argv = command(kind, name, *flags)
        return subprocess.run(argv, cwd=cwd, env=environment(**extra), capture_output=True, text=True, timeout=280)

    return run


@pytest.fixture(scope="session")
def few() -> sources.Source:
    """The digits as a data set of 240 images to train with and 60 to test with, for what depends on no figure."""
    train, test = (images[torch.arange(n)] for images, n in zip(sources.load("digits"), (240, 60), strict=True))
    return replace(sources.SOURCES["digits"], read=lambda root, size: (train, test))


@pytest.fixture(name="few_digits")
def with_few_digits(few: sources.Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process `digits` are few."""
    monkeypatch.setitem(sources.SOURCES, "digits", few)


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """`here("attack", "badnet", *flags)` runs the command line in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(argv))
        out, err = capsys.readouterr()
        return status, out, err

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def refused(here: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """`refused("attack", "badnet", *flags)` asserts one line of error and status 2, and returns the line."""

    def run(*argv: str) -> str:
        status, _, err = here(*argv)
        assert status == 2
        return the_error(err)

    return run


@pytest.fixture
def script(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`script("grid.py", *flags)` runs a script of the repository in this process: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(REPOSITORY / "scripts"), *sys.path])  # as Python has it for a script

    def run(name: str, *flags: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [name, *flags])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(REPOSITORY / "scripts" / name), run_name="__main__")
        assert isinstance(left.value.code, int), left.value.code
        return left.value.code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, cli: Cli) -> Path:
    """A folder with `record/victim`, made by attack/badnet.py on digits; do not change it, copy it. All workers of
    pytest-xdist share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "attack.err").exists():
            folder.mkdir(exist_ok=True)
            done = cli("attack", "badnet", *VICTIM, "--save_folder_name", "victim", cwd=folder)
            assert done.returncode == 0, done.stderr
            (folder / "attack.out").write_text(done.stdout)
            (folder / "attack.err").write_text(done.stderr)
    return folder


@pytest.fixture
def victim(finished: Path, tmp_path: Path) -> Path:
    """A copy of `record/victim` below `tmp_path`, free to be changed and defended."""
    return Path(shutil.copytree(finished / "record" / "victim", tmp_path / "record" / "victim"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets that SAU_DATA names."""
    if "SAU_DATA" not in os.environ:
        pytest.skip("SAU_DATA is not set; let it name a folder that holds cifar-10-batches-py")
    return Path(os.environ["SAU_DATA"]).resolve()
