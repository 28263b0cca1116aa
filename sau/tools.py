"""The tools of `sau`: report, figures, verify and inspect, a function each, whose docstring is its help.

What they work with is imported when they are called, so that scripts may take `Parser` and the device from here.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sau.device import choose_device, prepare, set_threads
from sau.errors import ConfigError, RecordError, printable
from sau.files import safe_join, write
from sau.settings import Parser as Parser

EXAMPLE_IMAGES = 300  # test images that adversarial examples are searched for


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add `--device` and `--threads`."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or one like cuda:1 [auto]")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: OMP_NUM_THREADS, else all cores [0]")


def use_device(asked: argparse.Namespace) -> torch.device:
    """Set the number of threads and return the device; ConfigError if this machine does not have it."""
    set_threads(asked.threads)
    return prepare(choose_device(asked.device))


def report(argv: Sequence[str]) -> int:
    """Every result below a folder as one HTML page, and the same table as CSV, LaTeX and JSON.

    It reads ROOT/<name> (attacks) and ROOT/<name>/defense/<method>, at any depth. Folders that are unfinished or
    damaged are listed with the reason. ROOT may also be a .jsonl file, as a grid publishes results; or the folder of a
    purified network of your own, whose page says what was measured of it.
    """
    from sau.data.sources import SOURCES
    from sau.record.folder import CONFIG, OWN, read_config, run_kind
    from sau.report.page import build, build_own
    from sau.report.tables import as_csv, as_json, as_latex

    formats = {"csv": as_csv, "latex": as_latex, "json": as_json}
    parser = Parser(report.__doc__, prog="sau report")
    parser.add_argument("root", type=Path, help="folder of the result folders, like ./record")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page [report.html]")
    for name in formats:
        parser.add_argument(f"--{name}", type=Path, help=f"write the table as {name} to this file")
    parser.add_argument("--dataset", choices=SOURCES, metavar="NAME", help="data set of folders that name none")
    parser.add_argument("--dataset_path", help="folder of the data sets, for clean images [where the runs had them]")
    parser.add_argument("--beside", type=Path, nargs="+", default=(), help="like ROOT, of networks known to be clean")
    args = parser.parse_args(argv)
    tables = {path: form for name, form in formats.items() if (path := vars(args)[name])}
    if (args.root / CONFIG).is_file() and run_kind(read_config(args.root / CONFIG)) == OWN:
        if tables:
            raise ConfigError("csv, latex and json are tables of attacks; leave them out for a network of your own")
        texts = {args.out: build_own(args.root, args.beside)}
    else:
        if args.beside:
            raise ConfigError(f"--beside is for the page of a network of your own, which {args.root} is not")
        page, sections = build(args.root, args.dataset, args.dataset_path)
        texts = {args.out: page} | {path: form(sections) for path, form in tables.items()}
    for path, text in texts.items():
        write(path, text.encode(errors="backslashreplace"))
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def figures(argv: Sequence[str]) -> int:
    """Draw a record as PNG and SVG, into its folder `figures`.

    These are `images` (clean, triggered, difference), curves of the attack and of each defense, `risks` and `types` of
    the defenses that ran with --track_risk; and with `--defense D` also `examples_D`, adversarial examples that fool
    both networks and such that do not, and `features_D`, a map of the last features. Examples are searched for on
    `--device`; the map is made on the CPU.
    """
    from sau.figures import save
    from sau.grid.store import find

    parser = Parser(figures.__doc__, prog="sau figures")
    parser.add_argument("name", help="folder of the attack, a name below the record root or a path")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    parser.add_argument("--defense", help="defense of which examples and features are drawn [none]")
    parser.add_argument("--eps", type=float, default=0.2, help="radius of the L-infinity ball of the examples [0.2]")
    parser.add_argument("--map", choices=("tsne", "pca"), default="tsne", help="method for the map of features [tsne]")
    add_device(parser)
    args = parser.parse_args(argv)
    path = find(args.record_root, args.name)
    for name, figure in _figures(path, args):
        print(*save(figure, path / "figures" / name), sep="\n")
    return 0


def _figures(path: Path, args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """(name, figure of matplotlib) of everything that the record holds."""
    from sau import figures as draw
    from sau.data.images import sample
    from sau.grid.store import find
    from sau.record import attack_result
    from sau.record.folder import Record
    from sau.risk import Search

    device, search = use_device(args), Search(eps=args.eps)  # a wrong radius is refused before anything is drawn
    attacked, record = attack_result.load(path), Record(path)
    safe_join(path, "figures")  # RecordError if it is a link
    before, after, triggered = attacked.model(), attacked.model(), attacked.triggered
    if args.defense is not None:  # loaded before anything is drawn
        if triggered is None:
            raise RecordError(f"{path} is a clean network; examples and features need triggered images")
        attack_result.load_weights(after, find(path / "defense", args.defense))
    _, test, _ = attacked.images(args.dataset_path)
    if triggered is not None:
        yield "images", draw.images(test, triggered)
    if record.finished:  # a folder of BackdoorBench has no curves
        yield "attack", draw.curves(record)
    defenses = [Record(manifest.parent) for manifest in sorted(path.glob("defense/*/manifest.json"))]
    for defense in defenses:
        defense.check()
        yield defense.path.name, draw.curves(defense)
    if tracked := [defense for defense in defenses if "risk" in defense.summary()]:
        yield "risks", draw.risks(tracked)
        yield "types", draw.types(tracked)
    if args.defense is not None and triggered is not None:
        yield f"features_{args.defense}", draw.features(before, after, test, triggered, args.map)
        clean, bad = sample(test, triggered, EXAMPLE_IMAGES)
        if bad:
            there = after.to(device), before.to(device), clean.to(device), bad.to(device)
            yield f"examples_{args.defense}", draw.examples(*there, search)


def verify(argv: Sequence[str]) -> int:
    """Whether result folders are whole, and whether their figures come out again when the stored weights are scored.

    RECORD is the folder of an attack, by name below the record root or by path; the defenses in it are verified too.
    Compared are the sums of the manifest, and ACC, ASR, R-ACC and DER. A figure is right if the prediction of at most
    one image in a thousand (and at least one) differs from the recorded count.
    Exit status: 0 everything is right, 1 something is wrong or could not be checked, 2 a mistake in the command.
    """
    from sau.grid.store import find
    from sau.verify import verify as checks_of

    parser = Parser(verify.__doc__, prog="sau verify")
    parser.add_argument("record", nargs="+", help="folder of an attack")
    parser.add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    parser.add_argument("--dataset_path", help="folder of the data sets [where the attack found them]")
    add_device(parser)
    asked = parser.parse_args(argv)
    device = use_device(asked)
    states = set[str]()
    for path in [find(asked.record_root, name) for name in asked.record]:
        checks = checks_of(path, asked.dataset_path, device)
        for check in checks:
            print(printable(f"{check.state:12}{check.name}: {check.text}"))
        found = {check.state for check in checks}
        state = "WRONG" if "wrong" in found else "not all could be checked" if "not checked" in found else "verified"
        print(f"{path}: {state}", flush=True)
        states |= found
    return int(states != {"ok"})


def inspect(argv: Sequence[str]) -> int:
    """What is in a network file that somebody else made, without running anything in it.

    FILE is a .pt, .pth, .ckpt or .safetensors file, whose content decides, not its name; or a folder of timm,
    transformers or open_clip. The last line is the verdict.
    Exit status: 0 harmless to open, 1 suspicious (it wants to import or run what weights do not need), 2 unreadable, or
    a mistake in the command. Weights that are harmless to open may still have a backdoor: that is what the defenses are
    for.
    """
    from sau.compat.inspect import HARMLESS, text
    from sau.compat.inspect import inspect as look

    parser = Parser(inspect.__doc__, prog="sau inspect")
    parser.add_argument("file", type=Path, help="the file or folder")
    parser.add_argument("--to", type=Path, help="write its tensors to this new file as safetensors, if it is harmless")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    asked = parser.parse_args(argv)
    found = look(asked.file, asked.to)
    print(json.dumps(found, indent=2) if asked.json else text(found))
    if asked.to is not None and found["status"] != HARMLESS:
        print(f"error: {asked.to} was not written, see the verdict", file=sys.stderr)
    return int(found["status"])
