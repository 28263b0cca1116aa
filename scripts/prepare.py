"""Fetch and read a data set, and say what is there, before anything is trained on it.

    python scripts/prepare.py cifar10 [gtsrb ...] [--dataset_path ./data] [--img_size 48]

Downloads and decodes what a run would, into the same cache, and prints for either part how many images and classes
there are, the fewest and the most of a class, and the fingerprint that records hold as `data.train` and `data.test` in
config.yaml. Exit status: 0 all are there (a note says where one is a subset of the official set), 2 one cannot be had.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau.data.images import Images
from sau.data.sources import SOURCES, fingerprint, load, source, subset_note
from sau.errors import run_command
from sau.report.tables import markdown
from sau.tools import Parser


def row(part: str, images: Images) -> list[str]:
    counts = images.labels.bincount(minlength=images.num_classes)
    shape = "x".join(map(str, images.pixels.shape[1:]))
    few, most = int(counts.min()), int(counts.max())
    return [part, f"{len(images):,}", shape, str(images.num_classes), f"{few:,} to {most:,}", fingerprint(images)]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("dataset", nargs="+", help=f"one or more of {', '.join(SOURCES)}")
    parser.add_argument("--dataset_path", default="./data", help="folder of the data sets [./data]")
    parser.add_argument(
        "--img_size", type=int, help="height and width of the images, where they can be resized [their own]"
    )
    asked = parser.parse_args()
    for name in asked.dataset:
        source(name)  # an unknown one is refused before anything is fetched
    for name in asked.dataset:
        train, test = load(name, asked.dataset_path, asked.img_size)
        heads = [name, "images", "shape", "classes", "a class has", "fingerprint (SHA-256)"]
        print(markdown(heads, [row("training", train), row("test", test)]), flush=True)
        for note in subset_note(name, train, test):
            print(f"note: {note}\n", flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
