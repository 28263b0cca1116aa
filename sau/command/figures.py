"""Draw a record as PNG and SVG.

    sau figures NAME [--record_root ./record]

writes `figures/` into the record: `images` (clean, triggered, difference), curves of the attack and of each defense,
`risks` and `types` of the defenses that ran with --track_risk; and with `--defense D` also `examples_D`, adversarial
examples that fool both networks and such that do not, and `features_D`, a map of the last features. Examples are
searched for on `--device`; the map is made on the CPU.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import sau.command.drawing  # noqa: F401  before sau.figures
from sau.command.arguments import Parser, add_device, use_device
from sau.data.images import sample
from sau.errors import ConfigError, RecordError
from sau.figures import curves, examples, features, images, risks, save, types
from sau.files import existing, safe_join
from sau.pgd import Search
from sau.record import attack_result
from sau.record.folder import Record

EXAMPLE_IMAGES = 300  # test images that examples are searched for


def main(argv: Sequence[str]) -> int:
    """Draw every figure of one record and print the paths."""
    parser = Parser(__doc__, prog="sau figures")
    parser.add_argument("name", help="folder of the attack, a name below the record root or a path")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    parser.add_argument("--defense", help="defense of which examples and features are drawn [none]")
    parser.add_argument("--eps", type=float, help="radius of the L-infinity ball of the examples [0.2]")
    parser.add_argument("--map", choices=("tsne", "pca"), help="method for the map of features [tsne]")
    add_device(parser)
    args = parser.parse_args(argv)
    for name in ("eps", "map"):
        if args.defense is None and getattr(args, name) is not None:
            raise ConfigError(f"--{name} needs --defense, whose figures it changes; give --defense or leave it out")
    path = existing(args.record_root, args.name)
    for name, figure in _figures(path, args):
        print(*save(figure, path / "figures" / name), sep="\n")
    return 0


def _figures(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of everything that the record holds."""
    device = use_device(args)
    attacked, record = attack_result.load(path), Record(path)
    safe_join(path, "figures")  # RecordError if it is a link
    after = attacked.blank()
    if args.defense is not None:  # loaded before anything is drawn
        if attacked.triggered is None:
            raise RecordError(f"{path} is a clean network; examples and features need triggered images")
        attack_result.load_weights(after, safe_join(path, "defense", args.defense))
    _, test, _ = attacked.images(args.dataset_path)
    if attacked.triggered is not None:
        yield "images", images(test, attacked.triggered)
    if record.finished:  # a folder of BackdoorBench has no curves
        yield "attack", curves(record)
    defenses = [Record(manifest.parent) for manifest in sorted(path.glob("defense/*/manifest.json"))]
    for defense in defenses:
        defense.check()
        yield defense.path.name, curves(defense)
    if tracked := [defense for defense in defenses if "risk" in defense.summary()]:
        yield "risks", risks(tracked)
        yield "types", types(tracked)
    if args.defense is not None and attacked.triggered is not None:
        before, search = attacked.model(), Search() if args.eps is None else Search(eps=args.eps)
        yield f"features_{args.defense}", features(before, after, test, attacked.triggered, args.map or "tsne")
        clean, triggered = sample(test, attacked.triggered, EXAMPLE_IMAGES)
        if triggered:
            networks = OnDevice(after.eval(), device), OnDevice(before, device)
            yield f"examples_{args.defense}", examples(*networks, clean, triggered, search)


class OnDevice(nn.Module):
    """A network on a device for inputs on the CPU; its outputs come back to the CPU."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model, self.device = model.to(device), device

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.device)).to(x.device)
