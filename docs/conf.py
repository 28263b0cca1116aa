"""The documentation site: `make docs` writes it to build/docs."""

import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import reference  # noqa: E402  (the path comes first)

from sau import __version__  # noqa: E402

project, copyright, release = "sau", "the sau authors", __version__
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns = ["build"]
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # notebooks are kept with their outputs
nb_merge_streams = True
mathjax4_config = {"output": {"displayOverflow": "linebreak"}}
copybutton_selector = "div:not(.output) > div.highlight pre"
copybutton_prompt_text = r"machine\d\$ |\$ "
copybutton_prompt_is_regexp = True
highlight_language = "none"  # indented blocks are commands and formulas; code says its language
html_theme = "furo"
html_title = "sau"
html_static_path = ["_static"]
html_css_files = ["site.css"]


def setup(app: Any) -> None:
    """Write the tables of the API into its page, and keep figures like `81.1 / 2.3 (3)` in tables on one line."""
    app.connect("source-read", _prepare)


def _prepare(app: Any, page: str, source: list[str]) -> None:
    source[0] = reference.unbroken(reference.filled(source[0]))
