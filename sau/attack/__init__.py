"""The attacks. Importing one here puts it on the command line."""

from sau.attack.badnet import BadNet
from sau.attack.base import Attack
from sau.attack.blended import Blended
from sau.attack.prototype import Prototype

ATTACKS: dict[str, type[Attack]] = {attack.name: attack for attack in (Prototype, BadNet, Blended)}

__all__ = ["ATTACKS", "Attack", "BadNet", "Blended", "Prototype"]
