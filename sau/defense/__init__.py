"""The defenses. Importing one here puts it on the command line."""

from sau.defense.anp import ANP
from sau.defense.at import AT
from sau.defense.base import Defense
from sau.defense.ft import FT
from sau.defense.sau import SAU

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in (SAU, FT, AT, ANP)}

__all__ = ["ANP", "AT", "DEFENSES", "FT", "SAU", "Defense"]
