"""The attacks. Those in `ATTACKS` are on the command line."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from sau.attack.adaptive import AdapBlend as AdapBlend
from sau.attack.adaptive import AdapPatch as AdapPatch
from sau.attack.badnet import BadNet as BadNet
from sau.attack.base import Attack as Attack
from sau.attack.blended import Blended as Blended
from sau.attack.bpp import BPP as BPP
from sau.attack.dfba import DFBA as DFBA
from sau.attack.inputaware import InputAware as InputAware
from sau.attack.lc import LC as LC
from sau.attack.lf import LF as LF
from sau.attack.prototype import Prototype as Prototype
from sau.attack.sig import SIG as SIG
from sau.attack.ssba import SSBA as SSBA
from sau.attack.triggers import TensorTrigger
from sau.attack.wanet import WaNet as WaNet
from sau.errors import RecordError

ATTACKS: dict[str, type[Attack]] = {
    attack.name: attack
    for attack in (Prototype, BadNet, Blended, SIG, LF, SSBA, WaNet, InputAware, BPP, AdapBlend, AdapPatch, LC, DFBA)
}
THEIRS = {"lowfrequency": "lf"}  # names of the benchmark inside, in small letters, that are others than those above


def attack_from_config(settings: Mapping[str, Any], trigger: Mapping[str, Tensor] | None) -> Attack:
    """The attack of a record, from its `settings` and its `trigger`'s tensors; RecordError for an unknown attack.

    Triggers that are networks (SSBA, Input-Aware, LC) are left out, so that the attack cannot stamp; the images that
    they made are in the record.
    """
    kind = ATTACKS.get(str(settings.get("attack")))
    if kind is None:
        raise RecordError(f"the attack is {settings.get('attack')!r}, this version has {', '.join(ATTACKS)}")
    own = {field.name for field in fields(kind) if field.init} & settings.keys()
    values: dict[str, Any] = {key: tuple(v) if isinstance(v := settings[key], list) else v for key in own}
    tensors = list((trigger or {}).values())
    return kind(**values).with_trigger(TensorTrigger(tensors[0])) if len(tensors) == 1 else kind(**values)
