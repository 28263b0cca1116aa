"""The command `sau`, also as `python -m sau`; its usage and version do not wait for PyTorch."""

import sys

from sau import __version__

USAGE = """\
usage: sau COMMAND ...

commands, each with --help:
  attack NAME     poison a data set, train a network on it, measure it: record/FOLDER
  defense NAME    purify that network, or one of your own, and measure it again
  list            the attacks, defenses, data sets and recipes
  report          every result below a folder as one HTML page
  figures         draw the images, curves and features of a record
  grid            a whole comparison from one file
  verify          measure the figures of a record again
  inspect         what is in a network file, without running it
  --version       the version

examples:
  sau attack badnet --dataset digits --save_folder_name demo
  sau defense sau --result_file demo
  sau report record --out report.html
  sau defense sau --model_file downloaded.pth --clean_dir images/"""


def run() -> None:
    """Entry point of the command `sau`."""
    argv = sys.argv[1:]
    if argv in ([], ["--help"], ["-h"]):
        print(USAGE, file=sys.stdout if argv else sys.stderr)
        sys.exit(0 if argv else 2)
    if argv == ["--version"]:
        print(f"sau {__version__}")
        sys.exit(0)
    from sau.cli import main

    sys.exit(main(argv))


if __name__ == "__main__":
    run()
