"""Every result below a folder as one HTML page, and the same table as CSV, LaTeX and JSON.

    sau report RECORDS [--out report.html] [--csv F] [--latex F] [--json F]
        [--dataset cifar10] [--dataset_path ./data]

reads RECORDS/<name> (attacks) and RECORDS/<name>/defense/<method>, at any depth. Folders that are unfinished or damaged
are listed with the reason. Of folders that hold summaries alone the names say the rest: <attack>_s<seed>, or
<attack>_r<ratio>_<digest>_s<seed>, as a grid publishes them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from sau.command.arguments import Parser
from sau.data.sources import SOURCES
from sau.errors import ConfigError
from sau.files import write
from sau.report.page import build
from sau.report.tables import as_csv, as_json, as_latex

FORMATS = {"csv": as_csv, "latex": as_latex, "json": as_json}


def main(argv: Sequence[str]) -> int:
    """Write the page and the tables that the flags ask for."""
    parser = Parser(__doc__, prog="sau report")
    parser.add_argument("root", type=Path, help="folder of the result folders, like ./record")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    for name in FORMATS:
        parser.add_argument(f"--{name}", type=Path, help=f"write the table as {name} to this file")
    about = "data set of the folders that do not name theirs (summaries alone)"
    parser.add_argument("--dataset", choices=SOURCES, metavar="NAME", help=about)
    parser.add_argument("--dataset_path", help="folder of the data sets, for clean images [where the runs had them]")
    args = parser.parse_args(argv)
    paths = {name: path for name in FORMATS if (path := getattr(args, name)) is not None}
    if len({os.path.realpath(path) for path in (args.out, *paths.values())}) <= len(paths):
        raise ConfigError(f"two outputs have the same name: {', '.join(map(str, (args.out, *paths.values())))}")
    page, sections = build(args.root, args.dataset, args.dataset_path)
    texts = {args.out: page} | {path: FORMATS[name](sections) for name, path in paths.items()}
    for path, text in texts.items():
        write(path, text.encode(errors="backslashreplace"))
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0
