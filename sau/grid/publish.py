"""Published summaries: those of finished cells, kept where their records need not be."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import sau
from sau.files import write
from sau.grid.plan import Cell
from sau.grid.store import VERSION, Store, version
from sau.record.folder import SUMMARY


def publish(store: Store, cells: Sequence[Cell], target: Path) -> tuple[int, list[str]]:
    """Copy the summaries of finished cells to the same names below `target`; returns how many, and what there is to
    say: of a damaged cell the summary that was published before counts, if there is one.

    Each says which version of the library made it: the digests that cells are known by do not.
    """
    count, notes = 0, []
    for cell in cells:
        over = store.over(cell)
        damage = store.damage(cell) if over == "finished" else ""
        summary = store.summary_published(cell) if damage else store.summary(cell) if over else {}
        if damage:
            notes.append(f"note: {damage}; {'what was published before stays' if summary else 'not published'}")
        elif over == "finished":
            summary = {**summary, VERSION: store.version}
        if summary:
            write(target / cell.folder / SUMMARY, (json.dumps(summary, indent=2) + "\n").encode())
            count += 1
    return count, notes


def of_others(store: Store, cells: Sequence[Cell]) -> list[str]:
    """What to say of cells that count as finished though another version of the library made them."""
    summaries = (store.summary(cell) for cell in cells if store.over(cell) == "published")
    made = Counter(map(version, summaries))
    return [
        f"note: {count} published summaries are of sau {name}, this is {sau.__version__}; --published none leaves "
        "them out"
        for name, count in made.items()
        if name != sau.__version__
    ]


def differs(store: Store, cell: Cell) -> bool:
    """Whether a finished cell's scores are not those that were published of it."""
    published = store.summary_published(cell)
    own = store.summary(cell) if published else {}
    return any(published.get(name) != own.get(name) for name in ("acc", "asr", "racc"))
