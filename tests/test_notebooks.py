"""The notebooks run from top to bottom, and are kept with the outputs of such a run."""

import importlib
import json
from pathlib import Path

import pytest
from toys import REPOSITORY, environment

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
    assert [path.name for path in NOTEBOOKS] == ["1_purify.ipynb", "2_theory.ipynb", "3_your_own.ipynb"]
    for path, images in zip(NOTEBOOKS, (2, 3, 2), strict=True):
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
def test_the_second_notebook_measures_and_draws(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[1], tmp_path, monkeypatch)
    assert asr(printed, "none") > 90 and asr(printed, "SAU") < 20
    assert printed.count("image/png") == 3 and "r_share" in printed


@pytest.mark.slow
def test_the_third_notebook_compares(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[2], tmp_path, monkeypatch)
    assert asr(printed, "none") > 90 and asr(printed, "SAU") < 20
    assert {"LastLayer", "FT", "CLP"} <= set(printed.split())
