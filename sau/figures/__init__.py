"""Figures of a record, drawn with matplotlib: curves, images, risks, features. They need the extra `report`.

Colours are Okabe and Ito's, which readers with any colour vision tell apart; line styles repeat what colours say.
"""

import base64
import io
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from sau.figures.audit import audit
from sau.figures.curves import curves, risks, scatter, types
from sau.figures.images import examples, features, images
from sau.files import write

__all__ = ["audit", "curves", "data_url", "examples", "features", "images", "risks", "save", "scatter", "types"]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg, close the figure, and return the two paths."""
    paths = [stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg")]
    for path in paths:
        write(path, _drawn(figure, path.suffix[1:]))  # replaces a link instead of following it
    plt.close(figure)
    return paths


def data_url(figure: Figure, kind: str) -> str:
    """The figure as the URL of an image, png or svg, without a background, for a page; the figure is closed."""
    content = base64.b64encode(_drawn(figure, kind, transparent=True)).decode()
    plt.close(figure)
    return f"data:image/{'svg+xml' if kind == 'svg' else kind};base64,{content}"


def _drawn(figure: Figure, kind: str, **how: bool) -> bytes:
    buffer, metadata = io.BytesIO(), {"Date": None} if kind == "svg" else None
    figure.savefig(buffer, format=kind, dpi=150, bbox_inches="tight", metadata=metadata, **how)
    return buffer.getvalue()
