"""The measured and the published figures in the pages of methods, for `python scripts/tables.py cards`.

What stands between `<!-- measured -->` and `<!-- /measured -->` in docs/attacks and docs/defenses comes from
docs/results.
"""

import re
import statistics
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from sau.report.cells import DEAD
from sau.report.results import NONE, Result, find_results, mean_std
from sau.report.tables import Row, markdown, mean_row, published

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE, NEWER = "table1_cpu", "newer_cpu"  # of docs/results; the second for attacks that the first lacks
MEASURED = re.compile("(<!-- measured -->\n).*?((<!-- /measured -->\n.*)?)\\Z", re.S)
CLEAN = "prototype"  # networks without a backdoor, which are in no mean


@cache
def kept(name: str) -> list[Result]:
    """The results of a file in docs/results."""
    return find_results(DOCS / "results" / f"{name}.jsonl")[0]


def update(check: bool) -> int:
    """Write the pages that are stale, or with `check` only name them and return 1 if there are any."""
    stale, results = False, kept(TABLE)
    for kind, table in (("attacks", attack_table), ("defenses", defense_table)):
        for file in sorted((DOCS / kind).glob("*.md")):
            old = file.read_text()
            if not MEASURED.search(old):
                continue
            measured = table(results, file.stem) or table(kept(NEWER), file.stem) or "Here: not measured yet.\n"
            new = MEASURED.sub(
                lambda found, text=measured: f"{found[1]}\n{text}{chr(10) * bool(found[2])}{found[2]}", old
            )
            if new != old:
                stale = True
                print(f"{'stale' if check else 'written'}: {file.relative_to(DOCS.parent)}")
                if not check:
                    file.write_text(new)
    return int(check and stale)


def text(values: list[Any], digits: int = 2) -> str:
    """Mean and standard deviation; a dash if a value is missing."""
    found = mean_std(values)
    return found.text(digits) if found else "-"


def columns(results: list[Result], *names: str, digits: int = 2) -> list[str]:
    """Figures over seeds."""
    return [text([result.figures[name] for result in results], digits) for name in names]


def figures(row: Row) -> list[str]:
    """Two decimals, or a dash."""
    return ["-" if value is None else f"{value:.2f}" for value in row]


def recipe(kind: str, name: str) -> str:
    """What the recipe `cpu` changes of a method's settings."""
    file = DOCS.parent / "configs" / kind / f"{name}.yaml"
    content = yaml.safe_load(file.read_text()) if file.is_file() else {}
    changed = (content.get("recipes") or {}).get("cpu") or {}
    lists = {key: value if isinstance(value, list) else [value] for key, value in changed.items()}
    texts = ", ".join(f"`{key}` {','.join(map(str, value))}" for key, value in lists.items())
    return f" ({texts})" if texts else ""


def attack_table(results: list[Result], name: str) -> str:
    """One row: what the attack reaches, and how well its trigger hides."""
    own = [result for result in results if (result.attack, result.defense) == (name, NONE)]
    if not own:
        return ""
    texts = columns(own, "acc", "asr", "racc")
    triggers = [result.summary.get("trigger") or {} for result in own]
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "in_ball": 1}
    texts += [text([trigger.get(key) for trigger in triggers], n) for key, n in digits.items()]
    texts += columns(own, "seconds", digits=0)
    head = ["ACC", "ASR", "R-ACC", "PSNR", "SSIM", "L-infinity", "in ball", "seconds"]
    crossed = [result.summary["cross_acc"] for result in own if "cross_acc" in result.summary]
    if crossed:
        head.insert(3, "cross ACC")
        texts.insert(3, text(crossed) + f" ({len(crossed)} seeds)" * (len(crossed) < len(own)))
    about = f"Recipe `cpu`{recipe('attack', name)}, {len(own)} seed{'s' * (len(own) > 1)}; [columns](README.md#tables)."
    return f"{wrapped(about)}\n{markdown(head, [texts])}"


