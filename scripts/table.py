"""The comparison of a folder of results as Markdown: attacks against defenses, means beside the published ones, and one
defense against each rival.

    python scripts/table.py RECORDS [--against sau] [--dataset cifar10] [--into PAGE.md]

DER is that of the paper, 100 for a defense that loses no ACC and leaves no ASR, 50 for one that does nothing.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sau import files
from sau.command.arguments import Parser
from sau.data.sources import SOURCES
from sau.errors import ConfigError, run_command
from sau.formatting import markdown
from sau.report.paired import duels
from sau.report.parse import PERCENT
from sau.report.published import Row, alike, compare, mean, published
from sau.report.read import NONE, read
from sau.report.spread import Spread
from sau.report.table import Cell, Section, sections

MARK, END = "<!-- table -->\n", "<!-- /table -->\n"


def by_defense(section: Section) -> dict[str, dict[str, Cell]]:
    """Cells that count, by defense and attack, variants included; the highest mean DER first."""
    found: dict[str, dict[str, Cell]] = {}
    for cell in section.cells:
        if cell.good:
            found.setdefault(cell.name, {})[cell.attack_name] = cell
    return dict(sorted(found.items(), key=lambda item: (item[0] != NONE, -(over(item[1], "der") or 0))))


def comparable(section: Section) -> dict[str, str]:
    """The columns that may stand beside the published table, each with its attack there; none for other data sets."""
    return {pair.cell.attack_name: pair.cell.attack for pair in compare(section)}


def theirs(cell: Cell, attacks: list[str | None]) -> Row:
    """The published mean of a defense over these attacks; a row without figures where one of them was not published, or
    where the test sets chose something in the published row and nothing in ours, or the other way round."""
    rows = published()["tables"][cell.defense]["rows"] if alike(cell.defense, cell.oracle) else {}
    return mean([rows[attack] for attack in attacks]) if attacks and {*attacks} <= {*rows} else [None] * 4


def over(cells: dict[str, Cell], name: str, attacks: list[str] | None = None) -> float | None:
    """The mean over attacks, those that took unless named, of the means over seeds; None where one lacks it."""
    wanted = attacks or [attack for attack, cell in cells.items() if not cell.dead]
    spreads = [cells[attack].figures[name] if attack in cells else None for attack in wanted]
    known = [spread.mean for spread in spreads if spread is not None]
    return sum(known) / len(known) if known and (attacks is None or len(known) == len(spreads)) else None


def overview(section: Section) -> str:
    """ACC / ASR of every cell, means over the attacks that every row of the table can have, and the published means."""
    found, paper = by_defense(section), comparable(section)
    attacks = list(dict.fromkeys(attack for cells in found.values() for attack in cells))
    triggered = [
        attack
        for attack in attacks
        if any(c[attack].figures["asr"] and not c[attack].dead for c in found.values() if attack in c)
    ]
    body = []
    for name, cells in found.items():
        line = [text(cells.get(attack)) for attack in attacks]
        means = [over(cells, figure, triggered) for figure in PERCENT]
        published = theirs(next(iter(cells.values())), [paper.get(attack) for attack in triggered])
        body.append([name, *line, *map(number, [*means, *published] if paper else means)])
    head = ["defense", *attacks, "mean ACC", "mean ASR", "mean R-ACC", "mean DER"]
    return markdown([*head, "published: ACC", "ASR", "R-ACC", "DER"] if paper else head, body)


def text(cell: Cell | None) -> str:
    """ACC / ASR, and over how many seeds."""
    if cell is None:
        return ""
    acc, asr = (figure(cell.figures[name]) for name in ("acc", "asr"))
    return f"{acc} / {asr}" + (f" ({len(cell.good)})" if len(cell.good) > 1 else "")


def figure(spread: Spread | None) -> str:
    """The mean with one decimal."""
    return number(spread.mean if spread else None, 1)


def number(value: float | None, digits: int = 2) -> str:
    """A dash for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def against(section: Section, champion: str) -> str:
    """A row a rival."""
    body = []
    for duel in duels(section, champion):
        gaps = (duel.acc, duel.asr, duel.racc, duel.der)
        intervals = [spread.text(interval=True, sign="+") for spread in gaps]
        counts = [str(len(duel.der.values)), str(duel.networks)]
        body.append([duel.name, *counts, *intervals, str(duel.wins), f"{duel.p:.3f}"])
    head = ["rival", "attacks", "networks", "ACC", "ASR", "R-ACC", "DER", "DER higher on", "sign test p"]
    return markdown(head, body) if body else f"{champion} and its rivals share no network here.\n"


def shown(section: Section, champion: str, titled: bool) -> str:
    """The tables of a section, each with a line that says what it is."""
    title = f"## {section.title}\n\n" if titled else ""
    notes = (
        ",\nours and the published ones over the same attacks. What is published stands beside rows that were chosen "
        "alike\nalone: ANP and FP were published as the test sets chose them, as `(oracle)` rows are"
    )
    dead = f"{section.dead}\n\n" if section.dead else ""
    both = notes if comparable(section) else ""
    return (
        f"{title}ACC / ASR in percent (seeds, where more than one); means over the attacks with a trigger{both}:\n\n"
        f"{dead}"
        f"{overview(section)}\n"
        f"{champion} - rival, in points on the networks that both purified: the mean over the seeds of each attack,\n"
        "then mean, 95 % interval and sign test over attacks. p is that of a row alone: of twenty rows between\n"
        f"equals, one falls below 0.05.\n\n{against(section, champion)}"
    )


def chosen(found: list[Section], wanted: str | None, root: Path) -> str:
    """The defense to compare with each other one; ConfigError for one that is asked for and nowhere in the results."""
    known = sorted({cell.defense for section in found for cell in section.cells if cell.good} - {NONE})
    if wanted is not None and wanted not in known:
        there = f"the defenses {', '.join(known)}; name one of them" if known else "no defenses; leave it out"
        raise ConfigError(f"--against is {wanted!r}, but {root} has {there}")
    return wanted or "sau"


def main() -> int:
    """Print the tables; exit status 2 for a user's mistake."""
    parser = Parser(__doc__)
    parser.add_argument("root", type=Path, help="folder of the result folders")
    parser.add_argument("--against", help="the defense that is compared with each other one [sau]")
    about = "data set of the folders that do not say theirs (summaries alone)"
    parser.add_argument("--dataset", choices=SOURCES, metavar="NAME", help=about)
    parser.add_argument(
        "--into", type=Path, help="page whose part between <!-- table --> marks this becomes [print it]"
    )
    asked = parser.parse_args()
    found = sections(read(asked.root)[0], asked.dataset)
    champion = chosen(found, asked.against, asked.root)
    text = "\n".join(shown(section, champion, len(found) > 1) for section in found)
    if asked.into is None:
        print(text)
        return 0
    try:
        page = files.read(asked.into).decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--into {asked.into} cannot be read ({error}); name a page of text") from None
    head, mark, rest = page.partition(MARK)
    if END not in rest:
        raise ConfigError(f"{asked.into} has no {MARK.strip()} with a {END.strip()} after it")
    files.write(asked.into, f"{head}{mark}\n{text}\n{END}{rest.partition(END)[2]}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
