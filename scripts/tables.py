"""Tables from result folders, in Markdown.

    python scripts/tables.py table RECORDS [--against sau] [--dataset cifar10] [--into PAGE.md]
    python scripts/tables.py seeds RECORDS
    python scripts/tables.py clean AUDIT [AUDIT ...]
    python scripts/tables.py ratios RECORDS [RECORDS ...] [--out ratios]
    python scripts/tables.py gaps RECORD [RECORD ...]
    python scripts/tables.py radii RECORD [DEFENSE ...] [--radii 0.001 0.004]
    python scripts/tables.py own docs/results/own_networks.jsonl
    python scripts/tables.py cost DEFENSE [DEFENSE ...]
    python scripts/tables.py cards [--check]

RECORDS is a folder of result folders, or a JSONL file of summaries as a grid publishes them; RECORD is one attack;
AUDIT is a folder that scripts/audit.py wrote, or FILE.jsonl/NAME, with the parts statistics and relearn.
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cards
import cost
import risks

from sau import files
from sau.audit.runner import CONTROL
from sau.audit.tables import curves, did_not_take, read
from sau.data.sources import SOURCES
from sau.errors import ConfigError, RecordError, printable, require, run_command
from sau.report.cells import Section, TableCell, sections
from sau.report.results import NONE, PERCENT, Result, find_results, mean_std, shown
from sau.report.tables import markdown, mean_row, paired_comparisons, published, published_rows
from sau.tools import Parser, add_device

BLOCK = re.compile("(<!-- table -->\n).*?(<!-- /table -->\n)", re.S)
CASE, HALF = ("data", "network", "attack", "clean"), 50.0  # percent: the ASR of an attack that took at all
Rows = list[dict[str, Any]]
Curves = dict[str, dict[float, list[tuple[float, float]]]]  # attack -> poisoning ratio -> (ACC, ASR) of each seed


def main() -> int | None:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add: dict[str, Parser] = {}
    for name, function in COMMANDS.items():
        about = (function.__doc__ or "").split("\n")[0]
        add[name] = commands.add_parser(name, help=about, description=about)
        add[name].set_defaults(function=function)
    add["table"].add_argument("root", type=Path, help="folder of the result folders")
    add["table"].add_argument("--against", help="the defense that is compared with each other one [sau]")
    about = "data set of the folders that do not name theirs (summaries alone)"
    add["table"].add_argument("--dataset", choices=SOURCES, metavar="NAME", help=about)
    add["table"].add_argument("--into", type=Path, help="page whose part between <!-- table --> marks is replaced")
    add["seeds"].add_argument("root", type=Path, help="folder of the result folders")
    add["clean"].add_argument("audits", type=Path, nargs="+", help="audits with a control, one an attack and seed")
    add["ratios"].add_argument("roots", type=Path, nargs="+", help="folders of results, or files of summaries")
    add["ratios"].add_argument("--out", type=Path, default=Path("ratios"), help="path of the PNG and the SVG [ratios]")
    add["gaps"].add_argument("records", nargs="+", type=Path, metavar="RECORD", help="result folder of an attack")
    add["radii"].add_argument("record", help="result folder of an attack, a name below the record root or a path")
    add["radii"].add_argument("defenses", nargs="*", help="defenses of the record")
    add["radii"].add_argument("--record_root", default="./record", help="folder of the result folders [./record]")
    add["radii"].add_argument("--dataset_path", help="folder of the data sets [as the attack had it]")
    radii = [0.001, 0.004, 0.016, 0.2]
    add["radii"].add_argument("--radii", type=float, nargs="+", default=radii, help="L-infinity radii")
    add["radii"].add_argument("--samples", type=int, default=250, help="test images [250]")
    add["radii"].add_argument("--steps", type=int, default=10, help="gradient steps of each search, one restart [10]")
    add_device(add["radii"])
    add["own"].add_argument("rows", type=Path, help="file of tests/test_own_networks.py")
    add["cost"].add_argument("defenses", nargs="+", metavar="DEFENSE", help="a defense that has rounds, like sau")
    add["cards"].add_argument("--check", action="store_true", help="write nothing; exit status 1 if a page is stale")
    args = parser.parse_args()
    return args.function(args)


def _read(root: Path) -> list[Result]:
    """The results below a folder; warns of folders that do not count."""
    results, left_out = find_results(root)
    for line in left_out:
        print(f"warning: left out {line}", file=sys.stderr)
    return results


def table(args: argparse.Namespace) -> None:
    """Print attacks against defenses, and one defense against each rival; or write them into a page."""
    found = sections(_read(args.root), args.dataset)
    known = sorted({cell.defense for section in found for cell in section.cells} - {NONE})
    allowed = f"one of the defenses there: {', '.join(known) or 'none'}"
    require("--against", args.against, args.against in (None, *known), allowed)
    text = "\n".join(_section(section, args.against or "sau", len(found) > 1) for section in found)
    if args.into is None:
        print(text)
        return
    page = args.into.read_text(encoding="utf-8")
    if not BLOCK.search(page):
        raise ConfigError(f"{args.into} has no <!-- table --> with a <!-- /table --> after it")
    files.write(args.into, BLOCK.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page, count=1).encode())


def _section(section: Section, defense: str, titled: bool) -> str:
    title = f"## {section.title}\n\n" if titled else ""
    beside = (
        "; published means are over the same attacks. For ANP and FP test sets\nchose the published threshold, so "
        "these figures are in the `(oracle)` rows"
    )
    dead = f"{section.dead}\n\n" if section.dead else ""
    return (
        f"{title}Means over the attacks with a trigger, then the ASR of each in percent (seeds, if more than one; of\n"
        f"`prototype` the ACC){beside if published_rows(section) else ''}:\n\n{dead}{_overview(section)}\n"
        f"{defense} - rival, in percentage points, on the networks that both purified. The seeds of an attack are\n"
        "averaged first; mean, 95 % interval and sign test are over attacks. p is not corrected for the number of\n"
        f"rows.\n\n{_against(section, defense)}"
    )


def _overview(section: Section) -> str:
    """Means over the attacks that took, the published means over the same attacks, and every cell's ASR."""
    rows: dict[str, dict[str, TableCell]] = {}
    for cell in section.cells:
        rows.setdefault(cell.name, {})[cell.attack_name] = cell
    pairs = [cell for cell, _ in published_rows(section)]
    paper, compared = {cell.attack_name: cell.attack for cell in pairs}, {cell.name for cell in pairs}
    attacks = list(dict.fromkeys(attack for cells in rows.values() for attack in cells))
    counted = {cell.attack_name for cell in section.cells if cell.figures["asr"] and not cell.dead}
    took = [attack for attack in attacks if attack in counted] or attacks

    def order(row: tuple[str, dict[str, TableCell]]) -> tuple[Any, ...]:
        """The undefended networks first, then the best mean DER; last what lacks attacks."""
        return row[0] != NONE, not row[1].keys() >= {*took}, -_mean_der(row[1])

    body = []
    for name, cells in sorted(rows.items(), key=order):
        means = mean_row([cells[a].means(*PERCENT) for a in took]) if cells.keys() >= {*took} else [None] * 4
        theirs = _published(next(iter(cells.values())), [paper.get(attack) for attack in took])
        means += [] if not paper else theirs if name in compared else [None] * 4
        body.append([name, *map(shown, means), *(_asr(cells.get(attack)) for attack in attacks)])
    head = ["defense", "mean ACC", "mean ASR", "mean R-ACC", "mean DER"]  # first, so that nobody has to scroll to them
    head += ["published: ACC", "ASR", "R-ACC", "DER"] if paper else []
    return markdown([*head, *attacks], body)


