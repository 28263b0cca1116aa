"""Put measured figures into the pages of the methods, from the summaries of runs that are kept in docs/results.

python scripts/cards.py            writes what stands behind `<!-- measured -->` in docs/attacks and docs/defenses
python scripts/cards.py --check    writes nothing; fails if a page does not say what the summaries say
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[1] / "docs"
RUNS = (
    DOCS / "results" / "cifar10_cpu"
)  # <attack>_s<seed>/summary.json and <attack>_s<seed>/defense/<name>/summary.json
MARK = "<!-- measured -->\n"
SOURCE = "[docs/results/cifar10_cpu.md](../results/cifar10_cpu.md)"


def spread(values: list[float | None], digits: int = 2) -> str:
    """Mean and standard deviation; a value that some run lacks is a dash."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):.{digits}f}"
    return f"{mean} ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else mean


def rule(columns: int) -> str:
    """The line below the head of a Markdown table."""
    return "| --- " * columns + "|\n"


def summaries(pattern: str) -> dict[str, list[dict[str, Any]]]:
    """Summaries by attack, over seeds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for file in sorted(RUNS.glob(pattern)):
        attack = file.relative_to(RUNS).parts[0].rsplit("_s", 1)[0]
        found.setdefault(attack, []).append(json.loads(file.read_text()))
    return found


def attack_table(name: str) -> str:
    """One row: what the attack reaches, and how well it hides."""
    runs = summaries(f"{name}_s*/summary.json").get(name)
    if not runs:
        return ""
    cells = [spread([run[key] for run in runs]) for key in ("acc", "asr", "racc")]
    hidden = [run.get("trigger") or {} for run in runs]
    digits = {"psnr": 1, "ssim": 3, "linf": 3, "in_ball": 1}
    cells += [spread([one.get(key) for one in hidden], n) for key, n in digits.items()]
    return (
        f"Here, real CIFAR-10 on the CPU track (width 16; {SOURCE}), mean ± standard deviation over seeds:\n\n"
        "| seeds | ACC % | ASR % | R-ACC % | PSNR dB | SSIM | L-infinity | in the ball of 0.2, % |\n"
        f"{rule(8)}"
        f"| {len(runs)} | {' | '.join(cells)} |\n"
    )


def defense_table(name: str) -> str:
    """A row an attack: before and after."""
    rows = []
    for attack, runs in summaries(f"*_s*/defense/{name}/summary.json").items():
        after = [spread([run["after"][key] for run in runs]) for key in ("acc", "asr", "racc")]
        before = f"{spread([run['before']['acc'] for run in runs])} / {spread([run['before']['asr'] for run in runs])}"
        lost = spread([run["before"]["acc"] - run["after"]["acc"] for run in runs])
        der, seconds = spread([run["der"] for run in runs]), spread([run["seconds"] for run in runs], 0)
        who = "/".join(sorted({run["selection"] for run in runs}))
        rows.append(f"| {attack} | {len(runs)} | {before} | {' | '.join(after)} | {der} | {lost} | {seconds} | {who} |")
    if not rows:
        return ""
    return (
        f"Here, real CIFAR-10 on the CPU track (width 16, 2,500 clean pictures; {SOURCE}), mean ± standard deviation\n"
        "over seeds; `prototype` is the network without a backdoor:\n\n"
        "| attack | seeds | before: ACC / ASR | ACC % | ASR % | R-ACC % | DER % | ACC lost | seconds | chosen by |\n"
        f"{rule(10)}" + "\n".join(rows) + "\n"
    )


def main() -> int:
    """Write or check; returns the exit status."""
    stale = []
    for kind, table in (("attacks", attack_table), ("defenses", defense_table)):
        for page in sorted((DOCS / kind).glob("*.md")):
            text = page.read_text()
            if MARK not in text:
                continue
            head = text.split(MARK)[0]
            measured = table(page.stem) or "Here: not measured yet.\n"
            new = f"{head}{MARK}\n{measured}"
            if new != text:
                stale.append(page)
                if "--check" not in sys.argv[1:]:
                    page.write_text(new)
    for page in stale:
        print(f"{'stale' if '--check' in sys.argv[1:] else 'written'}: {page.relative_to(DOCS.parent)}")
    return 1 if stale and "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(__doc__)
    sys.exit(main())
