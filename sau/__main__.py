"""`python -m sau attack NAME ...` and `python -m sau defense NAME ...`, as the scripts of the repository."""

import sys

from sau.cli import main


def run() -> None:
    """Entry point of the command `sau`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