def _mean_der(cells: dict[str, TableCell]) -> float:
    """Over the attacks that took and have one; 0 if there are none."""
    known = [der.mean for cell in cells.values() if not cell.dead and (der := cell.figures["der"])]
    return statistics.mean(known or [0.0])


def _published(cell: TableCell, attacks: list[str | None]) -> list[float | None]:
    """The published mean over these attacks; nothing if one was not published or the rows were chosen otherwise."""
    table = published()["tables"].get(cell.defense)
    rows = table["rows"] if table and (table["selection"] == "oracle") == cell.oracle else {}
    return mean_row([rows[attack] for attack in attacks]) if attacks and {*attacks} <= {*rows} else [None] * 4


def _asr(cell: TableCell | None) -> str:
    """The ASR, or without a trigger the ACC, and how many seeds have it."""
    if cell is None:
        return ""
    figure = cell.figures["asr"] or cell.figures["acc"]
    return shown(figure and figure.mean, 1) + (f" ({len(cell.results)})" if len(cell.results) > 1 else "")


def _against(section: Section, defense: str) -> str:
    """One row for each rival whose settings were not chosen on test data."""
    body = []
    for rival, chosen, found in paired_comparisons(section, defense):
        if chosen:
            continue
        differences = [one.text(interval=True, sign="+") for one in (found.acc, found.asr, found.racc, found.der)]
        counts = [str(len(found.der.values)), str(found.networks)]
        body.append([rival, *counts, *differences, str(found.wins), f"{found.p:.3f}"])
    head = ["rival", "attacks", "networks", "ACC", "ASR", "R-ACC", "DER", "DER higher on", "sign test p"]
    return markdown(head, body) if body else f"{defense} and its rivals share no network here.\n"


