"""How commands end, and what the scripts have in common: where they compute, and what they refuse."""

import errno

import pytest
import torch
from detect import detections
from torch import nn
from toys import REPOSITORY, the_error

from sau import errors
from sau.data import sources
from sau.data.images import Images
from sau.data.sources import fingerprint, load
from sau.errors import ConfigError, RecordError, os_error, require, run_command


def raising(error: BaseException):
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize(("error", "status", "line"), [
    (ConfigError("a\nb\x1b[2J"), 2, "error: a b\\x1b[2J"),
    (RecordError("x"), 2, "error: x"),
    (errors.LockedError("x"), 1, "error: x"),
    (errors.OutOfMemory("x"), 1, "error: x"),
    (os_error(OSError(errno.EIO, "x"), "x"), 1, "error: x"),
    (os_error(OSError(errno.ENOSPC, "x"), "x"), 1, "error: x"),
    (os_error(OSError(errno.EACCES, "x"), "x"), 2, "error: x"),
    (OSError(errno.ESTALE, "Stale", "a\x1bb"), 1, f"error: [Errno {errno.ESTALE}] Stale: 'a\\x1bb'"),
    (OSError("a\x1bb\nc"), 2, "error: a\\x1bb\\nc"),
    (OSError(errno.ENOENT, "None"), 2, f"error: [Errno {errno.ENOENT}] None"),
    (RuntimeError("CUDA out of memory"), 1, "error: out of memory (CUDA out of memory)"),
    (MemoryError("Unable to allocate 9 GiB"), 1, "error: out of memory (Unable to allocate 9 GiB)"),
])  # fmt: skip
def test_an_expected_error_has_its_status_and_one_line(error, status, line, capsys):
    assert run_command(raising(error)) == status
    err = capsys.readouterr().err
    assert err.startswith(line) and err.count("\n") == 1 and err.strip().isprintable()


def test_other_endings(capsys):
    assert run_command(raising(errors.Finished("it is there"))) == 0 and capsys.readouterr() == ("it is there\n", "")
    assert run_command(raising(KeyboardInterrupt())) == 130
    assert run_command(lambda: None) == 0 and run_command(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="a bug"):
        run_command(raising(RuntimeError("a bug")))


def test_a_reader_that_left_is_no_error(monkeypatch, capfd):
    monkeypatch.setattr("os.dup2", lambda *given: None)
    assert run_command(raising(BrokenPipeError())) == 1 and capfd.readouterr() == ("", "")


def test_a_wrong_parameter_is_named_with_its_value_and_what_is_allowed():
    require("lr", 0.1, True, "above 0")
    with pytest.raises(ConfigError, match=r"lr is -1, allowed is above 0") as refusal:
        require("lr", -1, False, "above 0")
    assert (refusal.value.param, refusal.value.got, refusal.value.allowed) == ("lr", -1, "above 0")


# scripts that compute, with arguments for which they find nothing to compute with
COMPUTE = {
    "audit.py": ("--result_file", "nobody"),
    "bench.py": ("train",),
    "figures.py": ("nobody", "--defense", "sau"),
    "tables.py": ("radii", "nobody", "sau"),
    "verify.py": ("nobody",),
}
PROGRAMS = [path.name for path in sorted((REPOSITORY / "scripts").glob("*.py")) if "__main__" in path.read_text()]


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


@pytest.mark.parametrize(("name", "flags", "word"), [
    ("export.py", ("nobody", "--format", "png", "--out", "out", "--name_there", "mine"), "--name_there"),
    ("tables.py", ("gaps", "nobody"), "nobody"),
    ("tables.py", ("cost", "nobody"), "nobody"),
    ("tables.py", ("cost", "clp"), "rounds"),
    ("tables.py", ("radii", "victim", "nobody"), "nobody"),
    ("figures.py", ("victim", "--defense", "nobody"), "nobody"),
])  # fmt: skip
def test_bad_arguments_are_refused_before_anything_is_made(name, flags, word, script, victim):
    before = sorted(victim.parents[1].rglob("*"))
    more = ("--record_root", str(victim.parent)) if "victim" in flags else ()
    status, out, err = script(name, *flags, *more)
    assert (status, out) == (2, "") and word in the_error(err) and sorted(victim.parents[1].rglob("*")) == before


def test_prepare_describes_data_sets_and_notes_a_subset(script, tmp_path, few, monkeypatch):
    status, out, err = script("prepare.py", "digits", "--dataset_path", str(tmp_path))
    train, test = load("digits")
    assert (status, err) == (0, "") and f"1,437 | 3x16x16 | 10 | 139 to 146 | {fingerprint(train)}" in out
    assert fingerprint(test) in out and "note" not in out
    for name, word in (("cifar11", "cifar11"), ("gtsrb", str(tmp_path))):
        status, out, err = script("prepare.py", name, "--dataset_path", str(tmp_path))
        assert status == 2 and word in the_error(err) and out == ""
    monkeypatch.setitem(sources.SOURCES, "cifar10", few)
    status, out, _ = script("prepare.py", "digits", "cifar10")
    assert status == 0 and "note: subset of cifar10" in out and "| training | 1,437 |" in out


def test_detectors_find_images_that_stand_out_in_their_class():
    """Bright images, a fifth of label 0. The features are the pixels; scaled dark images are of another class."""
    torch.manual_seed(0)
    pixels, labels = torch.randint(0, 60, (450, 3, 8, 8), dtype=torch.uint8), torch.arange(450) // 250
    pixels[:50] += 190
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), Images.clean(pixels, labels, 2)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [0.0]]).expand(2, 192))
        model[1].bias.copy_(torch.tensor([0.0, 40.0]))
    by_chance = {"spectral": 40, "clustering": 70, "scaling": 0}  # of label 1, at most
    for name, (scores, flags) in detections(model, images, 0.2 / 1.5):
        assert flags[:50].all() and scores[:50].min() > scores[50:250].max(), name
        assert flags[250:].sum() <= by_chance.pop(name), name
    assert not by_chance
