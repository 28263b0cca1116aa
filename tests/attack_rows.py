"""Every attack, with what it promises on toys."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from toys import quiet, tiny_net, toy_images

from sau.attack import BPP, DFBA, LC, LF, SIG, SSBA, Attack, BadNet, Blended, InputAware, Prototype, WaNet
from sau.attack.adaptive import AdapBlend, AdapPatch
from sau.attack.triggers import TensorTrigger
from sau.data.images import Images
from sau.loop import RunContext
from sau.models.triggers import Encoder, FixedCodeEncoder
from sau.optim import Training


@dataclass(frozen=True)
class Row:
    """An attack and what it promises."""

    attack: Attack
    toy: dict[str, Any] | None = field(default_factory=dict)  # how a tiny network learns it on a toy; None: not at all
    asr: float = 80.0  # percent that it reaches there
    cost: float = 5.0  # ACC in percent that it may cost there
    side: int = 32  # of the toy's images
    least: int = 12  # side of the smallest images it is tried on


def ready(
    attack: Attack, images: Images | None = None, lines: list[str] | None = None, seed: int = 0, **recipe: Any
) -> Any:
    """With its trigger, which most have from the start; `lines` are told what is said."""
    session = quiet() if lines is None else RunContext(say=lines.append)
    return attack.fit_trigger(images or toy_images(20), tiny_net(), Training(**recipe), seed=seed, session=session)


ROWS = {
    "prototype": Row(Prototype()),
    "badnet": Row(BadNet()),
    "blended": Row(Blended()),
    "sig": Row(SIG(sig_f=4.0), {"sig_f": 15.0, "sig_delta": 120.0, "pratio": 0.25}, cost=20),  # its whole class
    "lf": Row(LF()),
    "ssba": Row(
        SSBA().with_trigger(FixedCodeEncoder(Encoder(1, 3, True), torch.ones(1)).eval().requires_grad_(False)),
        {"ssba_epochs": 40, "ssba_batch_size": 8, "ssba_lr": 1e-3, "ssba_residual": True},
        side=16,
        least=16,
    ),
    "wanet": Row(ready(WaNet()), {"s": 8.0, "pratio": 0.2, "cross_ratio": 0.5}),
    "inputaware": Row(ready(InputAware(clean_train_epochs=1)), None, least=16),
    "bpp": Row(BPP(), {"squeeze_num": 2}),
    "adap_blend": Row(AdapBlend(), {"pratio": 0.1, "cover_rate": 0.1}),
    "adap_patch": Row(AdapPatch(), {"pratio": 0.1, "cover_rate": 0.1}),
    "lc": Row(LC(lc_steps=5).with_trigger(tiny_net().eval().requires_grad_(False)), {"pratio": 0.2, "lc_steps": 5}),
    "dfba": Row(DFBA().with_trigger(TensorTrigger(torch.eye(3).repeat(3, 1, 1), None, tiny_net().state_dict())), None),
}


def rows(wanted: Callable[[Attack], bool]) -> pytest.MarkDecorator:
    found = {name: row.attack for name, row in ROWS.items() if wanted(row.attack)}
    return pytest.mark.parametrize("attack", found.values(), ids=found)


each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
each_learner = rows(lambda attack: attack.classifier_epochs(Training()) > 0)
each_poison = rows(lambda attack: attack.poisons)
each_fixed = rows(lambda attack: attack.poisons and not attack.in_batch)  # poisons before training
each_in_batch = rows(lambda attack: attack.in_batch)
each_dirty = rows(lambda attack: attack.poisons and not attack.clean_label)  # changes labels