def seeds(args: argparse.Namespace) -> None:
    """Print mean and standard deviation over seeds; a table for each data set and network."""
    found = sections(_read(args.root))
    heads = ("attack", "defense", "seeds", "ACC %", "ASR %", "R-ACC %", "DER %", "ACC lost", "seconds")
    for section in found:
        body = []
        for cell in sorted(section.cells, key=lambda c: (c.attack, c.attack_label, c.defense != NONE, c.defense)):
            lost = mean_std([result.acc_lost for result in cell.results])
            texts = [*map(shown, (*(cell.figures[name] for name in PERCENT), lost)), shown(cell.figures["seconds"], 0)]
            body.append([cell.attack_name, cell.name, str(len(cell.results)), *texts])
        print(f"\n{section.title}\n\n" * (len(found) > 1), markdown(heads, body), sep="", end="")
        print(f"\n{section.dead}\n" * bool(section.dead), end="")


def clean(args: argparse.Namespace) -> None:
    """Print what a defense leaves beyond a clean network's figures: means over attacks of the means over seeds."""
    found: dict[str, dict[str, list[list[float]]]] = defaultdict(lambda: defaultdict(list))  # network -> attack -> rows
    audits = [read(place) for place in args.audits]
    for line in did_not_take(audits):
        print(f"warning: {line}", file=sys.stderr)
    parts = before, anew, relearned = ("before", ""), ("statistics", ""), ("relearn", "released")
    for place, audit in zip(args.audits, audits, strict=True):
        acc, asr, racc = (curves([audit], figure) for figure in ("acc", "asr", "racc"))
        if not asr.keys() >= {*parts} or CONTROL not in audit["networks"]:
            raise RecordError(f"{place} lacks a part or the control; run audit.py with --control and both parts")
        if audit["asked"] != audits[0]["asked"]:
            raise RecordError(f"{place} has other settings than {args.audits[0]}; audit both alike")
        shots = [*asr[relearned][CONTROL]]  # fewer where the attacker has fewer poisons
        if shots != [*curves(audits[:1])[relearned][CONTROL]]:
            raise RecordError(f"{place} has other numbers of poisons than {args.audits[0]}; audit with fewer --shots")
        floor, ceiling = (figure[before][CONTROL][0].mean for figure in (asr, racc))
        for network in audit["networks"]:
            left, right = asr[before][network][0].mean, racc[before][network][0].mean
            figures = [acc[before][network][0].mean, left, left - floor, right, ceiling - right]
            spent = [asr[anew][network][0], *asr[relearned][network].values()]
            found[network][audit["attack"]].append([*figures, *(one.mean for one in spent)])
    heads = ["network", "attacks", "ACC", "ASR", "excess ASR", "R-ACC", "R-ACC gap", "statistics anew"]
    heads += [*(f"k = {k}" for k in shots), "largest excess"]
    body = []
    for network, attacks in found.items():
        means = [[statistics.mean(column) for column in zip(*rows, strict=True)] for rows in attacks.values()]
        columns = list(zip(*means, strict=True))
        most, attack = max(zip(columns[2], attacks, strict=True), key=lambda pair: pair[0])
        texts = [f"{statistics.mean(column):.1f}" for column in columns]
        body.append([network, str(len(attacks)), *texts, f"{most:+.1f} ({attack})"])
    print(markdown(heads, body), end="")


def ratios(args: argparse.Namespace) -> None:
    """Draw ASR against the poisoning ratio, a curve an attack, and print ACC / ASR, means over seeds."""
    from sau.figures import COLOURS, panels, save

    scores = _curves(args.roots)
    every = sorted({ratio for curve in scores.values() for ratio in curve})
    body = [[attack, *(_mean_scores(curve.get(ratio)) for ratio in every)] for attack, curve in sorted(scores.items())]
    print(markdown(["attack", *(f"{ratio:g}" for ratio in every)], body), end="")
    figure, (axis,) = panels(1, 1, (5.5, 3.6))
    for colour, (attack, curve) in zip(cycle(COLOURS), sorted(scores.items()), strict=False):
        asr = [[score[1] for score in curve.get(ratio, [(math.nan, math.nan)])] for ratio in every]  # nan: a gap
        means = [statistics.mean(values) for values in asr]
        low = [mean - min(values) for mean, values in zip(means, asr, strict=True)]
        high = [max(values) - mean for mean, values in zip(means, asr, strict=True)]
        axis.errorbar(every, means, yerr=[low, high], marker="o", label=printable(attack), color=colour, capsize=2)
    axis.set_xscale("symlog", linthresh=1e-3)
    axis.set(xlabel="poisoning ratio", ylabel="ASR %", ylim=(-3, 103))
    axis.legend(frameon=False)
    stem = args.out.with_suffix("") if args.out.suffix in (".png", ".svg") else args.out
    print(*save(figure, stem), sep="\n")


