"""The measured and the published figures in the pages of methods, for `python scripts/tables.py cards`.

What stands between `<!-- measured -->` and `<!-- /measured -->` in docs/attacks and docs/defenses comes from
docs/results.
"""

import argparse
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from sau.config import load_yaml, written
from sau.report.cells import DEAD, TableCell, sections
from sau.report.results import NONE, PERCENT, find_results, mean_std, shown
from sau.report.tables import Row, markdown, mean_row, published

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE, NEWER = "table1_cpu", "newer_cpu"  # of docs/results; the second for attacks that the first lacks
MEASURED = re.compile("(<!-- measured -->\n).*?((<!-- /measured -->\n.*)?)\\Z", re.S)
CLEAN = "prototype"  # networks without a backdoor, which are in no mean


@cache
def kept(name: str) -> list[TableCell]:
    """The cells of a file in docs/results."""
    results, _ = find_results(DOCS / "results" / f"{name}.jsonl")
    return [cell for section in sections(results) for cell in section.cells]


def cards(args: argparse.Namespace) -> int:
    """Write the pages that are stale, or with `--check` only name them and return 1 if there are any."""
    stale, results = False, kept(TABLE)
    for kind, table in (("attacks", attack_table), ("defenses", defense_table)):
        for file in sorted((DOCS / kind).glob("*.md")):
            old = file.read_text()
            if not (found := MEASURED.search(old)):
                continue
            measured = table(results, file.stem) or table(kept(NEWER), file.stem) or "Here: not measured yet.\n"
            new = f"{old[: found.end(1)]}\n{measured}" + (f"\n{found[2]}" if found[2] else "")
            if new != old:
                stale = True
                print(f"{'stale' if args.check else 'written'}: {file.relative_to(DOCS.parent)}")
                if not args.check:
                    file.write_text(new)
    return int(args.check and stale)


def columns(cell: TableCell, *names: str, digits: int = 2) -> list[str]:
    return [shown(cell.figures[name], digits) for name in names]


def recipe(kind: str, name: str) -> str:
    """What the recipe `cpu` changes of a method's settings."""
    file = DOCS.parent / "configs" / kind / f"{name}.yaml"
    content = load_yaml(file) if file.is_file() else {}
    changed = content.get("recipes", {}).get("cpu", {})
    texts = ", ".join(f"`{key}` {written(value)}" for key, value in changed.items())
    return f" ({texts})" if texts else ""


def attack_table(cells: list[TableCell], name: str) -> str:
    """One row: what the attack reaches, and how well its trigger hides."""
    own = next((cell for cell in cells if (cell.attack, cell.defense) == (name, NONE)), None)
    if own is None:
        return ""
    texts, seeds = columns(own, "acc", "asr", "racc"), len(own.results)
    triggers = [result.summary.get("trigger") or {} for result in own.results]
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "in_ball": 1}
    texts += [shown(mean_std([trigger.get(key) for trigger in triggers]), n) for key, n in digits.items()]
    texts += columns(own, "seconds", digits=0)
    head = ["ACC", "ASR", "R-ACC", "PSNR", "SSIM", "L-infinity", "in ball", "seconds"]
    crossed = [result.summary["cross_acc"] for result in own.results if "cross_acc" in result.summary]
    if crossed:
        head.insert(3, "cross ACC")
        texts.insert(3, shown(mean_std(crossed)) + f" ({len(crossed)} seeds)" * (len(crossed) < seeds))
    about = f"Recipe `cpu`{recipe('attack', name)}, {seeds} seed{'s' * (seeds > 1)}; [columns](README.md#tables)."
    return f"{wrapped(about)}\n{markdown(head, [texts])}"


