"""The command `sau`: which part of it is meant, and how it ends."""

import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from sau import __version__
from sau.errors import ConfigError, run_command

USAGE = """\
usage: sau COMMAND ...

commands, each with --help:
  attack NAME     poison a data set, train a network on it, measure it: record/FOLDER
  defense NAME    purify that network, or one of your own, and measure it again
  list            the attacks, defenses, data sets and recipes
  report          every result below a folder as one HTML page
  figures         what a record holds, drawn
  grid            a whole comparison from one file
  verify          measure the figures of a record again
  inspect         what is in a network file, without running it
  --version       the version

examples:
  sau attack badnet --dataset digits --save_folder_name demo
  sau defense sau --result_file demo
  sau report record --out report.html
  sau defense sau --model_file downloaded.pth --clean_dir images/"""

TOOLS = {
    "list": "sau.command.catalogue",
    "report": "sau.command.report",
    "figures": "sau.command.figures",
    "grid": "sau.command.grid",
    "verify": "sau.command.verify",
    "inspect": "sau.command.inspect_checkpoint",
}


def main(argv: Sequence[str]) -> int:
    """Run the command that `argv`, without the program's name, asks for; returns the exit status.

    0 is success, also where the run was finished before; 2 a mistake of the user; 1 another expected error (disk,
    memory, a folder in use); 130 a run that was stopped by Ctrl-C or SIGTERM and can be resumed.
    """
    return run_command(lambda: _main(list(argv)))


def _main(argv: list[str]) -> int:
    if argv in (["--help"], ["-h"]) or not argv:
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv == ["--version"]:
        print(f"sau {__version__}")
        return 0
    if argv[0] in TOOLS:
        return _tool(argv[0], argv[1:])
    from sau.command.attack_and_defend import METHODS, run  # imports PyTorch

    kind, *rest = argv
    if kind in METHODS and rest and rest[0] in METHODS[kind]:
        return run(kind, rest[0], rest[1:])
    if kind in METHODS and rest in ([], ["--help"], ["-h"]):
        listed = f"usage: sau {kind} NAME [flags]; NAME is one of: {', '.join(METHODS[kind])}"
        print(listed, file=sys.stdout if rest else sys.stderr)
        return 0 if rest else 2
    asked = " ".join(argv[:2])
    if kind in METHODS:
        near = [f"{kind} {name}" for name in get_close_matches(rest[0], METHODS[kind], 1)]
    else:
        near = [" ".join([name, *rest[:1]]) for name in get_close_matches(kind, [*TOOLS, *METHODS], 1)]
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"{asked!r} is no command{meant}; see sau --help and sau list")


def _tool(name: str, argv: list[str]) -> int:
    try:
        tool = import_module(TOOLS[name])
    except ModuleNotFoundError as missing:
        raise ConfigError(f"sau {name} needs {missing.name}; pip install -e '.[report]'") from None
    status: int = tool.main(argv)
    return status
