"""The documentation site: `make docs` writes it to build/docs."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sau import __version__  # noqa: E402  (the path comes first)

project = "sau"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.apidoc"]
exclude_patterns = ["build"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
apidoc_modules = [
    {
        "path": "../sau",
        "destination": "api",
        "separate_modules": True,
        "module_first": True,
        "automodule_options": {"members", "show-inheritance"},
    }
]
autodoc_default_options = {"ignore-module-all": True}  # what a package hands on is described where it is written
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
default_role = "code"
highlight_language = "none"  # indented blocks are commands and formulas; code says its language
html_theme = "furo"
html_title = "sau"


def setup(app: Any) -> None:
    """Read docstrings as what they are, plain text, before napoleon reads their sections."""
    app.connect("autodoc-process-docstring", _plain, priority=400)


def _plain(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _as_written(lines)


def _as_written(lines: list[str]) -> Iterator[str]:
    """Formulas, which stand indented behind a blank line, are shown letter by letter; | and * mean themselves."""
    inside, last, blank = -1, 0, False  # indentation of a formula, and of the text before it; a blank line came
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if not line.strip():
            blank = True
            yield line
            continue
        if inside >= 0 and indent < inside:
            inside = -1
            if not blank:
                yield ""
        if inside < 0 and blank and indent > last:
            inside = indent
            yield from (" " * last + "::", "")
        if inside < 0:
            last = indent
            line = re.sub(r"([|*])", r"\\\1", line)
        blank = False
        yield line
