"""The table of the page for other programs: CSV, LaTeX and JSON, all from the same rows."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from sau.errors import printable
from sau.report import parse
from sau.report.read import NONE
from sau.report.table import FIGURES, Cell, Section

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "<": r"\textless{}", ">": r"\textgreater{}",
}  # fmt: skip


def rows(sections: Sequence[Section]) -> list[dict[str, Any]]:
    """One a cell: who, how many seeds, of every figure the mean, the values and of three and more their standard
    deviation, whether the attack took, state, and the folders."""
    return [_row(section, cell) for section in sections for cell in section.cells]


def _row(section: Section, cell: Cell) -> dict[str, Any]:
    row: dict[str, Any] = {
        "dataset": section.dataset, "network": section.network.get("name"), "width": section.network.get("width"),
        "attack": cell.attack, "attack_variant": cell.attack_variant, "defense": cell.defense,
        "defense_variant": cell.variant, "seeds": len(cell.good),
    }  # fmt: skip
    for name in FIGURES:
        spread = cell.figures[name]
        row[name] = None if spread is None else round(spread.mean, 2)
        row[f"{name}_sd"] = None if spread is None or len(spread.values) < 3 else round(spread.sd or 0.0, 2)
        row[f"{name}_values"] = [] if spread is None else [round(value, 2) for value in spread.values]
    defended = bool(cell.good) and cell.defense != NONE
    return {
        **row, "rank": cell.rank or None, "selection": ("oracle" if cell.oracle else "defender") if defended else None,
        "data": ("poisoned" if cell.poisoned else "clean") if defended else None,
        "did_not_take": cell.dead or None,
        "status": cell.status, "reason": cell.reason, "folders": [run.name for run in cell.runs],
    }  # fmt: skip


def as_json(sections: Sequence[Section]) -> str:
    """A list of objects."""
    return json.dumps(rows(sections), indent=2, ensure_ascii=False) + "\n"


def as_csv(sections: Sequence[Section]) -> str:
    """A line a cell; a text that a spreadsheet would take for a formula gets an apostrophe in front, and what cannot be
    printed an escape, for a carriage return would end the line for some."""
    found = rows(sections)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(found[0])
    for row in found:
        writer.writerow(
            [_plain(" ".join(map(str, value)) if isinstance(value, list) else value) for value in row.values()]
        )
    return out.getvalue()


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return ("'" if value.lstrip().startswith(("=", "+", "-", "@")) else "") + printable(value)


def as_latex(sections: Sequence[Section]) -> str:
    """A booktabs table each section: means as `Spread.text` gives them, the best DER bold, the second underlined.

    Below it, as text, what the signs mean.
    """
    return "\n".join(_tabular(section) for section in sections)


def _tabular(section: Section) -> str:
    head = r"attack & defense & seeds & ACC & ASR & R-ACC & DER & seconds & MB \\"
    lines, last = [], None
    for cell in section.cells:
        names = [cell.attack_name, f"{cell.defense} {cell.variant}".strip()]
        if last not in (None, names[0]):
            lines.append(r"\midrule")
        last = names[0]
        texts = [_escape(text) for text in (*names, str(len(cell.good) or cell.status))]
        texts[1] += r"$^\dagger$" if cell.oracle else ""
        texts += [_figure(cell, name) for name in FIGURES]
        lines.append(" & ".join(texts) + r" \\")
    note = r"\par\smallskip\footnotesize $\pm$: standard deviation over seeds; of two seeds both values."
    note += r" $^\dagger$: chosen by test data." if any(cell.oracle for cell in section.cells) else ""
    note += f" {_escape(section.dead)}" if section.dead else ""
    parts = [f"% {_escape(section.title)}", r"\begin{tabular}{llrrrrrrr}", r"\toprule", head, r"\midrule", *lines,
             r"\bottomrule", r"\end{tabular}", f"{{{note}\\par}}", ""]  # fmt: skip
    return "\n".join(parts)


def _figure(cell: Cell, name: str) -> str:
    spread = cell.figures[name]
    if spread is None:
        return "--"
    text = _escape(spread.text(2 if name in parse.PERCENT else 0))
    wrap = {1: r"\textbf{%s}", 2: r"\underline{%s}"}.get(cell.rank if name == "der" else 0, "%s")
    return wrap % text


def _escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))