def defense_table(cells: list[TableCell], name: str) -> str:
    """The mean over attacks and a row an attack: after the defense, and what is published."""
    own = sorted((cell for cell in cells if cell.defense == name), key=lambda cell: (cell.attack, cell.oracle))
    if not own:
        return few(name).lstrip()
    table, fair = published()["tables"].get(name), [cell for cell in own if not cell.oracle]
    rows = [defense_mean([cell for cell in fair if cell.attack != CLEAN]), *map(defense_row, own)]
    head = ["attack", "ACC", "ASR", "R-ACC", "DER"] + ["published: ACC / ASR"] * bool(table)
    source = re.split("; (?:DER|R-ACC)", table["source"])[0] if table else ""
    times = [cell.figures["seconds"].mean for cell in fair]
    about = f"Recipe `cpu`{recipe('defense', name)}; {min(times):.0f} to {max(times):.0f} s"
    about += " ([columns](README.md#tables))." + f" Published: {source}." * bool(table)
    return f"{wrapped(about)}\n{markdown(head, rows)}{flagged(own)}{few(name)}"


def few(name: str) -> str:
    """What a tenth of digits as clean set leads to, and whether that removes the backdoors."""
    own = [cell for cell in kept("digits") if cell.defense == name and cell.attack in ("badnet", "blended")]
    if len(own) < 2:
        return ""
    every = [one for cell in own for one in cell.results]
    cheap = all(one.acc_lost is not None and one.acc_lost <= 5 for one in every)
    removed = all(one.figures["asr"] <= 15 and one.figures["racc"] >= 70 for one in every)
    texts = [f"{cell.attack} {' / '.join(columns(cell, 'asr', 'racc', digits=1))}" for cell in own]
    verdict = "are enough" if cheap and removed else "are not enough"
    about = f"143 [digits](../results/digits.md) (ASR / R-ACC: {', '.join(texts)}) {verdict}."
    return f"\n{wrapped(about)}"


def wrapped(paragraph: str) -> str:
    """Lines of at most 120 characters."""
    return "\n".join(textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False)) + "\n"


def defense_row(cell: TableCell) -> list[str]:
    """The row of one attack; without the last cell for a defense that is published nowhere."""
    name = cell.attack + f" {DEAD}" * bool(cell.dead) + ", **oracle**" * cell.oracle
    table = published()["tables"].get(cell.defense)
    theirs = [published_cell(table, table["rows"].get(cell.attack), cell.oracle)] if table else []
    return [name, *columns(cell, *PERCENT), *theirs]


def means(cells: list[TableCell], *names: str) -> list[str]:
    """Means over attacks of the means over seeds."""
    return [*map(shown, mean_row([cell.means(*names) for cell in cells]))]


def defense_mean(cells: list[TableCell]) -> list[str]:
    """The row of means; of what is published only where that is every attack."""
    texts, table = [f"**mean of {len(cells)}**", *means(cells, *PERCENT)], published()["tables"].get(cells[0].defense)
    if table:
        rows = [table["rows"][cell.attack] for cell in cells if cell.attack in table["rows"]]
        texts.append(published_cell(table, mean_row(rows) if len(rows) == len(cells) else None, oracle=False))
    return texts


def published_cell(table: dict[str, Any], row: Row | None, oracle: bool) -> str:
    """ACC / ASR as published, marked if test sets chose only there; a dash if they chose only here."""
    if row is None or (oracle and table["selection"] != "oracle"):
        return "-"
    return " / ".join(map(shown, row[:2])) + " †" * (table["selection"] == "oracle" and not oracle)


def flagged(cells: list[TableCell]) -> str:
    """The classes that a defense flagged, by attack, for defenses whose summaries say so."""
    found = {cell.attack: [one.summary.get("findings", {}).get("flagged") for one in cell.results] for cell in cells}
    texts = [
        f"{attack} {' / '.join(', '.join(map(str, classes)) or 'none' for classes in seeds)}"
        for attack, seeds in found.items()
        if None not in seeds
    ]
    about = "Flagged classes, with `/` between seeds; any class of `prototype` is a false alarm"
    return f"\n{about}:\n{'; '.join(texts)}.\n" if texts else ""
