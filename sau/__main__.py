"""`python -m sau`, the same as the command `sau`."""

import sys

from sau.cli import main


def run() -> None:
    """Entry point of the command `sau`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
