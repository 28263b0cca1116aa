"""One self-contained HTML page from the result folders below a root."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sau.report import parse, scatter
from sau.report.pictures import Pictures, Strip
from sau.report.published import Pair, compare, published
from sau.report.read import NONE, Run, read
from sau.report.scatter import Scatter, scatters
from sau.report.spread import Spread
from sau.report.table import Cell, Section, sections

LINES = 200  # of settings that are shown; a stranger's file may hold any number
HIDDEN = {"identity", "clean_index", "command", "digest", "schema"}  # repeated, long, or shown elsewhere


@dataclass(frozen=True)
class View:
    """A cell as it is shown.

    Args:
        id: of its row.
        cell: the cell.
        strip: number of the trigger images of its attack; None if there are none.
        settings: the resolved configuration of its first run, a line each.
        commands: what makes its runs.
    """

    id: str
    cell: Cell
    strip: int | None
    settings: list[str]
    commands: list[str]


@dataclass(frozen=True)
class Part:
    """A section as it is shown.

    Args:
        section: the section.
        views: its cells.
        scatters: ACC against ASR.
        defenses: columns of the overview.
        grid: rows of the overview: an attack, and the cell under each column; None where nothing was run.
        pairs: published cells beside ours.
    """

    section: Section
    views: list[View]
    scatters: list[Scatter]
    defenses: list[str]
    grid: list[tuple[str, list[View | None]]]
    pairs: list[Pair]


def build(root: Path, dataset: str | None = None, dataset_path: str | None = None) -> tuple[str, list[Section]]:
    """The page, and the table in it.

    Args:
        root: folder of the result folders, at any depth.
        dataset: data set of the folders that do not say theirs.
        dataset_path: folder of the data sets, for the clean images; None means where the runs had them.

    Raises RecordError if there is nothing to show.
    """
    runs, others = read(root)
    found = sections(runs, dataset)
    pictures = Pictures(dataset_path)
    strips: list[Strip] = []
    parts: list[Part] = []
    for section in found:
        first = 1 + sum(len(part.views) for part in parts)
        parts.append(_part(section, list(_views(section, pictures, strips, first))))
    states = [cell.status for section in found for cell in section.cells]
    text = _environment().get_template("page.html").render(
        root=root.resolve().name, parts=parts, strips=strips, others=others, runs=runs, published=published(),
        counts={state: states.count(state) for state in sorted(set(states))}, box=scatter, undefended=NONE,
        percent=parse.PERCENT,
    )  # fmt: skip
    return text, found


def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["figure"] = _figure
    return made


def _figure(value: float | Spread | None, digits: int = 2, sign: bool = False) -> str:
    mean = value.mean if isinstance(value, Spread) else value
    if mean is None:
        return "–"
    return f"{mean:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _views(section: Section, pictures: Pictures, strips: list[Strip], first: int) -> Iterator[View]:
    """Number the cells and draw what they have; an attack's images are drawn once, from its first good run."""
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
        commands = [f"python {run.config['command']}" for run in cell.runs if run.config.get("command")]
        yield View(f"c{number}", cell, drawn[attack], settings, list(dict.fromkeys(commands)))


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


def _part(section: Section, views: list[View]) -> Part:
    shown = [view for view in views if view.cell.figures["asr"] or not view.cell.good]  # a clean network has no DER
    defenses = sorted({view.cell.name for view in shown}, key=lambda name: (name != NONE, name))
    attacks: dict[str, dict[str, View]] = {}
    for view in shown:
        attacks.setdefault(view.cell.attack_name, {})[view.cell.name] = view
    grid = [(attack, [own.get(defense) for defense in defenses]) for attack, own in attacks.items()]
    return Part(section, views, scatters(section), defenses, grid, compare(section))
