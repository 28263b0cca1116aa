"""Figures of a record, drawn with matplotlib: curves, images, risks, features. They need the extra `report`.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; line styles repeat what colours say.
"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sau.figures.audit import audit
from sau.figures.curves import curves, risks, types
from sau.figures.images import examples, features, images
from sau.files import write

__all__ = ["audit", "curves", "examples", "features", "images", "risks", "save", "types"]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, close the figure, and return the two paths."""
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        buffer, metadata = io.BytesIO(), {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(buffer, format=path.suffix[1:], dpi=150, bbox_inches="tight", metadata=metadata)
        write(path, buffer.getvalue())  # replaces a link instead of following it
    plt.close(figure)
    return paths
