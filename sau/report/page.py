"""Self-contained HTML pages: of all results below a folder, and of one purified network of somebody's own."""

import json
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sau.defense import checks
from sau.defense.nc import anomaly
from sau.errors import RecordError, SauError
from sau.evaluate import Proportion
from sau.figures import data_url, images, scatter
from sau.record import attack_result
from sau.record.folder import OWN, Record, run_kind
from sau.report.cells import Section, TableCell, sections
from sau.report.results import NONE, PERCENT, MeanStd, Result, find_results
from sau.report.tables import published, published_rows

HIDDEN = {"identity", "clean_index", "command", "digest", "schema"}  # repeated, long, or shown elsewhere
COLUMNS = 4  # images in a strip
OWN_FIGURES = {
    "acc": "classified correctly", "r_share_sau": "R_share, by SAU's search", "r_share": "R_share, by every search",
    "r_adv": "R_adv",
}  # fmt: skip


def build(root: Path, dataset: str | None = None, dataset_path: str | None = None) -> tuple[str, list[Section]]:
    """The page of all results below `root` (see `find_results`), and the sections on it; RecordError if there is
    nothing to show. `dataset` is that of folders that do not name theirs, `dataset_path` the folder of the data sets,
    for clean images; None means where the runs had them."""
    results, left_out = find_results(root)
    found, parts, numbers = sections(results, dataset), [], count(1)
    for section in found:
        rows = [_row(cell, f"c{next(numbers)}", dataset_path) for cell in section.cells]
        plot, names = scatter(section) or (None, [])
        parts.append({"section": section, "rows": rows, "scatter": plot and data_url(plot, "svg"), "names": names,
                      "pairs": published_rows(section), **_overview(rows)})  # fmt: skip
    page = _environment().get_template("page.html").render(
        root=root.resolve().name, parts=parts, left_out=left_out, results=results, published=published(),
        undefended=NONE, percent=PERCENT,
    )  # fmt: skip
    return page, found


def _environment() -> Environment:
    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters["figure"] = _figure
    return made


def build_own(folder: Path, beside: Sequence[Path] = ()) -> str:
    """The page of a purified network of somebody's own: what was measured of it, and what cannot be excluded. `beside`
    are such folders of networks that are known to be clean: what they were before shows what is usual. RecordError for
    others."""
    config, summary = _own(folder)
    risk, verdict = summary["risk"], summary.get("findings", {}).get("verdict")
    anew = summary.get("statistics_anew", {})
    parts = {"before": (summary["before"], risk["before"]), "after": (summary["after"], risk["after"])}
    parts |= {"statistics anew": (anew, anew["risk"])} if anew else {}
    for other in beside:
        theirs = _own(other)[1]
        parts[f"{other}, before"] = theirs["before"], theirs["risk"]["before"]
    columns = [{**scores, **risks} for scores, risks in parts.values()]
    lines = [(what, [Proportion(*each[f"{name}_count"]) for each in columns]) for name, what in OWN_FIGURES.items()]
    patches = list[tuple[str, float | None, float]]()
    if verdict:
        names = [config["model"]["class_names"][int(name)] for name in verdict["sizes"]]
        sizes, whole = verdict["sizes"].values(), float(config["own"]["input_size"] ** 2)  # no patch is larger
        index = anomaly(torch.tensor([whole if size is None else size for size in sizes])).tolist()
        patches = sorted(zip(names, sizes, index, strict=True), key=lambda row: -row[2])
    return _environment().get_template("own.html").render(
        name=folder.resolve().name, config=config, columns=list(parts), lines=lines, search=risk["search"],
        verdict=verdict, said=verdict and checks.lines(verdict), patches=patches,
        command=rerun_command(config["command"]),
    )  # fmt: skip


def _own(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and summary of a checked folder."""
    record = Record(folder)
    if run_kind(config := record.check()) != OWN:
        raise RecordError(f"{folder} is the folder of {run_kind(config)}, allowed is that of {OWN}")
    return config, record.summary()


def _figure(value: float | MeanStd | None, digits: int = 2, sign: bool = False) -> str:
    mean = value.mean if isinstance(value, MeanStd) else value
    return "–" if mean is None else f"{mean:{'+' if sign else ''},.{digits}f}".replace("-", "−")


def _row(cell: TableCell, identifier: str, dataset_path: str | None) -> dict[str, Any]:
    """A cell with what its details show: trigger images, settings and commands."""
    config = {key: value for key, value in cell.results[0].config.items() if key not in HIDDEN}
    settings = json.dumps(config, indent=1, ensure_ascii=False) if config else ""
    commands = [rerun_command(one.config["command"]) for one in cell.results if one.config.get("command")]
    strip = trigger_strip(cell.results[0], dataset_path)
    return {"id": identifier, "cell": cell, "settings": settings, "commands": commands, "strip": strip}


def rerun_command(recorded: str) -> str:
    """The command that repeats a run, from `command` of its configuration, which does not name Python."""
    program, _, flags = recorded.partition(" ")
    if Path(program).name in ("sau", "__main__.py"):  # of the package, which is no script
        return f"python -m sau {flags}"
    return f"python {recorded}"


def _overview(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The table of DER: columns are defenses, rows attacks with a cell or None in each column."""
    attacks: dict[str, dict[str, Any]] = {}
    for row in (row for row in rows if row["cell"].figures["asr"]):  # a clean network has no DER
        attacks.setdefault(row["cell"].attack_name, {})[row["cell"].name] = row
    defenses = sorted({name for own in attacks.values() for name in own}, key=lambda name: (name != NONE, name))
    grid = [(attack, [own.get(name) for name in defenses]) for attack, own in attacks.items()]
    return {"defenses": defenses, "grid": grid}


def trigger_strip(result: Result, dataset_path: str | None) -> tuple[str, str]:
    """Some test images of an attack, clean and triggered, and their difference, as the URL of an image, or why there
    are none; both texts are empty for a folder without triggered images, like that of a defense."""
    if not result.config or not (result.path / "triggered.safetensors").is_file():
        return "", ""
    try:
        attacked = attack_result.load(result.path)
        assert attacked.triggered is not None
        _, test, _ = attacked.images(dataset_path, download=False)
        return data_url(images(test, attacked.triggered, COLUMNS), "png"), ""
    except SauError as error:
        return "", f"no images: {error}"
