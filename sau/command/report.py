"""Every result below a folder as one HTML page that needs nothing else, and the same table as CSV, LaTeX and JSON.

    sau report RECORDS [--out report.html] [--csv F] [--latex F] [--json F]
        [--dataset cifar10] [--dataset_path ./data]

reads RECORDS/<name> (attacks) and RECORDS/<name>/defense/<method>. Folders that are unfinished or damaged are shown
with the reason; of folders that hold summaries alone the names say the rest: <attack>_s<seed>, or
<attack>_r<ratio>_<digest>_s<seed>, as a grid publishes them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sau.command.arguments import Parser
from sau.data.sources import SOURCES
from sau.errors import ConfigError
from sau.files import write
from sau.report.exports import as_csv, as_json, as_latex
from sau.report.page import build


def main(argv: Sequence[str]) -> int:
    """Write the page and what else is asked for; exit status 2 for a user's mistake."""
    parser = Parser(__doc__, prog="sau report")
    parser.add_argument("root", type=Path, help="folder of the result folders, like ./record")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    for name in ("csv", "latex", "json"):
        parser.add_argument(f"--{name}", type=Path, help=f"the table as {name.upper().replace('LATEX', 'LaTeX')}")
    about = "data set of the folders that do not say theirs (summaries alone)"
    parser.add_argument("--dataset", choices=SOURCES, metavar="NAME", help=about)
    parser.add_argument("--dataset_path", help="folder of the data sets, for clean pictures [where the runs had them]")
    asked = parser.parse_args(argv)
    others = [path for path in (asked.csv, asked.latex, asked.json) if path is not None]
    if len({os.path.realpath(path) for path in (asked.out, *others)}) <= len(others):
        raise ConfigError(f"several results go to one file of {', '.join(map(str, (asked.out, *others)))}; name others")
    page, sections = build(asked.root, asked.dataset, asked.dataset_path)
    made = {asked.out: page}
    for path, text in ((asked.csv, as_csv), (asked.latex, as_latex), (asked.json, as_json)):
        if path is not None:
            made[path] = text(sections)
    for path, content in made.items():
        write(path, content.encode(errors="backslashreplace"))
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0
