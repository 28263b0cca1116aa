"""What determines the result of a method: what its digest is made of, and what no machine could run."""

from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sau.attack import Attack
from sau.config import Method
from sau.data.images import Images
from sau.data.sources import OFFICIAL
from sau.errors import ConfigError
from sau.files import checksum
from sau.formatting import at_most
from sau.grid.spec import Block
from sau.models import check_name, has_width
from sau.settings.run import AttackRun, DefenseRun

Asked = AttackRun | DefenseRun
_FACTS = ("model", "width", "img_size", "ratio", "index")  # of a run: they determine a result
_MEASURED = ("trigger_radius", "track_risk")  # they add to what a summary holds, as risk_* do where risks are tracked


def identity(sections: Sequence[Any], run: Asked, block: Block, dataset_path: str) -> dict[str, Any]:
    """All that determines a result but seed and attack.

    Files and what else is measured stand in it only where they are given: cells had digests before.
    """
    settings = {key: value for section in sections for key, value in section.identity().items()}
    facts = {key: getattr(run, key) for key in _FACTS if hasattr(run, key)}
    where = {"dataset": block.dataset, "dataset_path": dataset_path if block.dataset == "folder" else None}
    machine = {"threads": block.threads, "device": block.device, "amp": block.amp}
    index = run.index if isinstance(run, DefenseRun) else None
    if index:
        del facts["index"]
        facts["index_sha256"] = checksum(Path(index))
    return {**settings, **facts, **where, **machine, **_measured(run)}


def _measured(run: Asked) -> dict[str, Any]:
    tracked = getattr(run, "track_risk", False)
    names = [field.name for field in fields(run) if field.name in _MEASURED or (tracked and field.name[:5] == "risk_")]
    return {name: getattr(run, name) for name in names if getattr(run, name) != getattr(type(run), name)}


def refuse_unfit(method: Method, run: Asked, block: Block, shares: bool) -> None:
    """Refuse, by a ConfigError, what a cell would refuse only after its attack was trained.

    Args:
        method: the attack or defense of the cell.
        run: what it is asked.
        block: of the grid that it is from.
        shares: whether clean_shares say how many pictures a defender has.
    """
    if isinstance(run, DefenseRun) and run.index is not None and shares:
        raise ConfigError(f"index is {run.index}, which beats clean_shares; leave one of them out")
    check_name(run.model, run.width if isinstance(run, AttackRun) and has_width(run.model) else None)
    whole = OFFICIAL.get(block.dataset)
    if whole is not None and whole.even:
        (pictures,) = whole.train
        if isinstance(method, Attack):
            _refuse_labels(method, block.dataset, pictures, whole.classes)
        elif isinstance(run, DefenseRun) and run.index is None and run.ratio * pictures < 1:
            what = f"ratio (clean share) is {run.ratio:g}, which is less than one of {pictures} pictures"
            raise ConfigError(f"{what} of {block.dataset}; allowed is {1 / pictures:g} and more")


@cache  # for the cells of a large grid have few attacks
def _refuse_labels(attack: Attack, dataset: str, pictures: int, classes: int) -> None:
    """Refuse labels beyond the classes, and more pictures than the one class has that a clean-label attack may poison;
    where classes are uneven, or a user's own, the cell itself says so."""
    none = torch.zeros(0, 3, 1, 1, dtype=torch.uint8)  # of pictures it looks at their classes alone
    attack.check_labels(Images.clean(none, torch.zeros(0, dtype=torch.long), classes))
    count, most = round(attack.pratio * pictures), pictures // classes
    if attack.clean_label and count > most:
        what = f"pratio is {attack.pratio:g}, which is {count} of {pictures} pictures of {dataset}"
        allowed = f"allowed is up to {at_most(1 / classes)}, or leave {attack.name} out"
        raise ConfigError(f"{what}, but its class has {most}; {allowed}")
