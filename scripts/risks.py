"""The risks of the theory as tables, for `python scripts/tables.py gaps` and `radii`."""

import argparse
import math
import statistics
from typing import Any

from sau.errors import RecordError, require
from sau.grid.store import find
from sau.record import attack_result
from sau.record.folder import Record
from sau.report.results import marked, read_metrics
from sau.report.tables import markdown
from sau.risk import Search, risk_meter
from sau.tools import use_device

GAPS = {"r_adv": "R_adv - R_bd", "r_share": "R_share - R_bd", "r_share_sau": "R_share - R_bd, SAU's search"}
RISKS = {
    "r_adv": "R_adv",
    "r_share": "R_share",
    "r_share_sau": "R_share, SAU's search",
    "type1": "type I",
    "r_bd": "R_bd",
}


def gaps(args: argparse.Namespace) -> None:
    """Print how far R_adv and R_share lie above R_bd, for each defense of the records that ran with --track_risk.

    Over the evaluated rounds the mean, least and most in brackets; of the purified network with Newcombe's 95 %
    interval, which is wide, for the risks are of the same images.
    """
    body = []
    for path in args.records:
        if not path.is_dir():
            raise RecordError(f"there is no folder {path}; give result folders of attacks")
        for manifest in sorted(path.glob("defense/*/manifest.json")):
            record = Record(manifest.parent)
            record.check()
            if "r_bd" in record.summary().get("risk", {}).get("after", {}):
                body.append(_gaps(record))
    if not body:
        raise RecordError("none of these folders has a defense with risks; run one with --track_risk true")
    heads = [f"{gap}{part}" for gap in GAPS.values() for part in (", mean of rounds", ", purified")]
    print(markdown(["attack", "defense", "rounds", "R_bd %", *heads], body), end="")


def _gaps(record: Record) -> list[str]:
    summary, rows = record.summary(), [row for row in read_metrics(record.path) if "r_bd" in row]
    risk, name = summary["risk"]["after"], marked(record.path.name, summary.get("selection"))
    texts = [record.path.parents[1].name, name, str(len(rows)), f"{risk['r_bd']:.1f}"]
    for key in GAPS:
        found = [row[key] - row["r_bd"] for row in rows]
        after, low, high = _newcombe(risk, key)
        texts.append(f"{statistics.mean(found):.1f} ({min(found):.1f}..{max(found):.1f})")
        texts.append(f"{after:.1f} [{low:.1f}, {high:.1f}]")
    return texts


def _newcombe(risk: dict[str, Any], name: str) -> tuple[float, float, float]:
    """risk[name] - R_bd in percent and its 95 % interval (Newcombe 1998, method 10)."""
    (low, high), (bd_low, bd_high) = risk[f"{name}_interval"], risk["r_bd_interval"]
    gap = risk[name] - risk["r_bd"]
    below = math.hypot(risk[name] - low, bd_high - risk["r_bd"])
    above = math.hypot(high - risk[name], risk["r_bd"] - bd_low)
    return gap, gap - below, gap + above


def radii(args: argparse.Namespace) -> None:
    """Print the risks of the attacked and the purified networks against the radius, on the same test images."""
    device = use_device(args)
    require("--samples", args.samples, args.samples >= 1, "1 and more")
    searches = [Search(eps=eps, steps=args.steps, restarts=1) for eps in args.radii]
    attacked = attack_result.load(find(args.record_root, args.record))
    networks = {"attacked": attacked.model()}
    for name in args.defenses:
        networks[name] = attacked.model()
        attack_result.load_weights(networks[name], find(attacked.path / "defense", name))
    _, test, _ = attacked.images(args.dataset_path)
    test, triggered = test.to(device), attacked.triggered and attacked.triggered.to(device)
    reference = attacked.model().to(device)
    print(f"| network | radius | {' | '.join(RISKS.values())} |\n|---|---|{'---|' * len(RISKS)}")
    for name, model in networks.items():
        for search in searches:
            row = risk_meter(reference, test, triggered, args.samples, search, 0)(model.to(device)).row()
            texts = [f"{row[risk]:.1f}" if risk in row else "-" for risk in RISKS]
            print(f"| {name} | {search.eps:g} | {' | '.join(texts)} |", flush=True)
