"""What the scripts have in common: where they compute, what they refuse, and that it is written once."""

import re
import shlex
import signal
import subprocess
import sys

import pytest
import torch
from toys import REPOSITORY, environment, the_error, tiny_net

from sau.data import sources
from sau.data.sources import fingerprint, load
from sau.errors import RecordError

SCRIPTS = REPOSITORY / "scripts"

# who computes: flags with which it finds nothing to compute with
COMPUTE = {
    "audit.py": ("--result_file", "nobody"),
    "bench.py": ("risks", "nobody", "sau"),
    "clean_indices.py": ("nobody", "--out", "new.json"),
    "figures.py": ("nobody", "--defense", "sau"),
    "radii.py": ("nobody", "sau"),
    "verify.py": ("nobody",),
}


TOOLS = ("figures.py", "grid.py", "inspect_checkpoint.py", "report.py", "verify.py")  # commands of `sau`, too
ASKING = [path.name for path in sorted(SCRIPTS.glob("*.py")) if path.name in TOOLS or "Parser(" in path.read_text()]


@pytest.mark.parametrize("name", ASKING)
def test_a_flag_that_a_script_has_not_is_said_in_one_line(name, script):
    """Its usage would push the line out of sight."""
    status, out, err = script(name, "--nonsense", "1")
    prog = f"sau {name.removesuffix('.py').removesuffix('_checkpoint')}" if name in TOOLS else name
    assert (status, out) == (2, "") and f"; see {prog} --help" in the_error(err)


def test_every_script_asks_alike():
    assert len(ASKING) >= 15
    assert not [
        path.name for path in SCRIPTS.glob("*.py") if re.search(r"ArgumentParser\((?!add_help)", path.read_text())
    ]


