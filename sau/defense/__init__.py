"""The defenses. Importing one here puts it on the command line."""

from sau.defense.at import AT
from sau.defense.base import Defense
from sau.defense.fp import FP
from sau.defense.ft import FT
from sau.defense.nad import NAD
from sau.defense.rnp import RNP
from sau.defense.sau import SAU

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in (SAU, FT, AT, FP, NAD, RNP)}

__all__ = ["AT", "DEFENSES", "FP", "FT", "NAD", "RNP", "SAU", "Defense"]
