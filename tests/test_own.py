"""A network of one's own: weights from a file, clean images from a folder, no trigger."""

import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from toys import QUICK, coloured, command, environment, refuses, stop_after, summary, the_error, tiny_net, toy_images

from sau.compat import weights
from sau.data.images import Images
from sau.errors import ConfigError, DataError, RecordError
from sau.models import PreActResNet18
from sau.record.attack_result import load_weights
from sau.run import OwnRun
from sau.subject import _check_classes, by_name, split

CLASSES, SIDE, NAME = 3, 16, "preactresnet18"
FAST = ("--epochs", "1", "--risk_steps", "2", "--risk_samples", "8", *QUICK)


@pytest.fixture
def pictures(tmp_path) -> Path:
    return coloured(tmp_path / "clean", 6)


@pytest.fixture
def net() -> PreActResNet18:
    torch.manual_seed(0)
    return PreActResNet18(CLASSES, 2).eval()


def flags(file: Path, pictures: Path, *more: str) -> tuple[str, ...]:
    given = ("--model_file", str(file), "--clean_dir", str(pictures), "--input_size", str(SIDE))
    return ("defense", "ft", *given, *FAST, *more)


def network(own: OwnRun, classes: int) -> tuple[torch.nn.Module, str]:
    return weights.network(own, classes, weights.read(Path(str(own.model_file))))


def layouts(net, folder):
    """The same weights as people hand them round; averaged ones count batches in floats."""
    state = net.state_dict()
    torch.save(state, folder / "plain.pt")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": 1.0 * state[k] for k in state}}, folder / "lightning.ckpt")
    safetensors.torch.save_file(state, folder / "safe.safetensors")
    return [folder / name for name in ("plain.pt", "lightning.ckpt", "safe.safetensors")]


def test_any_layout_is_purified_and_comes_back_in_its_format(net, pictures, tmp_path, here):
    found = []
    for file in layouts(net, tmp_path):
        before = file.read_bytes()
        status, out, err = here(*flags(file, pictures))
        assert (status, err) == (0, ""), out
        assert "R_share" in out and "smallest patch that leads images to one class" in out
        folder = tmp_path / "record" / f"{file.stem}_ft"
        found.append(safetensors.torch.load_file(folder / "model.safetensors"))
        assert (folder / "model.pt").is_file() == (file.suffix != ".safetensors")
        if file.suffix != ".safetensors":
            again = torch.load(folder / "model.pt", weights_only=True)
            assert all(torch.equal(again[name], tensor) for name, tensor in found[-1].items())
        assert file.read_bytes() == before
        load_weights(net, folder)
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
    # The report claims what clean images can say.
    found = summary(tmp_path / "record" / "plain_ft")
    for when in ("before", "after"):
        said, risk = found[when], found["risk"][when]
        assert said["asr"] is None and said["acc_count"][1] == 3  # one image of each class measures
        assert risk["r_adv"] >= risk["r_share"] and "r_bd" not in risk
    assert found["risk"]["before"]["r_adv"] == found["risk"]["before"]["r_share"] and found["der"] is None
    assert {"before", "after", "typical", "doubts", "sizes"} == {*found["findings"]["verdict"]}


def test_the_page_of_a_purified_network_says_what_was_measured(net, pictures, tmp_path, here, refused):
    (pictures / "red").rename(pictures / "<i>red")
    for name in ("mine", "known"):
        assert here(*flags(layouts(net, tmp_path)[2], pictures, "--save_folder_name", name))[0] == 0
    assert here("report", "record/mine", "--beside", "record/known", "--out", "page.html")[0] == 0
    page, found = (tmp_path / "page.html").read_text(), summary(tmp_path / "record" / "mine")
    parts = ("before", "after", "statistics_anew", "before")
    cells = [[float(cell) for cell in re.findall(r"<td>([\d.]+) %", row)] for row in page.split("<tr>")]
    assert [found[part]["acc"] for part in parts] in cells and "record/known, before" in page
    rates = [(found["risk"].get(part) or found[part]["risk"])["r_share_sau"] for part in parts]
    assert rates in cells
    sizes = {f"{size:.1f}" for size in found["findings"]["verdict"]["sizes"].values() if size}
    assert sizes <= {*re.findall(r"[\d.]+", page)}
    assert "&lt;i&gt;red" in page and "<i>" not in page and "src=" not in page and "<script" not in page
    assert "leave them out for a network of your own" in refused("report", "record/mine", "--csv", "table.csv")
    assert "--beside is for the page of" in refused("report", "record", "--beside", "record/known")


COLOURS = """
import torch

def made():
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 3), *{last})
"""


