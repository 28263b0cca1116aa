"""An attack as it was, from what its record keeps."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from sau.attack import ATTACKS, LF, Attack, BadNet, Blended, WaNet
from sau.attack.making import Picture
from sau.attack.wanet import Field
from sau.errors import RecordError


def recall(settings: Mapping[str, Any], trigger: Mapping[str, Tensor] | None) -> Attack:
    """The attack with these settings, others being ignored, and with its trigger where that is a few numbers.

    Triggers that are networks (SSBA, Input-Aware) are left out, so that the attack cannot stamp; the pictures that they
    made lie in the record. Raises RecordError for an attack that this version does not have.
    """
    kind = ATTACKS.get(str(settings.get("attack")))
    if kind is None:
        raise RecordError(f"the attack is {settings.get('attack')!r}, this version has {', '.join(ATTACKS)}")
    own = {field.name for field in fields(kind) if field.init} & settings.keys()
    values: dict[str, Any] = {
        name: tuple(settings[name]) if isinstance(settings[name], list) else settings[name] for name in own
    }
    attack = kind(**values)
    if trigger is not None and isinstance(attack, WaNet):
        return attack.with_trigger(Field(trigger["points"]))
    if trigger is not None and isinstance(attack, BadNet | Blended | LF):
        return attack.with_trigger(Picture(trigger["picture"]))
    return attack
