"""The defenses. Importing one here puts it on the command line."""

from sau.defense.at import AT
from sau.defense.base import Defense
from sau.defense.d3 import D3
from sau.defense.fst import FST
from sau.defense.ft import FT
from sau.defense.ft_sam import FTSAM
from sau.defense.npd import NPD
from sau.defense.sau import SAU

DEFENSES: dict[str, type[Defense]] = {defense.name: defense for defense in (SAU, FT, FTSAM, D3, FST, NPD, AT)}

__all__ = ["AT", "D3", "DEFENSES", "FST", "FT", "FTSAM", "NPD", "SAU", "Defense"]