@pytest.mark.parametrize("name", COMPUTE)
def test_cuda_that_is_not_there_is_refused(name, script, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, err = script(name, *COMPUTE[name], "--device", "cuda", "--threads", "1")
    assert status == 2 and "device is 'cuda', but torch finds no CUDA device here" in the_error(err)
    for device, words in (("auto", "nobody"), ("tpu", "device is 'tpu'")):
        status, _, err = script(name, *COMPUTE[name], "--device", device, "--threads", "1")
        assert status == 2 and words in the_error(err)


class Seen(RecordError):
    """Ends a script where it would compute."""


@pytest.mark.parametrize(
    ("name", "flags", "what"),
    [
        ("radii.py", ("record/victim",), "sau.risk.gauge"),
        ("clean_indices.py", ("record/clean", "--out", "new.json"), "sau.command.own_clues.reverse"),
        ("figures.py", ("victim", "--defense", "copy"), "sau.command.figures.examples"),
    ],
)
def test_networks_compute_where_they_are_told_to(name, flags, what, victim, here, script, monkeypatch):
    """`meta` stands for a card: nothing can be computed there, but tensors say that they lie there."""

    def stop(*given: object, **more: object) -> None:
        networks = [thing for thing in given if isinstance(thing, torch.nn.Module)]
        where.update(parameter.device.type for network in networks for parameter in network.parameters())
        raise Seen("seen")

    where: set[str] = set()
    if name == "clean_indices.py":
        clean = ("--dataset", "digits", "--width", "4", "--epochs", "1", "--threads", "1", "--amp", "false")
        assert here("attack", "prototype", "--save_folder_name", "clean", *clean, "--device", "cpu")[0] == 0
    for home in ("arguments", "figures"):  # scripts import it anew
        monkeypatch.setattr(f"sau.command.{home}.use_device", lambda asked: torch.device("meta"))
    monkeypatch.setattr("sau.record.attack_result.load_weights", lambda model, path: None)
    monkeypatch.setattr("sau.command.figures.features", lambda *given: None)
    monkeypatch.setattr("sau.command.figures.save", lambda figure, path: [])
    monkeypatch.setattr(what, stop)
    status, _, err = script(name, *flags)
    assert status == 2 and the_error(err) == "error: seen" and where == {"meta"}


def test_a_network_that_computes_elsewhere_answers_here():
    """With gradients for the pictures, which a search for adversarial examples climbs."""
    from sau.command import figures

    net, x = tiny_net(), torch.rand(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    placed = figures.Placed(net.double(), torch.device("cpu"))
    (gradient,) = torch.autograd.grad(placed(x).sum(), x)
    assert torch.equal(placed(x), net(x)) and gradient.abs().sum() > 0 and placed(x).device == x.device


def test_a_flag_of_one_format_is_refused_with_the_others(script, tmp_path):
    for kind in ("png", "npz"):
        flags = ("nobody", "--format", kind, "--out", str(tmp_path / "out"), "--name_there", "mine")
        status, _, err = script("export.py", *flags)
        assert status == 2 and f"--name_there goes with --format backdoorbench, got is {kind}" in the_error(err)


@pytest.mark.parametrize(
    ("pattern", "homes"),
    [
        (r"^ *import matplotlib|^from matplotlib", ["drawing.py"]),
        (
            r"choose_device\(|set_threads\(",
            ["arguments.py", "attack_and_defend.py", "own_network.py", "request.py", "watch.py"],
        ),
        (r"except SauError as error:\n *print", []),
    ],
)
def test_what_scripts_share_is_written_once(pattern, homes):
    files = [*sorted(SCRIPTS.rglob("*.py")), *sorted((REPOSITORY / "sau" / "command").glob("*.py"))]
    assert [file.name for file in files if re.search(pattern, file.read_text(), re.M)] == homes


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("figures.py", ("nobody", "--eps", "0.1"), "--eps is of the figures that --defense asks for"),
        ("figures.py", ("nobody", "--map", "pca"), "--map is of the figures that --defense asks for"),
        ("figures.py", ("nobody", "--defense", "sau", "--eps", "nan"), "eps of the risks' search is nan"),
        ("report.py", ("nobody", "--out", "below/../r.html", "--csv", "r.html"), "several results go to one file"),
        ("gpu_checklist.py", ("--smoke", "--device", "cpu", "--minutes", "nan"), "--minutes is nan"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_done(name, flags, words, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = script(name, *flags)
    assert status == 2 and words in the_error(err) and out == "" and not [*tmp_path.iterdir()]


def test_whoever_closes_stdout_is_served_all_the_same():
    code = "import sys; from sau.errors import run_command; sys.exit(run_command(lambda: print(1)))"
    closed = f"exec {shlex.quote(sys.executable)} -c {shlex.quote(code)} >&-"
    done = subprocess.run(["sh", "-c", closed], env=environment(), capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "flags"), [("radii.py", ("victim", "nobody")), ("figures.py", ("victim", "--defense", "nobody"))]
)
def test_a_defense_that_is_not_there_is_said_before_anything_is_made(name, flags, victim, script):
    status, out, err = script(name, *flags, "--record_root", str(victim.parent), "--threads", "1")
    assert (status, out) == (2, "") and "nobody" in the_error(err) and not (victim / "figures").exists()


def test_a_data_set_is_described_before_anything_is_trained_on_it(script, tmp_path):
    status, out, err = script("prepare.py", "digits", "--dataset_path", str(tmp_path))
    train, test = load("digits")
    assert (status, err) == (0, "") and f"1,437 | 3x32x32 | 10 | 139 to 146 | {fingerprint(train)}" in out
    assert fingerprint(test) in out and "note" not in out
    for name, words in (("cifar11", "unknown data set 'cifar11'"), ("gtsrb", str(tmp_path))):
        status, out, err = script("prepare.py", name, "--dataset_path", str(tmp_path))
        assert status == 2 and words in the_error(err) and out == ""


def test_a_subset_of_a_data_set_is_noted(script, tmp_path, few, monkeypatch):
    monkeypatch.setitem(sources.SOURCES, "cifar10", few)
    status, out, _ = script("prepare.py", "digits", "cifar10")
    assert status == 0 and "note: subset of cifar10" in out and "| training | 1,437 |" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_script_with_one_line(number):
    code = "import os, signal, sys, time; from sau.errors import run_command\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background ignores it
    code += f"sys.exit(run_command(lambda: os.kill(os.getpid(), {int(number)}) or time.sleep(60) or 0))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (130, "\nstopped; repeat the command to go on\n")
