"""The defenses. Importing one here puts it on the command line."""

from sau.defense.at import AT
from sau.defense.base import Defense
from sau.defense.ft import FT
from sau.defense.i_bau import IBAU
from sau.defense.nc import NC
from sau.defense.sau import SAU

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in (SAU, FT, AT, IBAU, NC)}

__all__ = ["AT", "DEFENSES", "FT", "IBAU", "NC", "SAU", "Defense"]
