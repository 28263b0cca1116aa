"""The attack named like this file; `--help` lists its flags."""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # this folder would hide the package behind its own files

from sau.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main(["attack", Path(__file__).stem, *sys.argv[1:]]))