def defense_table(results: list[Result], name: str) -> str:
    """The mean over attacks and a row an attack: after the defense, and what is published."""
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        if result.defense == name:
            groups.setdefault((result.attack, result.oracle), []).append(result)
    if not groups:
        return few(name).lstrip()
    table = published()["tables"].get(name)
    rows = [defense_row(attack, own) for (attack, _), own in sorted(groups.items())]
    fair = {attack: own for (attack, oracle), own in groups.items() if not oracle}
    rows.insert(0, defense_mean([own for attack, own in fair.items() if attack != CLEAN]))
    head = ["attack", "ACC", "ASR", "R-ACC", "DER"] + ["published: ACC / ASR"] * bool(table)
    source = re.split("; (?:DER|R-ACC)", table["source"])[0] if table else ""
    times = [statistics.mean(one.figures["seconds"] or 0.0 for one in own) for own in fair.values()]
    about = f"Recipe `cpu`{recipe('defense', name)}; {min(times):.0f} to {max(times):.0f} s"
    about += " ([columns](README.md#tables))." + f" Published: {source}." * bool(table)
    flags = flagged([result for result in results if result.defense == name])
    return f"{wrapped(about)}\n{markdown(head, rows)}{flags}{few(name)}"


def few(name: str) -> str:
    """What a tenth of digits as clean set leads to, and whether that removes the backdoors."""
    own = [one for one in kept("digits") if one.defense == name]
    groups = [[one for one in own if one.attack == attack] for attack in ("badnet", "blended")]
    if not all(groups):
        return ""
    lost = [one.acc_lost for own in groups for one in own]
    cheap = all(points is not None and points <= 5 for points in lost)
    removed = [one.figures["asr"] <= 15 and one.figures["racc"] >= 70 for own in groups for one in own]
    texts = [f"{own[0].attack} {' / '.join(columns(own, 'asr', 'racc', digits=1))}" for own in groups]
    verdict = "are enough" if cheap and all(removed) else "are not enough"
    about = f"143 [digits](../results/digits.md) (ASR / R-ACC: {', '.join(texts)}) {verdict}."
    return f"\n{wrapped(about)}"


def wrapped(paragraph: str) -> str:
    """Lines of at most 120 characters."""
    return "\n".join(textwrap.wrap(paragraph, 120, break_long_words=False, break_on_hyphens=False)) + "\n"


def defense_row(attack: str, own: list[Result]) -> list[str]:
    """The row of one attack; without the last cell for a defense that is published nowhere."""
    dead = f" {DEAD}" * any(result.missed_gate is not None for result in own)
    who = ", **oracle**" * own[0].oracle
    texts = [attack + dead + who, *columns(own, "acc", "asr", "racc", "der")]
    table = published()["tables"].get(own[0].defense)
    return texts + ([published_cell(table, table["rows"].get(attack), own[0].oracle)] if table else [])


def means(groups: list[list[Result]], *names: str) -> list[str]:
    """Means over attacks of the means over seeds."""
    return figures(mean_row([[statistics.mean(one.figures[key] or 0.0 for one in own) for key in names]
                             for own in groups]))  # fmt: skip


def defense_mean(groups: list[list[Result]]) -> list[str]:
    """The row of means; of what is published only where that is every attack."""
    texts = [f"**mean of {len(groups)}**", *means(groups, "acc", "asr", "racc", "der")]
    table = published()["tables"].get(groups[0][0].defense)
    if table:
        rows = [table["rows"][own[0].attack] for own in groups if own[0].attack in table["rows"]]
        texts.append(published_cell(table, mean_row(rows) if len(rows) == len(groups) else None, oracle=False))
    return texts


def published_cell(table: dict[str, Any], row: Row | None, oracle: bool) -> str:
    """ACC / ASR as published, marked if test sets chose only there; a dash if they chose only here."""
    if row is None or (oracle and table["selection"] != "oracle"):
        return "-"
    return " / ".join(figures(row[:2])) + " †" * (table["selection"] == "oracle" and not oracle)


def flagged(results: list[Result]) -> str:
    """The classes that a defense flagged, by attack, for defenses whose summaries say so."""
    found: dict[str, list[list[int]]] = {}
    for result in results:
        if "flagged" in result.summary.get("findings", {}):
            found.setdefault(result.attack, []).append(result.summary["findings"]["flagged"])
    texts = [
        f"{attack} {' / '.join(', '.join(map(str, classes)) or 'none' for classes in seeds)}"
        for attack, seeds in found.items()
    ]
    about = "Flagged classes, with `/` between seeds; any class of `prototype` is a false alarm"
    return f"\n{about}:\n{'; '.join(texts)}.\n" if texts else ""
