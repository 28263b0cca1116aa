"""What a script is asked: flags by their whole names, and one line for a mistake, as the commands have it."""

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Shows `description`, a script's docstring, as it stands; a mistake is a line and exit status 2."""

    def __init__(self, description: str | None = None, **given: Any) -> None:
        plain = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=plain, allow_abbrev=False, **given)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; {self.prog} --help says what is asked\n")
