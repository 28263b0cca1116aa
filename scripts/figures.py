"""Draw what a record holds: pictures (clean, triggered, difference magnified) and the curves of its metrics, as PNG.

    python scripts/figures.py NAME [--record_root ./record]

writes `figures/` into the record; a defense's curves are drawn beside the attack's.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from sau.data.sources import load
from sau.errors import SauError
from sau.files import folder
from sau.record import Record
from sau.victim import load_images

COLOURS = {"acc": "#0072b2", "asr": "#d55e00", "racc": "#009e73"}  # Okabe and Ito's, told apart by every reader
NAMES = {"acc": "ACC", "asr": "ASR", "racc": "R-ACC"}


def draw_pictures(record: Record, path: Path, columns: int = 6) -> None:
    """Rows clean, triggered, difference magnified so that the largest one is white; columns are test pictures."""
    config = record.config
    triggered = load_images(record, "triggered")
    if triggered is None:
        return
    _, test = load(config["data"]["dataset"], config["run"]["dataset_path"], config["run"]["img_size"])
    chosen = torch.linspace(0, len(triggered) - 1, columns).long()
    after = triggered.pixels[chosen].float() / 255
    before = test.pixels[triggered.index[chosen]].float() / 255
    difference = (after - before).abs()
    gain = 1 / float(difference.max().clamp_min(1 / 255))
    rows = {"clean": before, "triggered": after, f"difference x{gain:.0f}": difference * gain}
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.3 * columns, 1.45 * len(rows)), squeeze=False)
    for line, (title, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title)
    for axis, truth, label in zip(axes[1], triggered.true_labels[chosen], triggered.labels[chosen], strict=True):
        axis.set_xlabel(f"class {truth}, wanted {label}", fontsize=7)
    _save(figure, path)


def draw_curves(record: Record, path: Path) -> None:
    """Left the loss, right ACC, ASR and R-ACC where they were measured, against epochs (attack) or rounds (defense)."""
    rows = [json.loads(line) for line in (record.path / "metrics.jsonl").read_text().splitlines()]
    unit = "round" if record.path.parent.name == "defense" else "epoch"
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    for name in ("loss", "clean_loss", "shared_loss", "adv_loss"):
        if name in rows[0]:
            left.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name.replace("_", " "))
    left.set(xlabel=unit, ylabel="mean loss (nats)")
    left.legend(frameon=False)
    summary = json.loads((record.path / "summary.json").read_text())
    for name, colour in COLOURS.items():
        points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
        if "before" in summary and summary["before"][name] is not None:
            points.insert(0, (0, summary["before"][name]))
        if points:
            right.plot(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=NAMES[name])
    right.set(xlabel=unit, ylabel="share of test pictures (%)", ylim=(-3, 103))
    right.legend(frameon=False)
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


def main() -> int:
    """Draw every figure of one record; exit status 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="folder of the attack below the record root")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    asked = parser.parse_args()
    try:
        record = Record(folder(asked.record_root, asked.name))
        record.check()
        figures = record.path / "figures"
        draw_pictures(record, figures / "pictures.png")
        draw_curves(record, figures / "attack.png")
        for manifest in sorted(record.path.glob("defense/*/manifest.json")):
            defense = Record(manifest.parent)
            defense.check()
            draw_curves(defense, figures / f"{manifest.parent.name}.png")
    except SauError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
