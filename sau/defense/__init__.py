"""The defenses. Importing one here puts it on the command line."""

from sau.defense.anp import ANP
from sau.defense.at import AT
from sau.defense.base import Defense
from sau.defense.bnp import BNP
from sau.defense.clp import CLP
from sau.defense.d3 import D3
from sau.defense.ep import EP
from sau.defense.fp import FP
from sau.defense.fst import FST
from sau.defense.ft import FT
from sau.defense.ft_sam import FTSAM
from sau.defense.i_bau import IBAU
from sau.defense.nad import NAD
from sau.defense.nc import NC
from sau.defense.npd import NPD
from sau.defense.rnp import RNP
from sau.defense.sau import SAU

DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense for defense in (SAU, FT, AT, FTSAM, D3, FST, NAD, IBAU, NC, NPD, FP, ANP, RNP, CLP, BNP, EP)
}

__all__ = [
    "ANP",
    "AT",
    "BNP",
    "CLP",
    "D3",
    "DEFENSES",
    "Defense",
    "EP",
    "FP",
    "FST",
    "FT",
    "FTSAM",
    "IBAU",
    "NAD",
    "NC",
    "NPD",
    "RNP",
    "SAU",
]
