"""The attacks, defenses, data sets and recipes, one line each.

sau list
"""

import re
import sys
from collections.abc import Sequence

from sau.attack import ATTACKS
from sau.command.arguments import Parser
from sau.data.sources import SOURCES
from sau.defense import DEFENSES
from sau.settings.run import RECIPES


def main(argv: Sequence[str]) -> int:
    """Print the list."""
    Parser(__doc__, prog="sau list").parse_args(argv)
    for kind, lines in catalogue().items():
        print(f"{kind}:", *(f"  {name:11} {about}" for name, about in lines.items()), sep="\n")
    return 0


def catalogue() -> dict[str, dict[str, str]]:
    """What there is, by kind and name."""
    return {
        "attacks": {name: _sentence(sys.modules[method.__module__].__doc__) for name, method in ATTACKS.items()},
        "defenses": {name: _sentence(method.__doc__) for name, method in DEFENSES.items()},
        "data sets": {name: source.about for name, source in SOURCES.items()},
        "recipes": RECIPES,
    }


def _sentence(doc: str | None) -> str:
    """The first sentence of a docstring, without its citation."""
    text = re.sub(r" \(.*?\)", "", " ".join((doc or "").split("\n\n")[0].split()))
    return re.split(r"(?<=\w)\. ", text)[0].rstrip(".:")
