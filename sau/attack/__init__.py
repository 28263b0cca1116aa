"""The attacks. Importing one here puts it on the command line."""

from sau.attack.badnet import BadNet
from sau.attack.base import Attack
from sau.attack.blended import Blended
from sau.attack.inputaware import InputAware
from sau.attack.lf import LF
from sau.attack.prototype import Prototype
from sau.attack.sig import SIG
from sau.attack.ssba import SSBA
from sau.attack.wanet import WaNet

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack for attack in (Prototype, BadNet, Blended, SIG, LF, SSBA, WaNet, InputAware)
}

THEIRS = {"lowfrequency": "lf"}  # names of the benchmark inside, in small letters, that are others than those above

__all__ = ["ATTACKS", "LF", "SIG", "SSBA", "THEIRS", "Attack", "BadNet", "Blended", "InputAware", "Prototype", "WaNet"]
