"""Put figures into the pages of the methods: published ones, and those of the runs that are kept in docs/results.

python scripts/cards.py            writes what stands behind `<!-- published -->` and `<!-- measured -->` in docs, up to
                                   `<!-- /published -->` and, where there is one, `<!-- /measured -->`
python scripts/cards.py --check    writes nothing; exit status 1 if a page does not say what the data say
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from sau.command.arguments import Parser
from sau.errors import run_command
from sau.report.published import Row, mean, published
from sau.report.read import NONE, Run, read
from sau.report.spread import spread
from sau.report.table import DEAD

DOCS = Path(__file__).resolve().parents[1] / "docs"
CONFIGS = DOCS.parent / "configs"
TABLE = "table1_cpu"  # of docs/results
COSTS = "bench_defenses_cpu"  # of docs/results/bench.jsonl
MARK, MARK_END = "<!-- measured -->\n", "<!-- /measured -->\n"
PUBLISHED, END = "<!-- published -->\n", "<!-- /published -->\n"
SOURCE = f"from [{TABLE}](../results/{TABLE}.md), bf16"


def text(values: list[Any], digits: int = 2) -> str:
    """Mean and standard deviation; a value that some run lacks is a dash."""
    found = spread(values)
    return found.text(digits) if found else "-"


def rule(columns: int) -> str:
    """The line below the head of a Markdown table."""
    return "| --- " * columns + "|\n"


def oracle(run: Run) -> bool:
    """Whether the test sets chose something."""
    return run.summary.get("selection") == "oracle"


def by_attack(runs: list[Run], defense: str) -> dict[str, list[Run]]:
    """Runs of a defense by attack, over seeds."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        if run.defense == defense:
            found.setdefault(run.attack, []).append(run)
    return found


