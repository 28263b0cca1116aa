"""`sau figures` from a clone; `--help` lists its flags."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.cli import main

if __name__ == "__main__":
    sys.exit(main(["figures", *sys.argv[1:]]))
