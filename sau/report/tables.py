"""Tables: CSV, LaTeX and JSON from the same rows, published figures beside ours, comparisons with rivals."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader

from sau.errors import printable
from sau.record.folder import SUMMARY
from sau.report.cells import Section, TableCell
from sau.report.results import COST, NONE, PERCENT, MeanStd, mean_std

FIGURES = (*PERCENT, *COST)
UNVERIFIED = f"{SUMMARY} alone: nothing to check it by"
Row = list[float | None]  # acc, asr, racc, der in percent
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
})  # fmt: skip


def rows(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """One a cell; of every figure the mean, the values and, for three seeds and more, the standard deviation."""
    return [_row(section, cell) for section in sections for cell in section.cells]


def _row(section: Section, cell: TableCell) -> dict[str, Any]:
    network, defended = section.network, cell.defense != NONE
    row: dict[str, Any] = {
        "dataset": section.dataset, "network": network.get("name"), "width": network.get("width"),
        "attack": cell.attack, "attack_variant": cell.attack_label, "defense": cell.defense,
        "defense_variant": cell.label, "seeds": len(cell.results),
    }  # fmt: skip
    for name in FIGURES:
        figure = cell.figures[name]
        row[name] = None if figure is None else round(figure.mean, 2)
        row[f"{name}_sd"] = None if figure is None or len(figure.values) < 3 else round(figure.std, 2)
        row[f"{name}_values"] = [] if figure is None else [round(value, 2) for value in figure.values]
    return {
        **row, "rank": cell.rank or None, "selection": ("oracle" if cell.oracle else "defender") if defended else None,
        "data": ("poisoned" if cell.poisoned else "clean") if defended else None, "did_not_take": cell.dead or None,
        "status": "measured" if cell.verified else "unverified", "reason": "" if cell.verified else UNVERIFIED,
        "folders": [result.name for result in cell.results],
    }  # fmt: skip


def as_json(sections: Sequence[Section]) -> str:
    """A list of objects."""
    return json.dumps(rows(sections), indent=2, ensure_ascii=False) + "\n"


def as_csv(sections: Sequence[Section]) -> str:
    """A line a cell. Texts that a spreadsheet would take for a formula are quoted, control characters are escaped."""
    found, out = rows(sections), io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(found[0])
    writer.writerows([_plain(value) for value in row.values()] for row in found)
    return out.getvalue()


def _plain(value: Any) -> Any:
    value = " ".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip().startswith(("=", "+", "-", "@")) else "") + printable(value)


def as_latex(sections: Sequence[Section]) -> str:
    """A booktabs table each section, the best DER bold, the second underlined; below it what the signs mean."""
    folder, signs = FileSystemLoader(Path(__file__).parent), ("<%", "%>", "<<", ">>", "<#", "#>")
    made = Environment(*signs, loader=folder, trim_blocks=True, lstrip_blocks=True)
    made.filters["tex"] = lambda text: " ".join(text.split()).translate(_LATEX)
    return made.get_template("table.tex").render(sections=sections, figures=FIGURES, percent=PERCENT)


@cache
def published() -> Any:
    """`published.json`: `names` of attacks, the `setting` that a run must have to be compared, `tables` by defense."""
    return json.loads((Path(__file__).parent / "published.json").read_text())


def published_rows(section: Section) -> list[tuple[TableCell, Row]]:
    """Our cells of the published setting, each with its published row; none for other data sets and networks. A setting
    that a folder does not record is taken to be the published one."""
    setting, tables = published()["setting"], published()["tables"]
    network = section.network.get("name", setting["name"])
    if (section.dataset, network) != (setting["dataset"], setting["name"]):
        return []
    found = []
    for cell in section.cells:
        row = tables[cell.defense]["rows"].get(cell.attack) if cell.defense in tables else None
        own = (cell.results[0].settings or {}) | (cell.results[0].attack_settings or {})
        if row is not None and all(own.get(key, value) == value for key, value in setting.items()):
            found.append((cell, row))
    return sorted(found, key=lambda pair: (published()["names"][pair[0].attack], pair[0].defense != NONE))


def mean_row(rows: Sequence[Row]) -> Row:
    """Column by column; None where a row has none."""
    return [one.mean if one else None for one in map(mean_std, zip(*rows, strict=True))]


@dataclass(frozen=True)
class PairedComparison:
    """A defense minus a rival, in points, on the networks that both purified: a difference an attack. It is taken per
    network, so that what makes a network easy or hard for every defense cancels out, and averaged over the networks of
    an attack: seeds are no further attacks."""

    acc: MeanStd
    asr: MeanStd  # below 0 is better
    racc: MeanStd
    der: MeanStd
    networks: int  # how many both purified

    @property
    def wins(self) -> int:
        """Attacks on which the defense has the higher DER."""
        return sum(value > 0 for value in self.der.values)

    @property
    def p(self) -> float:
        """Two-sided sign test over attacks; ties are left out."""
        from scipy.stats import binomtest

        decided = [value for value in self.der.values if value]
        return float(binomtest(self.wins, len(decided)).pvalue) if decided else 1.0


def paired_comparisons(section: Section, defense: str = "sau") -> list[tuple[str, bool, PairedComparison]]:
    """A defense against each rival with the same share of clean images, over attacks that took: (rival, whether test
    data chose for it, comparison); the strongest rival first, those with an oracle last. A defense that test data chose
    is compared with none."""
    groups: dict[str, list[TableCell]] = defaultdict(list)
    for cell in section.cells:
        if not cell.dead:
            groups[cell.name].append(cell)
    found, ours = [], [own for own in groups.values() if own[0].defense == defense and not own[0].oracle]
    for own in ours:
        label = f" (for {own[0].name})" * (len(ours) > 1)  # ours, where it ran with several settings
        for name, rival in groups.items():
            alike = rival[0].defense not in (defense, NONE) and len({own[0].share, rival[0].share} - {None}) < 2
            if alike and (comparison := _compare(own, rival)):
                found.append((name + label, rival[0].oracle, comparison))
    return sorted(found, key=lambda item: (item[1], item[2].der.mean))


def _compare(ours: Sequence[TableCell], theirs: Sequence[TableCell]) -> PairedComparison | None:
    """None if they share no network."""
    first, second = _by_network(ours), _by_network(theirs)
    attacks: dict[str, list[Any]] = defaultdict(list)  # differences of the figures on each network
    for network in sorted(first.keys() & second.keys()):
        attacks[network[0]].append(first[network] - second[network])
    if not attacks:
        return None
    columns = np.transpose([np.mean(rows, 0) for rows in attacks.values()]).tolist()
    figures = {name: MeanStd(tuple(column)) for name, column in zip(PERCENT, columns, strict=True)}
    return PairedComparison(**figures, networks=sum(map(len, attacks.values())))


def _by_network(cells: Sequence[TableCell]) -> dict[tuple[str, Path], Any]:
    """PERCENT by network (attack and folder), over the defense's own seeds; one without a trigger is left out."""
    found: dict[tuple[str, Path], list[Any]] = defaultdict(list)
    for attack, result in ((cell.attack_name, result) for cell in cells for result in cell.results):
        figures = [result.figures[name] for name in PERCENT]
        if None not in figures:
            found[attack, result.attack_path].append(figures)
    return {network: np.mean(rows, 0) for network, rows in found.items()}


def markdown(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown. Names in it may be a stranger's, so signs of its own and of HTML are written out."""
    plain = str.maketrans({"&": "&amp;", "<": "&lt;", "|": "\\|"})
    lines = [[printable(text).translate(plain) for text in line] for line in (head, *body)]
    rows = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([rows[0], "|---" * len(head), "|\n", *rows[1:]])
