"""The notebooks run from top to bottom and are kept without outputs."""

import json
from pathlib import Path

import pytest
from toys import REPOSITORY, environment

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def executed(path: Path, folder: Path, monkeypatch) -> str:
    """Runs a notebook in a foreign folder; returns what its cells printed."""
    nbformat = pytest.importorskip("nbformat", reason="pip install -e '.[test]'")
    client = pytest.importorskip("nbclient", reason="pip install -e '.[test]'").NotebookClient
    for name, value in environment(PYTHONPATH=str(REPOSITORY)).items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, 4)
    client(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") + str(output.get("data", "")) for output in outputs)


def asr(printed: str, row: str) -> float:
    """The second figure of a row of `sau.evaluate.table`, which is [ACC, interval], [ASR, interval], ..."""
    line = next(line for line in printed.splitlines() if line.startswith(row))
    return float(line.split("]")[1].split("[")[0])


def test_there_are_notebooks_without_outputs():
    assert [path.name for path in NOTEBOOKS] == ["1_purify.ipynb", "2_theory.ipynb", "3_your_own.ipynb"]
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)


def test_the_first_notebook_purifies(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[0], tmp_path, monkeypatch)
    assert asr(printed, "before") > 90 and asr(printed, "after") < 20


@pytest.mark.slow
def test_the_second_notebook_measures_and_draws(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[1], tmp_path, monkeypatch)
    assert asr(printed, "none") > 90 and asr(printed, "SAU") < 20
    assert printed.count("image/png") == 2 and "r_share" in printed


@pytest.mark.slow
def test_the_third_notebook_compares(tmp_path, monkeypatch):
    printed = executed(NOTEBOOKS[2], tmp_path, monkeypatch)
    assert asr(printed, "none") > 90 and asr(printed, "SAU") < 20
    assert {"LastLayer", "FT", "CLP"} <= set(printed.replace("'", " ").split())
