"""Hand a finished attack to other people's code.

    python scripts/export.py NAME --format backdoorbench|png|npz --out DIR [--record_root ./record]

DIR is a new folder.
backdoorbench: a result folder for BackdoorBench's loader; make it as `record/NAME` in BackdoorBench's own folder.
png: `train/<label>/<index>.png`, the whole training set with the poisoned images in their places, and
`test_triggered/<label>/<index>.png`; `labels.csv` has a line for each file.
npz: `train.npz` and `test_triggered.npz` with the arrays pixels (uint8 [N, C, H, W]), labels, true_labels,
role (0 clean, 1 triggered, 2 cover: triggered with its true label) and index (position in the original split).
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from sau.compat.backdoorbench import exported_images, new_folder, save_png, write
from sau.data.images import Images
from sau.errors import ConfigError, run_command
from sau.grid.store import find
from sau.record import attack_result
from sau.tools import Parser

COLUMNS = ("labels", "true_labels", "role", "index")


def export_png(parts: dict[str, Images], target: Path) -> None:
    """Every image as `<part>/<label>/<index>.png`, and `labels.csv`."""
    with new_folder(target) as place, (place / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("file", "label", "true_label", "role", "index"))
        for part, images in parts.items():
            rows = zip(*(getattr(images, name).tolist() for name in COLUMNS), strict=True)
            for pixels, row in zip(images.pixels, rows, strict=True):
                path = f"{part}/{row[0]}/{row[-1]}.png"
                save_png(pixels, place / path)
                table.writerow((path, *row))


def export_npz(parts: dict[str, Images], target: Path) -> None:
    """`<part>.npz`, not compressed; `numpy.load` opens it without pickle."""
    with new_folder(target) as place:
        for part, images in parts.items():
            np.savez(place / f"{part}.npz", **{name: value.numpy() for name, value in images.tensors().items()})


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", help="folder of the attack, a name below the record root or a path")
    parser.add_argument("--format", required=True, choices=("backdoorbench", "png", "npz"), help="what to write")
    parser.add_argument("--out", required=True, help="the new folder")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [where the attack had them]")
    parser.add_argument("--name_there", help="backdoorbench: name below its `record` folder [the last part of --out]")
    asked = parser.parse_args()
    if asked.name_there is not None and asked.format != "backdoorbench":
        raise ConfigError(f"--name_there goes with --format backdoorbench, got is {asked.format}; leave it out")
    attacked, target = attack_result.load(find(asked.record_root, asked.name)), Path(asked.out).absolute()
    if asked.format == "backdoorbench":
        write(attacked, target, asked.name_there or target.name, asked.dataset_path)
    else:
        train, poisoned, triggered, _ = exported_images(attacked, asked.dataset_path)
        if not len(poisoned):
            print("note: the attack kept no poisoned training images, so the training set is the clean one")
        parts = {"train": train.replace_rows(poisoned, poisoned.index), "test_triggered": triggered}
        (export_png if asked.format == "png" else export_npz)(parts, target)
    print(target)


if __name__ == "__main__":
    sys.exit(run_command(main))
