"""One self-contained HTML page of all results below a folder."""

import json
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sau.data.readers import needs_download
from sau.errors import DataError, SauError
from sau.figures import data_url, images, scatter
from sau.record import attack_result
from sau.report.cells import Section, TableCell, sections
from sau.report.results import NONE, PERCENT, MeanStd, Result, find_results
from sau.report.tables import published, published_rows

HIDDEN = {"identity", "clean_index", "command", "digest", "schema"}  # repeated, long, or shown elsewhere
COLUMNS = 4  # images in a strip


def build(root: Path, dataset: str | None = None, dataset_path: str | None = None) -> tuple[str, list[Section]]:
    """The page of all results below `root` (see `find_results`), and the sections on it.

    `dataset` is that of the folders that do not name theirs, `dataset_path` the folder of the data sets, for clean
    images; None means where the runs had them. RecordError if there is nothing to show.
    """
    results, left_out = find_results(root)
    found, parts, numbers = sections(results, dataset), [], count(1)
    for section in found:
        rows = [_row(cell, f"c{next(numbers)}", dataset_path) for cell in section.cells]
        plot, names = scatter(section) or (None, [])
        parts.append({"section": section, "rows": rows, "scatter": plot and data_url(plot, "svg"), "names": names,
                      "pairs": published_rows(section), **_overview(rows)})  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["figure"] = _figure
    page = environment.get_template("page.html").render(
        root=root.resolve().name, parts=parts, left_out=left_out, results=results, published=published(),
        undefended=NONE, percent=PERCENT,
    )  # fmt: skip
    return page, found


def _figure(value: float | MeanStd | None, digits: int = 2, sign: bool = False) -> str:
    mean = value.mean if isinstance(value, MeanStd) else value
    return "–" if mean is None else f"{mean:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _row(cell: TableCell, identifier: str, dataset_path: str | None) -> dict[str, Any]:
    """A cell with what its details show: trigger images, settings and commands."""
    config = {key: value for key, value in cell.results[0].config.items() if key not in HIDDEN}
    settings = json.dumps(config, indent=1, ensure_ascii=False) if config else ""
    commands = [f"python {one.config['command']}" for one in cell.results if one.config.get("command")]
    strip = trigger_strip(cell.results[0], dataset_path) if cell.defense == NONE else ("", "")
    return {"id": identifier, "cell": cell, "settings": settings, "commands": commands, "strip": strip}


def _overview(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of DER: columns are defenses, rows attacks with a cell or None in each column."""
    attacks: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["cell"].figures["asr"]):  # a clean network has no DER
        attacks.setdefault(row["cell"].attack_name, {})[row["cell"].name] = row
    defenses = sorted({name for own in attacks.values() for name in own}, key=lambda name: (name != NONE, name))
    grid = [(attack, [own.get(name) for name in defenses]) for attack, own in attacks.items()]
    return {"defenses": defenses, "grid": grid}


def trigger_strip(result: Result, dataset_path: str | None = None) -> tuple[str, str]:
    """Some test images of an attack, clean and triggered, and the difference, as the URL of an image, and why there
    are none; both are empty for an attack without triggered images.
    """
    if not result.config or not (result.path / "triggered.safetensors").is_file():
        return "", ""
    try:
        attacked = attack_result.load(result.path)
        place = dataset_path or attacked.dataset_path
        if needs_download(attacked.dataset, Path(place)):  # a report downloads nothing
            raise DataError(f"no {attacked.dataset} under {place}; give --dataset_path")
        assert attacked.triggered is not None
        return data_url(images(attacked.images(dataset_path)[1], attacked.triggered, COLUMNS), "png"), ""
    except SauError as error:
        return "", f"no images: {error}"
