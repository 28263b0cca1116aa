"""One self-contained HTML page of all results below a folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sau.data import sources
from sau.data.images import Images
from sau.data.readers import needs_download
from sau.errors import DataError, SauError
from sau.figures import data_url, images, scatter
from sau.record.attack_result import load_images
from sau.record.folder import Record
from sau.report.cells import Section, TableCell, sections
from sau.report.results import NONE, PERCENT, Result, find_results
from sau.report.stats import MeanStd
from sau.report.tables import published, published_rows

HIDDEN = {"identity", "clean_index", "command", "digest", "schema"}  # repeated, long, or shown elsewhere
COLUMNS = 4  # images in a strip


def build(root: Path, dataset: str | None = None, dataset_path: str | None = None) -> tuple[str, list[Section]]:
    """The page and the sections on it.

    Args:
        root: folder of the result folders, at any depth, or a JSONL file of summaries.
        dataset: data set of the folders that do not name theirs.
        dataset_path: folder of the data sets, for clean images; None means where the runs had them.

    Raises RecordError if there is nothing to show.
    """
    results, left_out = find_results(root)
    found = sections(results, dataset)
    parts, count = [], 0
    for section in found:
        rows = [_row(cell, f"c{count + i}", dataset_path) for i, cell in enumerate(section.cells, 1)]
        count += len(rows)
        plot, names = scatter(section) or (None, [])
        parts.append({"section": section, "rows": rows, "scatter": plot and data_url(plot, "svg"), "names": names,
                      "pairs": published_rows(section), **_overview(rows)})  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
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


def _overview(rows: list[dict[str, Any]]) -> Mapping[str, Any]:
    """The table of DER: columns are defenses, rows attacks with a cell or None in each column."""
    shown = [row for row in rows if row["cell"].figures["asr"]]  # a clean network has no DER
    defenses = sorted({row["cell"].name for row in shown}, key=lambda name: (name != NONE, name))
    attacks: dict[str, dict[str, Any]] = {}
    for row in shown:
        attacks.setdefault(row["cell"].attack_name, {})[row["cell"].name] = row
    return {
        "defenses": defenses,
        "grid": [(attack, [own.get(name) for name in defenses]) for attack, own in attacks.items()],
    }


def trigger_strip(result: Result, dataset_path: str | None = None) -> tuple[str, str]:
    """Some test images of an attack, clean and triggered, and the difference, as the URL of an image, and why there
    are none; both are empty for an attack without triggered images.
    """
    if not result.config or not (result.path / "triggered.safetensors").is_file():
        return "", ""
    try:
        record = Record(result.path)
        record.check()
        triggered = load_images(record, "triggered")
        assert triggered is not None
        return data_url(images(_clean_images(result, dataset_path), triggered, COLUMNS), "png"), ""
    except (SauError, KeyError, TypeError, IndexError) as error:
        return "", f"no images: {error}"


def _clean_images(result: Result, dataset_path: str | None) -> Images:
    """The test set that the attack saw; DataError if it is not there, for a report downloads nothing."""
    run, name = result.config["run"], str(result.dataset)
    root = dataset_path or str(run["dataset_path"])
    test = None if needs_download(name, Path(root)) else sources.load(name, root, run.get("img_size"))[1]
    if test is None or sources.fingerprint(test) != result.config["data"].get("test"):
        raise DataError(f"{root} does not hold the {name} test set that the attack saw; give --dataset_path")
    return test
