"""What the scripts have in common: where they compute, and what they refuse."""

import signal
import subprocess
import sys

import pytest
import torch
from toys import REPOSITORY, the_error

from sau.data import sources
from sau.data.sources import fingerprint, load

SCRIPTS = REPOSITORY / "scripts"

# scripts that compute, with arguments for which they find nothing to compute with
COMPUTE = {
    "audit.py": ("--result_file", "nobody"),
    "bench.py": ("train",),
    "figures.py": ("nobody", "--defense", "sau"),
    "tables.py": ("radii", "nobody", "sau"),
    "verify.py": ("nobody",),
}
PROGRAMS = [path.name for path in sorted(SCRIPTS.glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_unknown_flag_is_refused_in_one_line(name, script):
    status, out, err = script(name, "--nonsense", "1")
    assert (status, out) == (2, "") and "--help" in the_error(err)


@pytest.mark.parametrize("name", COMPUTE)
def test_a_device_that_is_not_there_is_refused(name, script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "tpu"):
        status, _, err = script(name, *COMPUTE[name], "--device", device, "--threads", "1")
        assert status == 2 and f"device is '{device}'" in the_error(err)
    if "nobody" in COMPUTE[name]:
        status, _, err = script(name, *COMPUTE[name], "--device", "auto", "--threads", "1")
        assert status == 2 and "nobody" in the_error(err)


@pytest.mark.parametrize(
    ("name", "flags", "word"),
    [
        ("export.py", ("nobody", "--format", "png", "--out", "out", "--name_there", "mine"), "--name_there"),
        ("tables.py", ("gaps", "nobody"), "nobody"),
        ("tables.py", ("radii", "victim", "nobody"), "nobody"),
        ("figures.py", ("victim", "--defense", "nobody"), "nobody"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(name, flags, word, script, victim, monkeypatch):
    before = sorted(victim.parents[1].rglob("*"))
    more = ("--record_root", str(victim.parent)) if "victim" in flags else ()
    status, out, err = script(name, *flags, *more)
    assert (status, out) == (2, "") and word in the_error(err) and sorted(victim.parents[1].rglob("*")) == before


def test_prepare_describes_data_sets_and_notes_a_subset(script, tmp_path, few, monkeypatch):
    status, out, err = script("prepare.py", "digits", "--dataset_path", str(tmp_path))
    train, test = load("digits")
    assert (status, err) == (0, "") and f"1,437 | 3x32x32 | 10 | 139 to 146 | {fingerprint(train)}" in out
    assert fingerprint(test) in out and "note" not in out
    for name, word in (("cifar11", "cifar11"), ("gtsrb", str(tmp_path))):
        status, out, err = script("prepare.py", name, "--dataset_path", str(tmp_path))
        assert status == 2 and word in the_error(err) and out == ""
    monkeypatch.setitem(sources.SOURCES, "cifar10", few)
    status, out, _ = script("prepare.py", "digits", "cifar10")
    assert status == 0 and "note: subset of cifar10" in out and "| training | 1,437 |" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_with_status_130_and_one_line(number):
    code = "import os, signal, sys, time; from sau.errors import run_command\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
    code += f"sys.exit(run_command(lambda: os.kill(os.getpid(), {int(number)}) or time.sleep(60) or 0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert done.returncode == 130 and len(done.stderr.split("\n")) == 3