@pytest.mark.parametrize(("last", "mean", "said"), [
    ([], None, None),
    ([], "0,0,0", "the network classifies only 5 of 15 clean images correctly; check mean and std"),
    (["torch.nn.Softmax(1)"], None, "answers with probabilities, allowed are logits"),
])  # fmt: skip
def test_a_network_that_is_used_otherwise_than_trained_is_told(last, mean, said, pictures, tmp_path, here, monkeypatch):
    """It is right about the three colours in [0, 1] alone; said before anything is measured, and kept."""
    monkeypatch.setattr("sau.loop.SILENCE", -1)
    (tmp_path / f"colours{len(last)}.py").write_text(COLOURS.format(last=f"[{', '.join(last)}]"))
    torch.save({"2.weight": 9 * torch.eye(3).flip(1), "2.bias": torch.zeros(3)}, tmp_path / "net.pt")
    more = () if mean is None else ("--mean", mean, "--std", "0.01,1,1")
    flagged = flags(tmp_path / "net.pt", pictures, "--arch", f"colours{len(last)}:made", "--trust_code", "true", *more)
    status, out, err = here(*flagged)
    if last:
        assert status == 2 and said in err and not (tmp_path / "record").exists()
        return
    assert status == 0, err
    assert "note: the search for patches may take " in out and "note: the search for the risks may take " in out
    if said is None:
        assert "classifies 15 of 15 clean images correctly (100.0 %)" in out and "check mean and std" not in out
    else:
        assert out.index(said) < out.index("R_share")
        assert said in (tmp_path / "record" / "net_ft" / "log.txt").read_text()


