"""Figures of a record, as matplotlib draws them: curves, pictures, risks, features. They need the extra `report`.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; line styles repeat what colours say.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sau.figures.audit import audit
from sau.figures.curves import curves, risks, types
from sau.figures.examples import examples
from sau.figures.features import features
from sau.figures.pictures import pictures
from sau.files import write

__all__ = ["audit", "curves", "examples", "features", "pictures", "risks", "save", "types"]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, close the figure, and return the two paths."""
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        drawn, dated = io.BytesIO(), {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, bbox_inches="tight", metadata=dated)
        write(path, drawn.getvalue())  # a link that lies there is replaced and not followed
    plt.close(figure)
    return paths
