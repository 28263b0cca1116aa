"""The defenses. Those in `DEFENSES` are on the command line."""

from sau.defense.anp import ANP as ANP
from sau.defense.at import AT as AT
from sau.defense.base import Defense as Defense
from sau.defense.bnp import BNP as BNP
from sau.defense.clp import CLP as CLP
from sau.defense.d3 import D3 as D3
from sau.defense.ep import EP as EP
from sau.defense.fp import FP as FP
from sau.defense.fst import FST as FST
from sau.defense.ft_sam import FT as FT
from sau.defense.ft_sam import FTSAM as FTSAM
from sau.defense.i_bau import IBAU as IBAU
from sau.defense.nad import NAD as NAD
from sau.defense.nc import NC as NC
from sau.defense.npd import NPD as NPD
from sau.defense.rnp import RNP as RNP
from sau.defense.sau import SAU as SAU
from sau.defense.sau_sam import SAUSAM as SAUSAM

DEFENSES: dict[str, type[Defense]] = {
    defense.name: defense
    for defense in (
        SAU, SAUSAM, FT, AT, FTSAM, D3, FST, NAD, IBAU, NC, NPD, FP, ANP, RNP, CLP, BNP, EP,
    )
}  # fmt: skip
