"""What README, CONTRIBUTING and the notebooks show is what comes out."""

import importlib
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from toys import REPOSITORY, environment

from sau.compat import weights
from sau.compat.weights import guess
from sau.data.sources import SOURCES, load
from sau.evaluate import Proportion, Score, conclusion, der, score
from sau.loop import RunContext
from sau.models import MODELS, build
from sau.optim import Training

SHOWN = (REPOSITORY / "README.md").read_text().partition("    $ bash scripts/demo.sh\n")[2].partition("\n\n")[0]
LINES = [line[4:] for line in SHOWN.splitlines()]
DEMO = (REPOSITORY / "scripts" / "demo.sh").read_text()


def commands(*more: str) -> list[list[str]]:
    """The two runs of the demo, as arguments of `python -m sau`."""
    same = re.search(r"^same=\((.*)\)$", DEMO, re.M)
    assert same is not None
    found = []
    for kind, name, flags in re.findall(r"^python (attack|defense)/(\w+)\.py (.*)$", DEMO, re.M):
        line = flags.replace('"${same[@]}"', same[1]).replace('"$root"', "./record")
        found.append([kind, name, *shlex.split(line), *more])
    return found


WORDS = ("The backdoor ", "It cost ", "Triggered images ", "The trigger still ", "The attack did ")


def shape(line: str) -> str:
    """A line without its numbers and widths."""
    return re.sub(r" +", " ", re.sub(r"-?\d[\d.,e+-]*", "#", line)).strip()


def test_the_table_of_the_readme_is_that_of_the_demo(here, few_digits):
    printed: list[str] = []
    for argv in commands("--epochs", "2", "--eval_every", "2", "--lr_scheduler", "OneCycleLR"):
        status, out, err = here(*argv)
        assert (status, err) == (0, "")
        printed += out.splitlines()
    table = [shape(line) for line in LINES if line != "..." and not line.startswith(WORDS)]
    shapes = [shape(line) for line in printed]
    first = len(shapes) - 1 - shapes[::-1].index(table[0])
    assert len(commands()) == 2 and len(table) == 3 and shapes[first : first + 3] == table


def scores(name: str) -> Score:
    """A row of the README's table; its percentages as shares of ten thousand."""
    (row,) = (line for line in LINES if line.startswith(f"{name} "))
    shown = re.findall(r"([\d.]+) \[", row)
    return Score(*(Proportion(round(100 * float(value)), 10_000) for value in shown))


def test_the_conclusion_of_the_readme_follows_from_its_table():
    before, after = scores("before"), scores("after")
    said = [line for line in LINES if line.startswith(WORDS)]
    assert said == [line for line in conclusion(before, after).splitlines() if line.startswith(WORDS)]
    assert said[0].startswith("The backdoor is gone: ")
    (row,) = (line for line in LINES if line.startswith("after "))
    assert float(row.split()[-1]) == pytest.approx(der(before, after), abs=0.011)


NOTEBOOKS = sorted((REPOSITORY / "docs" / "notebooks").glob("*.ipynb"))


def printed(outputs: list) -> str:
    """What cells printed, and the kinds of their images."""
    texts = ["".join(output.get("text", "")) + " ".join(output.get("data", {})) for output in outputs]
    return "\n".join(texts)


def outputs(notebook: dict) -> list:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def executed(path: Path, folder: Path, monkeypatch) -> str:
    """Runs a notebook in a foreign folder; returns what its cells printed."""
    for name in ("nbformat", "nbclient"):
        pytest.importorskip(name, reason="pip install -e '.[test]'")
    for name, value in environment(PYTHONPATH=str(REPOSITORY), PYTHONWARNINGS="").items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(REPOSITORY / "docs")
    return printed(outputs(importlib.import_module("run_notebooks").executed(path, folder)))


