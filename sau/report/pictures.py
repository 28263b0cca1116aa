"""Trigger pictures of an attack as one small PNG: clean, triggered, difference, for a few test pictures."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sau.data import sources
from sau.data.images import Images, evenly_spaced
from sau.data.readers import needs_download
from sau.errors import SauError
from sau.quality import magnified
from sau.record.attack_result import load_images
from sau.record.folder import Record
from sau.report import parse
from sau.report.read import VERIFIED, Run

COLUMNS, SIZE, GAP = 4, 48, 2  # pictures; their largest side in the strip, and what separates them, in pixels


@dataclass(frozen=True)
class Strip:
    """What a trigger looks like.

    Args:
        data: `data:` address of the PNG; empty if there is none.
        rows: what its rows are, from the top.
        columns: what the columns are: true class and wanted class.
        note: why something is missing; empty if nothing is.
    """

    data: str
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """Pictures across and down, for its proportions."""
        return max(len(self.columns), 1), max(len(self.rows), 1)


class Pictures:
    """Draws strips; a data set is read once.

    Args:
        dataset_path: folder of the data sets; None means where the runs had them.
    """

    def __init__(self, dataset_path: str | None = None) -> None:
        self.dataset_path = dataset_path
        self._clean: Callable[[str, str, int | None], Images | str] = cache(_test_pictures)

    def strip(self, run: Run) -> Strip:
        """The strip of an attack, whose folder is checked wholly before its pictures are read."""
        if run.status != VERIFIED or not (run.path / "triggered.safetensors").is_file():
            return Strip("")
        record = Record(run.path)
        try:
            config = record.check()
            triggered = load_images(record, "triggered")
            assert triggered is not None
            made, data = parse.mapping(config.get("run")), parse.mapping(config.get("data"))
            where = self.dataset_path or str(made.get("dataset_path"))
            size = made.get("img_size")
            clean = self._clean(str(run.dataset), where, size if parse.whole(size) else None)
        except (SauError, KeyError, TypeError) as error:
            return Strip("", note=f"no pictures: {error}")
        chosen = evenly_spaced(len(triggered), COLUMNS)
        shown = triggered[chosen]
        columns = tuple(
            f"class {int(a)}, wanted {int(b)}" for a, b in zip(shown.true_labels, shown.labels, strict=True)
        )
        if isinstance(clean, str) or sources.fingerprint(clean) != data.get("test"):
            why = clean if isinstance(clean, str) else f"{where} holds other pictures than the attack saw"
            return Strip(_png(shown.pixels), ("triggered",), columns, f"{why}; so without clean pictures")
        if int(shown.index.max()) >= len(clean):
            return Strip(_png(shown.pixels), ("triggered",), columns, "its pictures have no places in the test set")
        before = clean.pixels[shown.index]
        difference, gain = magnified(shown.pixels.float() - before.float(), 255.0)
        rows = ("clean", "triggered", f"difference x{gain:.0f}" if gain >= 1.5 else "difference")
        return Strip(_png(before, shown.pixels, difference), rows, columns)


def _test_pictures(name: str, root: str, size: int | None) -> Images | str:
    """The clean test pictures, or why there are none; nothing is downloaded for a report."""
    try:
        return f"{root} holds no {name}" if needs_download(name, Path(root)) else sources.load(name, root, size)[1]
    except SauError as error:
        return str(error)


def _png(*rows: Tensor) -> str:
    """Pictures [N, C, H, W] in 0..255 below each other, in 256 colours."""
    height, width = rows[0].shape[-2:]
    scale = min(1.0, SIZE / max(height, width))
    small = [F.interpolate(row.float(), scale_factor=scale, mode="area") if scale < 1 else row.float() for row in rows]
    height, width = small[0].shape[-2:]
    canvas = torch.full((3, len(rows) * (height + GAP) - GAP, len(small[0]) * (width + GAP) - GAP), 128.0)
    for i, row in enumerate(small):
        for j, picture in enumerate(row):
            top, left = i * (height + GAP), j * (width + GAP)
            canvas[:, top : top + height, left : left + width] = picture
    pixels = canvas.clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
