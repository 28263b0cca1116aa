"""What is known of runs that did not come to their end: how far they came, and why a grid gave them up."""

from pathlib import Path

from sau import files
from sau.errors import one_line
from sau.record.folder import LOG, METRICS
from sau.report import parse


def progress(folder: Path) -> str:
    """How far an unfinished run came, by its rows and the last line of its log."""
    rows = parse.rows(folder / METRICS)
    log = folder / LOG
    try:  # a link could lead to any file, whose last line would stand in a report
        last = [] if log.is_symlink() else files.read(log).decode(errors="replace").splitlines()[-1:]
    except OSError:
        last = []
    far = f"; it reached epoch {rows[-1]['epoch']:g}" if rows else "; no epoch is done"
    return far + "".join(f"; last in its log: {one_line(line)[:200]}" for line in last)


def given_up(root: Path) -> dict[str, str]:
    """What the grid whose folder `root` is says of cells that failed for good, by their folders below it."""
    found: dict[str, str] = {}
    for file in sorted((root / ".grid" / "failed").glob("*")):
        try:
            said = parse.mapping(files.parse_json(files.read(file)))
        except (OSError, ValueError):
            continue  # half a file of a grid that was killed; the folder, if there is one, says how far it came
        reason, tries = one_line(str(said.get("reason")))[:300], one_line(str(said.get("tries")))[:20]
        found[file.name.replace("__", "/")] = f"the grid gave it up after {tries} tries: {reason}"
    return found