def asr(printed: str, row: str) -> float:
    """The second figure of a row of `sau.evaluate.table`, which is [ACC, interval], [ASR, interval], ..."""
    line = next(line for line in printed.splitlines() if line.startswith(row + " "))
    return float(line.split("]")[1].split("[")[0])


def test_the_notebooks_are_kept_with_their_outputs_and_images():
    assert [path.stem for path in NOTEBOOKS] == ["1_purify", "2_theory", "3_your_own", "4_a_folder"]
    for path, images in zip(NOTEBOOKS, (2, 3, 2, 0), strict=True):
        text, notebook = path.read_text(), json.loads(path.read_text())
        counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
        kept = outputs(notebook)
        assert counts == [*range(1, len(counts) + 1)] and printed(kept).count("image/png") == images
        assert not any(one["output_type"] == "error" or one.get("name") == "stderr" for one in kept)
        assert len(text) < 500_000 and str(Path.home()) not in printed(kept)
    kept = printed(outputs(json.loads(NOTEBOOKS[0].read_text())))
    assert asr(kept, "before") > 90 and asr(kept, "after") < 20


def test_the_first_notebook_purifies(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[0], tmp_path, monkeypatch)
    assert asr(printed, "before") > 90 and asr(printed, "after") < 20


@pytest.mark.slow
@pytest.mark.parametrize(("number", "shown"), [(1, {"r_share"}), (2, {"LastLayer", "FT", "CLP"})])
def test_the_other_notebooks_run(number, shown, tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[number], tmp_path, monkeypatch)
    assert asr(printed, "none") > 90 and asr(printed, "SAU") < 20 and all(text in printed for text in shown)
    assert printed.count("image/png") == (3, 2)[number - 1]


@pytest.mark.slow
def test_the_last_notebook_purifies_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("timm")
    printed = executed(NOTEBOOKS[3], tmp_path, monkeypatch)
    before, after = (float(rate) for rate in re.findall(r"^\S+ ACC .* ASR ([\d.]+) ", printed, re.M))
    assert before > 90 and after < 10


def test_the_examples_for_contributors_work(tmp_path: Path, monkeypatch):
    """An attack, a defense, a data set and a network, as CONTRIBUTING.md spells them, through one run of each."""
    modules = {}
    for known, name in ((SOURCES, "stripes"), (MODELS, "plain")):
        monkeypatch.setitem(known, name, None)  # so that what the examples register there goes at the end
    for name, code in re.findall(r"```python (\w+)\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.S):
        (tmp_path / f"example_{name}.py").write_text(code)
        spec = importlib.util.spec_from_file_location(f"example_{name}", tmp_path / f"example_{name}.py")
        assert spec is not None and spec.loader is not None
        modules[name] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"example_{name}", modules[name])
        spec.loader.exec_module(modules[name])
    (train, test), origin = load("stripes"), SOURCES["stripes"]
    plain = build("plain", 7, width=5, mean=origin.mean, std=origin.std)
    torch.save(plain.net.state_dict(), tmp_path / "plain.pt")
    found = guess(weights.read(tmp_path / "plain.pt"))
    assert found is not None and (found.name, found.width, found.classes) == ("plain", 5, 7)
    assert plain(train.pixels[:3] / 255).shape == (3, 7)
    attack, quiet = modules["attack"].Frame(pratio=0.2), RunContext(say=lambda text: None)
    torch.manual_seed(67280421310721)  # four epochs are not enough from every start
    net = build("preactresnet18", 2, width=4, mean=origin.mean, std=origin.std)
    recipe = Training(epochs=4, batch_size=32, lr=0.05, lr_scheduler="constant")
    attack.fit(net, attack.poison_train(train, 0), recipe, session=quiet)
    triggered = attack.poison_test(test)
    assert score(net, test, triggered).acc.percent > 90
    fixed = modules["defense"].LastLayer(epochs=1).purify(net, test, session=quiet)
    assert score(fixed, test, triggered).acc.percent > 90
