"""Execute the notebooks and keep their outputs, as the site shows them: `make notebooks`."""

import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent / "notebooks"


def executed(path: Path, folder: Path) -> Any:
    """A notebook with the outputs of a run in `folder`; no times, and one text where a cell printed several."""
    os.environ["PYTHONWARNINGS"] = "ignore"  # tqdm warns where ipywidgets is missing
    notebook, where = nbformat.read(path, 4), {"metadata": {"path": str(folder)}}
    how: dict[str, Any] = {"kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(notebook, timeout=500, resources=where, **how).execute()
    notebook.metadata.language_info = {"name": "python", "pygments_lexer": "ipython3"}  # knows lines of `!`
    return notebook


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(executed(path, FOLDER), path)