def _curves(roots: list[Path]) -> Curves:
    """Scores of the attacks by ratio; RecordError for several data sets or networks, and for two networks that differ
    in nothing that a curve shows."""
    curves: Curves = defaultdict(lambda: defaultdict(list))
    seen: dict[tuple[str, float, int | None], Path] = {}
    results = [result for root in roots for result in _read(root) if result.defense == NONE]
    if len(titles := {section.title for section in sections(results) if section.dataset}) > 1:
        raise RecordError(f"there are several data sets or networks: {'; '.join(sorted(titles))}; name folders of one")
    for result in results:
        ratio = (result.attack_settings or {}).get("pratio")
        acc, asr = result.figures["acc"], result.figures["asr"]
        if ratio is None or acc is None or asr is None:
            continue
        first = seen.setdefault((result.attack, ratio, result.seed), result.path)
        if first != result.path:
            raise RecordError(f"{first} and {result.path} have one attack, ratio and seed; keep one of them there")
        curves[result.attack][ratio].append((acc, asr))
    if not curves:
        raise RecordError(f"no attack with a poisoning ratio in {' or '.join(map(str, roots))}")
    return curves


def _mean_scores(scores: list[tuple[float, float]] | None) -> str:
    return " / ".join(f"{statistics.mean(column):.2f}" for column in zip(*scores, strict=True)) if scores else "-"


def own(args: argparse.Namespace) -> None:
    """Print a table of networks of other kinds for each data set, and a line for each of its defenses."""
    rows = [json.loads(line) for line in files.read(args.rows).decode().splitlines()]
    for (data,), every in _grouped(rows, "data").items():
        these = [row for row in every if row["asr_before"] > HALF]
        by_defense, by_cell = _grouped(these, "defense"), _grouped(these, *CASE, "defense")
        body = []
        for case, some in _grouped(these, *CASE).items():
            after = (_after(by_cell.get((*case, *one), [])) for one in by_defense)
            body.append([*case, _means(some, "acc_before", "asr_before"), *after])
        print(markdown(["data", "network", "attack", "images", "before", *(one for (one,) in by_defense)], body))
        for (defense,), all_of_it in by_defense.items():
            lost = [row["acc_before"] - row["acc_after"] for row in all_of_it]
            more = f"ACC lost {statistics.mean(lost):.1f}, more than 5 in {sum(one > 5 for one in lost)}"
            print(f"{data} {defense}: {_after(all_of_it)}; {more}")
        for case, some in _grouped([row for row in every if row["asr_before"] <= HALF], *CASE).items():
            print(f"{' '.join(case)}: did not take, {_means(some, 'acc_before', 'asr_before')} before")
        print()


def _grouped(rows: Rows, *names: str) -> dict[tuple[str, ...], Rows]:
    groups: dict[tuple[str, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(str(row[name]) for name in names)].append(row)
    return groups


def _means(rows: Rows, *names: str) -> str:
    return "/".join(f"{statistics.mean(row[name] for row in rows):.1f}" for name in names)


def _after(rows: Rows) -> str:
    """ACC/ASR/R-ACC, the ASR after re-learning if it was measured, and how many runs; of those whose ASR stayed above
    10 % how many warned, and how many did not."""
    above = [row["warned"] for row in rows if row["asr_after"] > 10 and "warned" in row]  # not of an earlier verdict
    marks = {"warned": sum(above), "silent": len(above) - sum(above)}
    counts = ", ".join([str(len(rows)), *(f"{count} {mark}" for mark, count in marks.items() if count)])
    relearned = ["asr_relearned"] if rows and "asr_relearned" in rows[0] else []
    return f"{_means(rows, 'acc_after', 'asr_after', 'racc_after', *relearned)} ({counts})" if rows else ""


EACH = (table, seeds, clean, ratios, risks.gaps, risks.radii, own, cost.cost, cards.cards)
COMMANDS: dict[str, Callable[[argparse.Namespace], int | None]] = {each.__name__: each for each in EACH}

if __name__ == "__main__":
    sys.exit(run_command(main))
