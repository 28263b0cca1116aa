"""All triggers side by side: rows are attacks, columns clean, triggered, difference; and a table of their figures.

    python scripts/gallery.py --dataset cifar10 [--dataset_path ./data] [--img_size 32] [--record_root ./record]
        [--out gallery.png] [--columns 4] [--radius 0.2]

An attack is shown by the triggered test images of its newest finished record on these test images. Without a record
its trigger is made from its default settings, or, where that means training, its row names the command that makes it.
"""

import argparse
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from sau import quality
from sau.attack import ATTACKS, DFBA, LC, SSBA, Attack, InputAware
from sau.data.images import Images, evenly_spaced
from sau.data.sources import fingerprint, load
from sau.errors import SauError, require, run_command
from sau.files import write
from sau.models import build
from sau.optim import Training
from sau.record.attack_result import load_images
from sau.record.folder import Record
from sau.report.tables import markdown
from sau.tools import Parser


@dataclass(frozen=True)
class Line:
    """One attack: its images, or why there are none."""

    attack: type[Attack]
    images: tuple[Tensor, Tensor] | None  # clean, and the same with the trigger, uint8 [N, C, H, W]
    found: dict[str, Any]  # what `quality` says of all triggered test images
    note: str  # where they come from, or what to do


def recorded(attack: type[Attack], test: str, root: Path) -> tuple[Images, Record] | None:
    """The triggered test images of the newest finished record of an attack on test images of this fingerprint."""
    for manifest in sorted(root.glob("*/manifest.json"), key=lambda file: file.stat().st_mtime, reverse=True):
        record = Record(manifest.parent)
        try:
            made = record.check()
        except SauError:
            continue  # somebody else's folder, or a damaged one
        method, data = made.get("method") or {}, made.get("data") or {}
        learned = method.get("pratio") or not attack.poisons
        if method.get("attack") == attack.name and data.get("test") == test and learned:
            if (images := load_images(record, "triggered")) is not None:
                return images, record
    return None


def line(attack: type[Attack], train: Images, test: Images, asked: argparse.Namespace) -> Line:
    own = recorded(attack, fingerprint(test), Path(asked.record_root))
    if own is not None:
        triggered, note = own[0], f"from the record {own[1].path.name}"
    elif attack in (SSBA, InputAware, LC, DFBA):
        how = f"make one with: python attack/{attack.name}.py --dataset {asked.dataset}"
        return Line(attack, None, {}, f"no trained trigger here; {how}")
    else:
        blank = build("preactresnet18", test.num_classes, width=16, mean=(0.5,) * 3, std=(0.25,) * 3)
        try:
            triggered = attack(pratio=0.0).fit_trigger(train, blank, Training()).poison_test(test)
        except SauError as error:  # its default trigger is not for these images; the others are shown all the same
            return Line(attack, None, {}, f"no trigger here: {error}")
        note = "stamped with its default settings"
    before = test.pixels[triggered.index]
    found = quality.quality(before, triggered.pixels, asked.radius)
    chosen = evenly_spaced(len(triggered), asked.columns)
    return Line(attack, (before[chosen], triggered.pixels[chosen]), found, note)


def figures(found: dict[str, Any]) -> str:
    ssim = "" if found["ssim"] is None else f"SSIM {found['ssim']:.3f}\n"
    psnr = "-" if found["psnr"] is None else f"{found['psnr']:.1f} dB"
    return f"PSNR {psnr}\n{ssim}L\u221e {found['linf']:.3f}\nin ball {found['in_ball']:.0f} %"


def row(shown: Line) -> list[str]:
    """A line of the table: mean figures of all triggered test images."""
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "l2": 1, "in_ball": 0}
    cells = ["" if shown.found.get(name) is None else f"{shown.found[name]:.{n}f}" for name, n in digits.items()]
    return [shown.attack.name, *cells, shown.note]


def draw(lines: list[Line], columns: int) -> bytes:
    size = (0.85 * 3 * columns + 2.4, 0.95 * len(lines))
    figure, axes = plt.subplots(len(lines), 3 * columns, figsize=size, squeeze=False)
    for row, shown in zip(axes, lines, strict=True):
        for axis in row:
            axis.set_axis_off()

        def say(x: float, text: str, axis: Any = row[0], **how: Any) -> None:
            axis.text(x, 0.5, text, va="center", transform=axis.transAxes, **how)

        say(-0.15, shown.attack.__name__, ha="right")
        if shown.images is None:
            say(0, shown.note, fontsize=8, wrap=True)
            continue
        before, after = shown.images
        change, gain = quality.magnified((after.float() - before.float()) / 255)
        for block, images in enumerate((before, after, (255 * change).round().to(torch.uint8))):
            for axis, pixels in zip(row[block * columns :], images, strict=False):
                axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
        say(1.1, f"{figures(shown.found)}\n(x{gain:.0f})", row[-1], fontsize=7)
    for block, title in enumerate(("clean", "triggered", "difference, magnified")):
        axes[0][block * columns].set_title(title, loc="left", fontsize=10)
    figure.subplots_adjust(left=0.09, right=0.9, top=0.94, bottom=0.01, wspace=0.04, hspace=0.06)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    plt.close(figure)
    return buffer.getvalue()


def main() -> None:
    parser = Parser((__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--dataset", default="digits", help="data set whose images are shown [digits]")
    add("--dataset_path", default="./data", help="folder that holds the data sets [./data]")
    add("--img_size", type=int, help="height and width of the images in pixels [the data set's own]")
    add("--record_root", default="./record", help="folder of the result folders [./record]")
    add("--out", default="gallery.png", help="the picture [gallery.png]")
    add("--columns", type=int, default=4, help="images of each attack, 1 and more [4]")
    add("--radius", type=float, default=quality.RADIUS, help="of the ball that triggers are counted in [0.2]")
    asked = parser.parse_args()
    require("--columns", asked.columns, asked.columns >= 1, "1 and more")
    train, test = load(asked.dataset, asked.dataset_path, asked.img_size)
    lines = [line(attack, train, test, asked) for attack in ATTACKS.values() if attack.name != "prototype"]
    write(Path(asked.out), draw(lines, asked.columns))
    print(markdown(["attack", "PSNR dB", "SSIM", "L-infinity", "L2", "in ball %", "images"], map(row, lines)), end="")


if __name__ == "__main__":
    sys.exit(run_command(main))