def recipe(kind: str, name: str) -> str:
    """What the recipe `cpu` changes of a method's settings, as a sentence."""
    content = yaml.safe_load((CONFIGS / kind / f"{name}.yaml").read_text())
    changed = (content.get("recipes") or {}).get("cpu") or {}
    cells = ", ".join(f"`{key}` {','.join(map(str, as_list(value)))}" for key, value in changed.items())
    return f"The recipe `cpu` sets {cells}.\n" if cells else "The recipe `cpu` changes none of its settings.\n"


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else in one."""
    return value if isinstance(value, list) else [value]


def attack_table(runs: list[Run], name: str) -> str:
    """One row: what the attack reaches, and how well it hides."""
    own = by_attack(runs, NONE).get(name)
    if not own:
        return ""
    cells = [text([run.figures[key] for run in own]) for key in ("acc", "asr", "racc")]
    hidden = [run.summary.get("trigger") or {} for run in own]
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "in_ball": 1}
    cells += [text([one.get(key) for one in hidden], n) for key, n in digits.items()]
    crossed = [run.summary["cross_acc"] for run in own if "cross_acc" in run.summary]
    few = f" ({len(crossed)})" if 0 < len(crossed) < len(own) else ""  # the first runs do not have it
    cells += [text(crossed) + few, text([run.figures["seconds"] for run in own], 0)]
    return (
        "Here, real CIFAR-10 on the CPU track (width 16), mean ± standard deviation over seeds,\n"
        f"{SOURCE}.\n{recipe('attack', name)}`seconds` are those of one thread beside other work.\n\n"
        "| seeds | ACC % | ASR % | R-ACC % | PSNR dB | SSIM | L-infinity "
        "| in the ball of 0.2, % | cross ACC % | seconds |\n"
        f"{rule(10)}"
        f"| {len(own)} | {' | '.join(cells)} |\n"
    )


def defense_table(runs: list[Run], name: str) -> str:
    """A row an attack and who chose, in the order of the attacks: before, after, and what is published."""
    rows = [defense_row(attack, found) for attack, found in by_choice(runs, name)]
    if not rows:
        return ""
    found, table = by_attack(runs, name), published()["tables"].get(name)
    head = "| attack | chosen by | seeds | before: ACC / ASR | ACC % | ASR % | R-ACC % | DER % | ACC lost |"
    head += " seconds |" + (" published: ACC / ASR / DER |" if table else "")
    mark = "† there the test sets chose.\n" if any("†" in row for row in rows) else ""
    return (
        "Here, real CIFAR-10 on the CPU track (width 16, 2,500 clean pictures), mean ± standard deviation over seeds,\n"
        f"{SOURCE}.\n{recipe('defense', name)}`prototype` is the network without a backdoor.\n"
        + ("What is published, in full above, is of networks of width 64.\n" if table else "")
        + f"\n{head}\n{rule(11 if table else 10)}" + "\n".join(rows) + "\n" + (f"\n{mark}" if mark else "")
        + flagged(found) + cost(name)
    )  # fmt: skip


def by_choice(runs: list[Run], defense: str) -> list[tuple[str, list[Run]]]:
    """(attack, runs over seeds) of a defense, by attack; those that the test sets chose come second."""
    found: dict[tuple[str, bool], list[Run]] = {}
    for run in runs:
        if run.defense == defense:
            found.setdefault((run.attack, oracle(run)), []).append(run)
    return [(attack, own) for (attack, _), own in sorted(found.items())]


def defense_row(attack: str, own: list[Run]) -> str:
    """The row of one attack; of a defense that is published nowhere without the last cell."""
    before, after = ([text([run.figures[key] for run in own]) for key in keys] for keys in (
        ("before_acc", "before_asr"), ("acc", "asr", "racc", "der")
    ))  # fmt: skip
    rest = [text([run.lost for run in own]), text([run.figures["seconds"] for run in own], 0)]
    who = "**oracle**" if oracle(own[0]) else "defender"
    dead = f" {DEAD}" * any(run.gate is not None for run in own)
    cells = [attack + dead, who, str(len(own)), " / ".join(before), *after, *rest]
    table = published()["tables"].get(own[0].defense)
    return f"| {' | '.join(cells + ([theirs(table, attack, oracle(own[0]))] if table else []))} |"


def theirs(table: dict[str, Any], attack: str, chosen: bool) -> str:
    """What is published for an attack; marked where the test sets chose there and not here, a dash where it is the
    other way round or nothing is published."""
    row = table["rows"].get(attack)
    if row is None or (chosen and table["selection"] != "oracle"):
        return "-"
    mark = " †" if table["selection"] == "oracle" and not chosen else ""
    return " / ".join(figures([row[0], row[1], row[3]])) + mark


def flagged(found: dict[str, list[Run]]) -> str:
    """Lines on the classes that a defense flagged, by attack, where its summaries say so; empty where none does.

    Args:
        found: runs of a defense by attack, over seeds.
    """
    cells = []
    for attack, runs in found.items():
        said = [run.summary["findings"]["flagged"] for run in runs if "flagged" in run.summary.get("findings", {})]
        each = " / ".join(", ".join(map(str, classes)) or "none" for classes in said)
        cells += [f"{attack} {each}"] if said else []
    about = "Classes that were flagged, a `/` between seeds; one of `prototype` is a false alarm"
    return f"\n{about}:\n{'; '.join(cells)}.\n" if cells else ""


def cost(name: str) -> str:
    """What a whole run takes, and how long beside one of FT; empty where the benchmark has no row of the defense."""
    lines = (DOCS / "results" / "bench.jsonl").read_text().splitlines()
    found = next(part for part in map(json.loads, lines) if part["name"] == COSTS)
    row = next((row for row in found["rows"] if row["name"] == f"whole run: {name}"), None)
    if row is None:
        return ""
    setting = found["setting"]
    how = f"{setting['pictures']} pictures, recipe `{setting['recipe']}`, fp32, threads: {setting['threads']}"
    seconds, passes = row["ours"], row["passes_per_image"]
    beside = "" if name == "ft" else f", {seconds / row['reference']:,.2f} times as long as FT,"
    return (
        f"\nA whole run in the [benchmark](../performance.md#the-defenses) ({how}) takes {seconds:,.1f} s{beside} "
        f"and {passes:,.1f} forward-equivalents a picture.\n"
    )


def published_table(name: str) -> str:
    """A row an attack, as published, and their mean."""
    tables, names = published()["tables"], published()["names"]
    own = tables[name]["rows"]
    before = tables[name].get("before", tables[NONE]["rows"])
    lines = {names[attack]: [*before[attack][:2], *row] for attack, row in own.items()}
    lines["mean" if len(own) == len(names) else f"mean of {len(own)}"] = mean(list(lines.values()))
    rows = [
        f"| {title} | {' / '.join(figures(line[:2]))} | {' | '.join(figures(line[2:]))} |\n"
        for title, line in lines.items()
    ]
    return f"\n| attack | before: ACC / ASR | ACC | ASR | R-ACC | DER |\n{rule(6)}{''.join(rows)}\n"


def figures(row: Row) -> list[str]:
    """Two decimals, or a dash."""
    return ["-" if value is None else f"{value:.2f}" for value in row]


def page(old: str, name: str, measured: str) -> str:
    """The text of a page with its tables as the data are now."""
    head, mark, rest = old.partition(MARK)
    _, end, below = rest.partition(MARK_END)  # what somebody wrote about the figures
    if PUBLISHED in head:
        block = re.escape(PUBLISHED) + ".*?" + re.escape(END)
        table = PUBLISHED + published_table(name) + END
        head = re.sub(block, lambda found: table, head, flags=re.S)
    return f"{head}{mark}\n{measured}" + (f"\n{end}{below}" if end else "")


def main() -> int:
    """Write or check; exit status 1 for a page that is stale, 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing and name the pages that are stale")
    check = parser.parse_args().check
    stale, runs = [], [run for run in read(DOCS / "results" / f"{TABLE}.jsonl")[0] if run.usable]
    for kind, table in (("attacks", attack_table), ("defenses", defense_table)):
        for file in sorted((DOCS / kind).glob("*.md")):
            old = file.read_text()
            if MARK not in old:
                continue
            new = page(old, file.stem, table(runs, file.stem) or "Here: not measured yet.\n")
            if new != old:
                stale.append(file)
                if not check:
                    file.write_text(new)
    for file in stale:
        print(f"{'stale' if check else 'written'}: {file.relative_to(DOCS.parent)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(run_command(main))
