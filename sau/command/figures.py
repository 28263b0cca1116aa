"""Draw what a record holds, as PNG and SVG.

    sau figures NAME [--record_root ./record]

writes `figures/` into the record: `pictures` (clean, triggered, difference), curves of the attack and of each defense,
`risks` and `types` of the defenses that ran with --track_risk; and with `--defense D` also `examples_D`, adversarial
examples that fool both networks and such that do not, and `features_D`, a map of the last features. Examples are
searched for on `--device`; the map is made on the CPU.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import sau.command.drawing  # noqa: F401  before sau.figures
from sau.command.arguments import Parser, add_device, use_device
from sau.data.images import sample
from sau.errors import ConfigError, RecordError
from sau.figures import curves, examples, features, pictures, risks, save, types
from sau.files import existing, safe_join
from sau.record import attack_result
from sau.record.folder import Record
from sau.witness import Search

LOOKED_AT = 300  # test pictures, for examples


def main(argv: Sequence[str]) -> int:
    """Draw every figure of one record; exit status 2 for a user's mistake."""
    parser = Parser(__doc__, prog="sau figures")
    parser.add_argument("name", help="folder of the attack, a name below the record root or a path")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    parser.add_argument("--defense", help="the defense whose network examples and features are drawn of [none]")
    parser.add_argument("--eps", type=float, help="radius of the L-infinity ball of the examples [0.2]")
    parser.add_argument("--map", choices=("tsne", "pca"), help="how the features are drawn [tsne]")
    add_device(parser)
    draw(parser.parse_args(argv))
    return 0


class Placed(nn.Module):
    """A network that computes on a device, for pictures and answers that stay where they are drawn."""

    def __init__(self, model: nn.Module, where: torch.device) -> None:
        super().__init__()
        self.model, self.where = model.to(where), where

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.to(self.where)).to(x.device)


def draw(asked: argparse.Namespace) -> None:
    """Draw what there is, and say which files."""
    where = use_device(asked)
    for name in ("eps", "map"):
        if asked.defense is None and getattr(asked, name) is not None:
            raise ConfigError(f"--{name} is of the figures that --defense asks for; name a defense, or leave it out")
    search = Search() if asked.eps is None else Search(eps=asked.eps)
    attacked = attack_result.load(existing(asked.record_root, asked.name))
    out, record = safe_join(attacked.path, "figures"), Record(attacked.path)
    if asked.defense is not None:  # before anything is drawn
        if attacked.triggered is None:
            raise RecordError(f"{attacked.path} is a clean network; examples and features need triggered pictures")
        after = attacked.model()
        attack_result.load_weights(after, safe_join(attacked.path, "defense", asked.defense))
    _, test, _ = attacked.pictures(asked.dataset_path)
    if attacked.triggered is not None:
        _tell(save(pictures(test, attacked.triggered), out / "pictures"))
    if record.finished:  # BackdoorBench's folder has no rows to draw
        _tell(save(curves(record), out / "attack"))
    tracked = []
    for manifest in sorted(attacked.path.glob("defense/*/manifest.json")):
        defense = Record(manifest.parent)
        defense.check()
        _tell(save(curves(defense), out / defense.path.name))
        if "risk" in defense.summary():
            tracked.append(defense)
    if tracked:
        _tell(save(risks(tracked), out / "risks"))
        _tell(save(types(tracked), out / "types"))
    if asked.defense is not None and attacked.triggered is not None:
        before = attacked.model()
        mapped = features(before, after, test, attacked.triggered, asked.map or "tsne")
        _tell(save(mapped, out / f"features_{asked.defense}"))
        clean, triggered = sample(test, attacked.triggered, LOOKED_AT)
        if triggered:
            networks = Placed(after, where), Placed(before, where)
            _tell(save(examples(*networks, clean, triggered, search), out / f"examples_{asked.defense}"))


def _tell(paths: list[Path]) -> None:
    print(*paths, sep="\n")
