"""The measured and the published figures in the pages of methods, for `python scripts/tables.py cards`.

What stands behind `<!-- published -->` and `<!-- measured -->` in docs/attacks and docs/defenses, up to
`<!-- /published -->` and, where there is one, `<!-- /measured -->`, comes from docs/results.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from sau.report.cells import DEAD
from sau.report.results import NONE, Result, find_results
from sau.report.stats import mean_std
from sau.report.tables import Row, mean_row, published

DOCS = Path(__file__).resolve().parents[1] / "docs"
TABLE = "table1_cpu"  # of docs/results
COSTS = "bench_defenses_cpu"  # of docs/results/bench.jsonl
PUBLISHED = re.compile("(<!-- published -->\n).*?(<!-- /published -->\n)", re.S)
MEASURED = re.compile("(<!-- measured -->\n).*?((<!-- /measured -->\n.*)?)\\Z", re.S)
SOURCE = f"from [{TABLE}](../results/{TABLE}.md), bf16"


def update(check: bool) -> int:
    """Write the pages that are stale, or with `check` only name them and return 1 if there are any."""
    stale, results = [], find_results(DOCS / "results" / f"{TABLE}.jsonl")[0]
    for kind, table in (("attacks", attack_table), ("defenses", defense_table)):
        for file in sorted((DOCS / kind).glob("*.md")):
            old = file.read_text()
            if not MEASURED.search(old):
                continue
            measured = table(results, file.stem) or "Here: not measured yet.\n"
            new = MEASURED.sub(
                lambda found, text=measured: f"{found[1]}\n{text}{chr(10) * bool(found[2])}{found[2]}", old
            )
            if PUBLISHED.search(new):
                text = published_table(file.stem)
                new = PUBLISHED.sub(lambda found, text=text: f"{found[1]}{text}{found[2]}", new)
            if new != old:
                stale.append(file)
                file.write_text(old if check else new)
    for file in stale:
        print(f"{'stale' if check else 'written'}: {file.relative_to(DOCS.parent)}")
    return int(check and bool(stale))


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
    return f"The recipe `cpu` sets {texts}.\n" if texts else "The recipe `cpu` changes none of its settings.\n"


def attack_table(results: list[Result], name: str) -> str:
    """One row: what the attack reaches, and how well its trigger hides."""
    own = [result for result in results if (result.attack, result.defense) == (name, NONE)]
    if not own:
        return ""
    texts = columns(own, "acc", "asr", "racc")
    triggers = [result.summary.get("trigger") or {} for result in own]
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "in_ball": 1}
    texts += [text([trigger.get(key) for trigger in triggers], n) for key, n in digits.items()]
    crossed = [result.summary["cross_acc"] for result in own if "cross_acc" in result.summary]
    few = f" ({len(crossed)})" if 0 < len(crossed) < len(own) else ""  # the first runs do not have it
    texts += [text(crossed) + few, *columns(own, "seconds", digits=0)]
    return (
        "Here, real CIFAR-10 on the CPU track (width 16), mean ± standard deviation over seeds,\n"
        f"{SOURCE}.\n{recipe('attack', name)}`seconds` are those of one thread beside other work.\n\n"
        "| seeds | ACC % | ASR % | R-ACC % | PSNR dB | SSIM | L-infinity "
        "| in the ball of 0.2, % | cross ACC % | seconds |\n"
        f"{'| --- ' * 10}|\n| {len(own)} | {' | '.join(texts)} |\n"
    )


def defense_table(results: list[Result], name: str) -> str:
    """A row an attack and who chose: before, after, and what is published."""
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        if result.defense == name:
            groups.setdefault((result.attack, result.oracle), []).append(result)
    rows = [defense_row(attack, own) for (attack, _), own in sorted(groups.items())]
    if not rows:
        return ""
    table = published()["tables"].get(name)
    head = "| attack | chosen by | seeds | before: ACC / ASR | ACC % | ASR % | R-ACC % | DER % | ACC lost |"
    head += " seconds |" + (" published: ACC / ASR / DER |" if table else "")
    mark = "\n† there the test sets chose.\n" if any("†" in row for row in rows) else ""
    return (
        "Here, real CIFAR-10 on the CPU track (width 16, 2,500 clean pictures), mean ± standard deviation over seeds,\n"
        f"{SOURCE}.\n{recipe('defense', name)}`prototype` is the network without a backdoor.\n"
        + ("What is published, in full above, is of networks of width 64.\n" if table else "")
        + f"\n{head}\n{'| --- ' * (11 if table else 10)}|\n" + "\n".join(rows) + "\n" + mark
        + flagged([result for result in results if result.defense == name]) + cost(name)
    )  # fmt: skip


def defense_row(attack: str, own: list[Result]) -> str:
    """The row of one attack; without the last cell for a defense that is published nowhere."""
    who = "**oracle**" if own[0].oracle else "defender"
    dead = f" {DEAD}" * any(result.missed_gate is not None for result in own)
    before = " / ".join(columns(own, "before_acc", "before_asr"))
    lost = text([result.acc_lost for result in own])
    texts = [attack + dead, who, str(len(own)), before, *columns(own, "acc", "asr", "racc", "der"), lost]
    texts += columns(own, "seconds", digits=0)
    table = published()["tables"].get(own[0].defense)
    return f"| {' | '.join(texts + ([published_cell(table, attack, own[0].oracle)] if table else []))} |"


def published_cell(table: dict[str, Any], attack: str, oracle: bool) -> str:
    """ACC / ASR / DER as published, marked if test sets chose only there; a dash if they chose only here."""
    row = table["rows"].get(attack)
    if row is None or (oracle and table["selection"] != "oracle"):
        return "-"
    return " / ".join(figures([row[0], row[1], row[3]])) + " †" * (table["selection"] == "oracle" and not oracle)


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
    about = "Classes that were flagged, a `/` between seeds; one of `prototype` is a false alarm"
    return f"\n{about}:\n{'; '.join(texts)}.\n" if texts else ""


def cost(name: str) -> str:
    """Seconds of a whole run, beside those of FT; empty if the benchmark has no row of the defense."""
    lines = (DOCS / "results" / "bench.jsonl").read_text().splitlines()
    found = next(part for part in map(json.loads, lines) if part["name"] == COSTS)
    row = next((row for row in found["rows"] if row["name"] == f"whole run: {name}"), None)
    if row is None:
        return ""
    setting = found["setting"]
    how = f"{setting['pictures']} pictures, recipe `{setting['recipe']}`, fp32, threads: {setting['threads']}"
    beside = "" if name == "ft" else f", {row['ours'] / row['reference']:,.2f} times as long as FT,"
    return (
        f"\nA whole run in the [benchmark](../performance.md#the-defenses) ({how}) takes {row['ours']:,.1f} s{beside} "
        f"and {row['passes_per_image']:,.1f} forward-equivalents a picture.\n"
    )


def published_table(name: str) -> str:
    """A row an attack, as published, and their mean."""
    tables, names = published()["tables"], published()["names"]
    own = tables[name]["rows"]
    before = tables[name].get("before", tables[NONE]["rows"])
    lines = {names[attack]: [*before[attack][:2], *row] for attack, row in own.items()}
    lines["mean" if len(own) == len(names) else f"mean of {len(own)}"] = mean_row(list(lines.values()))
    rows = [f"| {title} | {' / '.join(figures(line[:2]))} | {' | '.join(figures(line[2:]))} |\n"
            for title, line in lines.items()]  # fmt: skip
    head = f"| attack | before: ACC / ASR | ACC | ASR | R-ACC | DER |\n{'| --- ' * 6}|\n"
    return f"\n{head}{''.join(rows)}\n"
