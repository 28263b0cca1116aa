"""`python -m sau attack NAME ...` and `python -m sau defense NAME ...`, as the scripts of the repository."""

import sys

from sau.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