def test_code_is_imported_only_where_it_is_trusted(net, pictures, tmp_path, here, refused, monkeypatch):
    (tmp_path / "somebody.py").write_text(
        "from pathlib import Path\nfrom sau.models import PreActResNet18\n"
        f"def made():\n    Path({str(tmp_path / 'ran')!r}).touch()\n    return PreActResNet18({CLASSES}, 2)\n"
        "def broken():\n    raise RuntimeError('no')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    file = layouts(net, tmp_path)[0]
    assert "--trust_code" in refused(*flags(file, pictures, "--arch", "somebody:made"))
    assert not (tmp_path / "ran").exists() and "somebody" not in sys.modules
    assert "no" in refused(*flags(file, pictures, "--arch", "somebody:broken", "--trust_code", "true"))
    assert here(*flags(file, pictures, "--arch", "somebody:made", "--trust_code", "true"))[0] == 0
    assert (tmp_path / "ran").exists()


def test_a_name_that_does_not_fit_says_which_weight(net, tmp_path):
    own = OwnRun(model_file=str(layouts(net, tmp_path)[0]), clean_dir="x")
    assert {network(replace(own, arch=arch), CLASSES)[1] for arch in ("auto", NAME)} == {NAME}
    for arch, classes, said in (
        (NAME, CLASSES + 1, "linear.weight has"),
        ("resnet18", CLASSES, f"its tensors fit {NAME}, which --arch auto finds"),
        ("vgg11", CLASSES, "features.0.weight has nothing"),
    ):
        with refuses(RecordError, said):
            network(replace(own, arch=arch), classes)
    torch.save(tiny_net().state_dict(), tmp_path / "tiny.pt")
    with pytest.raises(ConfigError, match="--arch"):
        network(replace(own, model_file=str(tmp_path / "tiny.pt")), CLASSES)


@pytest.mark.parametrize("arch", ["auto", "preactresnet18", "somebody:made"])
def test_of_a_file_with_two_networks_one_is_named(arch, net, pictures, tmp_path, monkeypatch):
    code = f"from sau.models import PreActResNet18\ndef made():\n    return PreActResNet18({CLASSES}, 2)\n"
    (tmp_path / "somebody.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    averaged = {name: value / 2 if value.is_floating_point() else value for name, value in net.state_dict().items()}
    torch.save({"model": net.state_dict(), "ema": averaged}, tmp_path / "two.pt")
    own = OwnRun(model_file=str(tmp_path / "two.pt"), clean_dir=str(pictures), arch=arch, trust_code=True)
    with refuses(RecordError, "two.pt holds the network under ['ema.', 'model.']; name one"):
        network(own, CLASSES)
    for prefix, wanted in (("model.", net.state_dict()), ("ema.", averaged), ("em", averaged)):
        found, _ = network(replace(own, model_prefix=prefix), CLASSES)
        assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    with refuses(RecordError, "no tensor under 'state_dict.'; sau inspect lists them"):
        network(replace(own, model_prefix="state_dict."), CLASSES)


def test_class_names_in_the_file_number_the_folders(net, pictures, tmp_path, here, monkeypatch):
    """Also where there are folders for some of the classes only; the log shows which, and what the file says else."""
    assert by_name(["blue", "red"], ["Red", "green", "BLUE"]) == ["red", "green", "blue"]
    assert by_name(["blue", "red"], ["red", "green"]) is None and by_name(["blue"], None) is None
    assert by_name(["a"], ["a", "A"]) is None and by_name(["A", "a"], ["a", "b"]) is None  # which of the two?
    torch.save({"net": net.state_dict(), "classes": ["x", "y", "z"]}, tmp_path / "says.pt")
    status, out, _ = here(*flags(tmp_path / "says.pt", pictures))
    assert status == 0 and "classes: 0 = blue, 1 = green, 2 = red (folders in order)" in out.splitlines()
    assert "says.pt names its classes 0 = x, 1 = y, 2 = z" in out
    torch.save({"net": net.state_dict(), "classes": ["green", "y", "red"]}, tmp_path / "half.pt")
    assert "'blue' names no class" in the_error(here(*flags(tmp_path / "half.pt", pictures))[2])
    shutil.rmtree(pictures / "green")
    torch.save({"net": net.state_dict(), "classes": ["Red", "green", "blue"]}, tmp_path / "named.pt")
    seen = []
    monkeypatch.setattr("sau.subject.split", lambda images, share: seen.append(images) or split(images, share))
    for arch in ("auto", "preactresnet18"):
        status, out, err = here(*flags(tmp_path / "named.pt", pictures, "--arch", arch, "--save_folder_name", arch))
        assert status == 0, err
        assert "classes: 0 = red, 1 = green, 2 = blue (names in the file)" in out.splitlines()
        assert seen[-1].labels.tolist() == [2] * 6 + [0] * 6 and seen[-1].num_classes == CLASSES


@pytest.mark.parametrize("error", [RuntimeError, AssertionError])
def test_pictures_of_a_size_that_the_network_does_not_take_are_one_line(error):

    class Choosy(torch.nn.Module):
        def forward(self, x):
            raise error("Output size is too small")

    with refuses(ConfigError, "3x16x16", "--input_size"):
        _check_classes(Choosy(), toy_images(4), Path("clean"))


def test_what_is_refused(net, pictures, tmp_path, refused):
    file = layouts(net, tmp_path)[0]
    assert "--model_file" in refused("defense", "ft", *QUICK)
    assert "--result_file" in refused(*flags(file, pictures, "--result_file", "x"))
    assert "--reversal_passes" in refused(*flags(file, pictures, "--reversal_passes", "0"))
    assert "select is oracle" in refused("defense", "anp", *flags(file, pictures, "--select", "oracle")[2:])
    assert "missing.pt" in refused(*flags(tmp_path / "missing.pt", pictures))
    assert "attacker" in refused("defense", "ep", *flags(file, pictures)[2 : -len(FAST)], *QUICK)
    (pictures / "green").rename(tmp_path / "green")
    assert "2 class folders" in refused(*flags(file, pictures))
    (tmp_path / "green").rename(pictures / "green")
    torch.save({**net.state_dict(), "linear.bias": torch.full((CLASSES,), torch.inf)}, tmp_path / "broken.pt")
    assert "NaN or infinity" in refused(*flags(tmp_path / "broken.pt", pictures))
    for i in range(1, 6):
        shutil.copy(pictures / "red" / "0.png", pictures / "red" / f"{i}.png")
    assert "test images" in refused(*flags(file, pictures)) and not (tmp_path / "record").exists()


def test_the_split_measures_with_some_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 3)
    images = Images.clean(torch.zeros(13, 3, 2, 2, dtype=torch.uint8), labels, 2)
    given, test = split(images, 0.2)
    assert given.labels.tolist() == [0] * 8 + [1] * 2 and test.index.tolist() == [8, 9, 12]
    given, test = split(images, 0.95)
    assert given.index.tolist() == [0, 10] and len(test) == 11  # no class is measured with all its images
    with pytest.raises(DataError, match="class 1 has 1"):
        split(images[torch.arange(11)], 0.2)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(net, pictures, tmp_path):
    argv = command(*flags(layouts(net, tmp_path)[0], pictures), "--batch_size", "4")
    argv[argv.index("--epochs") + 1] = "4"
    status, _ = stop_after("round 2/4", signal.SIGKILL, [*argv, "--save_folder_name", "killed"], tmp_path)
    assert status == -signal.SIGKILL and not (tmp_path / "record" / "killed" / "manifest.json").exists()
    found = []
    for name in ("killed", "whole"):
        run = [*argv, "--save_folder_name", name]
        done = subprocess.run(run, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=280)
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert ("round 1/4" in done.stdout) == (name == "whole")  # the first one went on
        found.append(safetensors.torch.load_file(tmp_path / "record" / name / "model.safetensors"))
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
