"""Tables: CSV, LaTeX and JSON from the same rows, published figures beside ours, comparisons with rivals."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from sau.errors import printable
from sau.report.cells import FIGURES, Section, TableCell
from sau.report.results import NONE, PERCENT, UNVERIFIED, Result
from sau.report.stats import PairedComparison, compare

Row = list[float | None]  # acc, asr, racc, der in percent
_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def rows(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """One a cell; of every figure the mean, the values and, for three seeds and more, the standard deviation."""
    return [_row(section, cell) for section in sections for cell in section.cells]


def _row(section: Section, cell: TableCell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dataset": section.dataset, "network": section.network.get("name"), "width": section.network.get("width"),
        "attack": cell.attack, "attack_variant": cell.attack_label, "defense": cell.defense,
        "defense_variant": cell.label, "seeds": len(cell.results),
    }  # fmt: skip
    for name in FIGURES:
        figure = cell.figures[name]
        row[name] = None if figure is None else round(figure.mean, 2)
        row[f"{name}_sd"] = None if figure is None or len(figure.values) < 3 else round(figure.std or 0.0, 2)
        row[f"{name}_values"] = [] if figure is None else [round(value, 2) for value in figure.values]
    defended = cell.defense != NONE
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
    return "\n".join(_tabular(section) for section in sections)


def _tabular(section: Section) -> str:
    head = r"attack & defense & seeds & ACC & ASR & R-ACC & DER & seconds & MB \\"
    lines, last = list[str](), ""
    for cell in section.cells:
        lines += [r"\midrule"] if last not in ("", cell.attack_name) else []
        last = cell.attack_name
        defense = _escape(f"{cell.defense} {cell.label}".strip()) + (r"$^\dagger$" if cell.oracle else "")
        texts = [_escape(last), defense, str(len(cell.results)), *(_latex_figure(cell, name) for name in FIGURES)]
        lines.append(" & ".join(texts) + r" \\")
    note = r"\par\smallskip\footnotesize $\pm$: standard deviation over seeds; of two seeds both values."
    note += r" $^\dagger$: chosen by test data." if any(cell.oracle for cell in section.cells) else ""
    note += f" {_escape(section.dead)}" if section.dead else ""
    parts = [f"% {_escape(section.title)}", r"\begin{tabular}{llrrrrrrr}", r"\toprule", head, r"\midrule", *lines,
             r"\bottomrule", r"\end{tabular}", f"{{{note}\\par}}", ""]  # fmt: skip
    return "\n".join(parts)


def _latex_figure(cell: TableCell, name: str) -> str:
    figure = cell.figures[name]
    if figure is None:
        return "--"
    wrap = {1: r"\textbf{%s}", 2: r"\underline{%s}"}.get(cell.rank if name == "der" else 0, "%s")
    return wrap % _escape(figure.text(2 if name in PERCENT else 0))


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


@cache
def published() -> dict[str, Any]:
    """`published.json`: `names` of attacks, the `setting` that a run must have to be compared, `tables` by defense."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / "published.json").read_text())
    return found


def published_rows(section: Section) -> list[tuple[TableCell, Row]]:
    """Our cells of the published setting, each with its published row; none for other data sets and networks.

    A setting that a folder does not record is taken to be the published one.
    """
    setting, tables = published()["setting"], published()["tables"]
    network = section.network.get("name", setting["name"])
    if (section.dataset, network) != (setting["dataset"], setting["name"]):
        return []
    found = []
    for cell in section.cells:
        row, own = (
            tables.get(cell.defense, {"rows": {}})["rows"].get(cell.attack),
            cell.results[0].attack_settings or {},
        )
        if row is not None and all(own.get(key, value) == value for key, value in setting.items()):
            found.append((cell, row))
    return sorted(found, key=lambda pair: (published()["names"][pair[0].attack], pair[0].defense != NONE))


def comparable(defense: str, oracle: bool) -> bool:
    """Whether a defense is published, and was chosen there as here: by the test sets (`oracle`) or without them."""
    table = published()["tables"].get(defense)
    return table is not None and (table["selection"] == "oracle") == oracle


def mean_row(rows: Sequence[Row]) -> Row:
    """Column by column; None where a row has none."""
    columns = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
    return [statistics.mean(column) if len(column) == len(rows) else None for column in columns]


def paired_comparisons(section: Section, defense: str = "sau") -> list[tuple[str, bool, PairedComparison]]:
    """A defense against each rival, over attacks that took: (rival, whether test data chose for it, comparison).

    The strongest rival comes first, rivals with an oracle last. A defense that test data chose is compared with none.
    """
    found = []
    groups: dict[tuple[str, str], list[TableCell]] = {}
    for cell in section.cells:
        if not cell.dead:
            groups.setdefault((cell.defense, cell.label), []).append(cell)
    for own in groups.values():
        if own[0].defense != defense or own[0].oracle:
            continue
        for rival in groups.values():
            if rival[0].defense not in (defense, NONE) and (comparison := compare(_results(own), _results(rival))):
                shown = max(rival, key=lambda cell: cell.oracle)
                found.append((shown.name, shown.oracle, comparison))
    return sorted(found, key=lambda item: (item[1], item[2].der.mean))


def _results(cells: Sequence[TableCell]) -> list[Result]:
    return [result for cell in cells for result in cell.results]
