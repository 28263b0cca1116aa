"""Clean pictures and the triggered ones that are made from them."""

from dataclasses import replace

import torch

from sau.data.images import Images
from sau.errors import DataError, require
from sau.seeds import generator
from sau.types import Labels


def sample(clean: Images, triggered: Images | None, count: int, seed: int = 0) -> tuple[Images, Images | None]:
    """`count` of the clean pictures, drawn by `seed`, and those of the triggered ones that are made from them; `index`
    of either is then the place in the sample. ConfigError for a count below 1, DataError where there are no pictures.
    """
    require("samples", count, count >= 1, "1 and more")
    if len(clean) == 0:
        raise DataError("there are no clean pictures to draw samples from; give at least one")
    kept = torch.randperm(len(clean), generator=generator(seed))[:count].sort().values.to(clean.labels.device)
    some = clean[kept]
    renamed = replace(some, index=torch.arange(len(some), device=kept.device))
    if triggered is None or len(triggered) == 0 or not ((place := places(some, triggered)) >= 0).any():
        return renamed, None
    return renamed, replace(triggered[place >= 0], index=place[place >= 0])


def places(clean: Images, triggered: Images) -> Labels:
    """Where in `clean` the picture lies that each triggered one is made from: both have its `index`; -1 for nowhere."""
    where = torch.full((1 + max(int(clean.index.max()), int(triggered.index.max())),), -1).to(clean.index)
    where[clean.index] = torch.arange(len(clean), device=where.device)
    return where[triggered.index]


def paired(clean: Images, triggered: Images) -> Labels:
    """The same; DataError unless each has its clean picture, whose label is its true one."""
    place = places(clean, triggered)
    if not (place >= 0).all() or not torch.equal(clean.labels[place], triggered.true_labels):
        raise DataError(
            f"of {len(triggered)} triggered pictures some are made from others than the {len(clean)} clean ones, by "
            "their `index` and true labels; give those that they were made from"
        )
    return place
