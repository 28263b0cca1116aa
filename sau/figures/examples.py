"""Real pictures with the adversarial examples that the paper tells apart."""

import torch
from matplotlib.figure import Figure
from torch import nn

from sau.data.images import Images, to_float
from sau.errors import DataError
from sau.evaluate import predict
from sau.figures.pictures import beside, grid
from sau.risk import measure
from sau.types import Pixels
from sau.witness import Search


def examples(
    model: nn.Module,
    reference: nn.Module,
    test: Images,
    triggered: Images,
    search: Search,
    columns: int = 5,
    seed: int = 0,
) -> Figure:
    """Clean, triggered, a shared adversarial example (type I), one that is not shared (II or III), and what was added.

    Below each picture the answers of the backdoored network h_b and of the purified one, h. Columns are test pictures
    that h and h_b answer rightly and that have both kinds; as many as there are, up to `columns`.

    Raises DataError where no picture has both kinds, as with a model that equals the reference.
    """
    clean = test[triggered.index]
    x, y = to_float(clean.pixels), clean.labels
    found = measure(model, reference, clean, triggered, search, seed=seed)
    right = (predict(model, x) == y) & (predict(reference, x) == y)
    chosen = (right & found.share & (found.kind >= 2)).nonzero()[:columns, 0]
    if len(chosen) == 0:
        raise DataError(
            f"none of {len(y)} pictures has both a shared and a non-shared adversarial example; look at more pictures "
            "or at another network"
        )
    shared, other = found.witness[chosen], found.example[chosen]
    title, added = beside(torch.cat([shared, other]))
    rows = {
        "clean": x[chosen],
        "triggered": to_float(triggered.pixels[chosen]),
        "shared (I)": x[chosen] + shared,
        f"(I): {title}": added[: len(chosen)],
        "not shared\n(II or III)": x[chosen] + other,
        f"(II or III):\n{title}": added[len(chosen) :],
    }
    notes = {name: _answers(reference, model, row) for name, row in rows.items() if "difference" not in name}
    return grid(rows, notes)


def _answers(reference: nn.Module, model: nn.Module, x: Pixels) -> list[str]:
    pairs = zip(predict(reference, x).tolist(), predict(model, x).tolist(), strict=True)
    return [f"$h_b$: {r}  $h$: {a}" for r, a in pairs]
