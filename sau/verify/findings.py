"""What was looked at in a result folder, and how each thing stands."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from sau.errors import SauError

VERIFIED, BROKEN, PARTLY = 0, 1, 3  # exit status of `scripts/verify.py`; 2 is a mistake in the command
State = Literal["held", "broken", "not checked"]
FORGED = (KeyError, TypeError, AttributeError, ValueError, IndexError, ArithmeticError)  # what wrong types lead to


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what it is, how it stands, and why."""

    what: str
    state: State
    text: str


class Findings(list[Finding]):
    """What was looked at, in order."""

    @property
    def status(self) -> int:
        """`BROKEN` if anything is, else `PARTLY` if anything was not checked, else `VERIFIED`."""
        states = {finding.state for finding in self}
        return BROKEN if "broken" in states else PARTLY if "not checked" in states else VERIFIED

    @contextmanager
    def whole(self, what: str) -> Iterator[None]:
        """For what notes its own findings: an error from it means that the record is broken there."""
        try:
            yield
        except SauError as error:
            self.append(Finding(what, "broken", str(error)))
        except FORGED as error:
            why = ascii(str(error))[1:-1][:200]
            self.append(Finding(what, "broken", f"its files lack something or have another type: {why}"))

    def look(self, what: str, check: Callable[[], str]) -> bool:
        """Note what `check` says; an error from it means that the record is broken there."""
        with self.whole(what):
            self.append(Finding(what, "held", check()))
        return self[-1].state == "held"

    def skip(self, what: str, why: str) -> None:
        """Note that something was not checked."""
        self.append(Finding(what, "not checked", why))
