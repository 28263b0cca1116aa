"""One self-contained HTML page from the result folders below a root."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sau.report import parse
from sau.report.curves import HEIGHT, LEFT, PERCENT_TICKS, WIDTH, Chart, charts
from sau.report.paired import Duel, duels
from sau.report.pictures import Pictures, Strip
from sau.report.published import Pair, compare, published
from sau.report.read import NONE, Run, read
from sau.report.spread import Spread
from sau.report.table import MISSING, Cell, Section, sections

LINES = 200  # of settings that are shown; a stranger's file may hold any number
HIDDEN = {"identity", "clean_index", "command", "digest", "schema"}  # repeated, long, or shown elsewhere


@dataclass(frozen=True)
class View:
    """A cell as it is shown.

    Args:
        id: of its row.
        cell: the cell.
        charts: its curves.
        strip: number of the trigger pictures of its attack; None if there are none.
        settings: the resolved configuration of its first run, a line each.
        commands: what makes its runs, or would.
    """

    id: str
    cell: Cell
    charts: list[Chart]
    strip: int | None
    settings: list[str]
    commands: list[str]


@dataclass(frozen=True)
class Part:
    """A section as it is shown.

    Args:
        section: the section.
        views: its cells.
        defenses: columns of the overview, (name, variant).
        grid: rows of the overview: an attack, and the cell under each column.
        pairs: published cells beside ours.
        duels: SAU against each rival.
    """

    section: Section
    views: list[View]
    defenses: list[tuple[str, str]]
    grid: list[tuple[str, list[View | None]]]
    pairs: list[Pair]
    duels: list[Duel]


def build(root: Path, dataset: str | None = None, dataset_path: str | None = None) -> tuple[str, list[Section]]:
    """The page, and the table in it.

    Args:
        root: folder of the result folders.
        dataset: data set of the folders that do not say theirs.
        dataset_path: folder of the data sets, for the clean pictures; None means where the runs had them.

    Raises RecordError if there is nothing to show.
    """
    runs, others = read(root)
    found = sections(runs, dataset)
    pictures = Pictures(dataset_path)
    strips: list[Strip] = []
    parts: list[Part] = []
    for section in found:
        first = 1 + sum(len(part.views) for part in parts)
        parts.append(_part(section, list(_views(section, root, pictures, strips, first))))
    text = _environment().get_template("page.html").render(
        root=root.resolve().name, parts=parts, strips=strips, others=others, runs=runs, published=published(),
        counts=_counts([cell.status for section in found for cell in section.cells]), width=WIDTH, height=HEIGHT,
        left=LEFT, ticks=PERCENT_TICKS,
        undefended=NONE, percent=parse.PERCENT,
    )  # fmt: skip
    return text, found


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).parent)
    made = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )  # fmt: skip
    made.filters["figure"] = _figure
    return made


def _figure(value: float | Spread | None, digits: int = 2, sign: bool = False) -> str:
    mean = value.mean if isinstance(value, Spread) else value
    if mean is None:
        return "–"
    return f"{mean:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _counts(states: Sequence[str]) -> dict[str, int]:
    return {state: states.count(state) for state in sorted(set(states))}


def _views(
    section: Section, root: Path, pictures: Pictures, strips: list[Strip], first: int
) -> Iterator[View]:  # fmt: skip
    """Number the cells and draw what they have; an attack's pictures are drawn once, from its first good run."""
    drawn: dict[tuple[str, str], int | None] = {}
    sources = {(cell.attack, cell.attack_variant): cell.good for cell in section.cells if cell.defense == NONE}
    for number, cell in enumerate(section.cells, first):
        attack = (cell.attack, cell.attack_variant)
        if attack not in drawn:
            runs = sources.get(attack, [])
            strip = pictures.strip(runs[0]) if runs else Strip("")
            drawn[attack] = len(strips) if strip.data or strip.note else None
            strips += [strip] if drawn[attack] is not None else []
        settings = [line for run in cell.runs[:1] for line in _flat(_shown(run), "", LINES)]
        yield View(f"c{number}", cell, charts(cell), drawn[attack], settings,
                   _commands(cell, sources.get(attack, []), root))  # fmt: skip


def _shown(run: Run) -> dict[str, Any]:
    return {str(key): value for key, value in run.config.items() if key not in HIDDEN}


def _flat(value: Any, name: str, left: int) -> list[str]:
    """`a.b: value`, a line each, at most `left` of them."""
    if not isinstance(value, dict) or not value:
        return [f"{name}: {value if isinstance(value, list) and len(value) <= 16 else str(value)[:300]}"[:400]]
    lines: list[str] = []
    for key, inner in value.items():
        if len(lines) >= left:
            return [*lines[:left], "…"]
        lines += _flat(inner, f"{name}.{key}" if name else str(key), left - len(lines))
    return lines


def _commands(cell: Cell, attacked: Sequence[Run], root: Path) -> list[str]:
    if cell.status != MISSING:
        return list(dict.fromkeys(f"python {run.config['command']}" for run in cell.runs if run.config.get("command")))
    script, where = shlex.quote(f"defense/{cell.defense}.py"), shlex.quote(str(root))
    names = [shlex.quote(run.path.name) for run in attacked]
    return [f"python {script} --result_file {name} --record_root {where}" for name in names]


def _part(section: Section, views: list[View]) -> Part:
    columns = sorted(
        {(view.cell.defense, view.cell.variant) for view in views}, key=lambda pair: (pair[0] != NONE, pair)
    )
    if any(variant for name, variant in columns):  # cells that were not run have no variant: no column of their own
        kept = {(view.cell.defense, view.cell.variant) for view in views if view.cell.status != MISSING}
        columns = [column for column in columns if column in kept]
    at = {(view.cell.attack, view.cell.attack_variant, view.cell.defense, view.cell.variant): view for view in views}
    attacks = dict.fromkeys((view.cell.attack, view.cell.attack_variant) for view in views)
    missing = {key[:3]: view for key, view in at.items() if view.cell.status == MISSING}
    grid = [
        (
            " ".join(filter(None, attack)),
            [at.get((*attack, *column)) or missing.get((*attack, column[0])) for column in columns],
        )
        for attack in attacks
    ]
    return Part(section, views, columns, grid, compare(section), duels(section))
