"""Published summaries: those of finished cells, kept where their records need not be."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sau
from sau.grid.plan import Cell
from sau.grid.store import VERSION, Store, version
from sau.record.summaries import load, save


def publish(store: Store, cells: Sequence[Cell], target: Path) -> tuple[int, list[str]]:
    """Add the summaries of finished cells to the file `target`; returns how many, and what there is to say: of a
    damaged cell the summary that was published before counts, if there is one.

    Each says which version of the library made it: the digests that cells are known by do not.
    """
    earlier = load(target) if target.exists() else {}  # before anything else: it may be another kind of file
    found, notes = dict[str, dict[str, Any]](), []
    for cell in cells:
        over = store.over(cell)
        damage = store.damage(cell) if over == "finished" else ""
        summary = store.summary_published(cell) if damage else store.summary(cell) if over else {}
        if damage:
            notes.append(f"note: {damage}; {'what was published before stays' if summary else 'not published'}")
        elif over == "finished":
            summary = {**summary, VERSION: store.version}
        if summary:
            found[cell.folder] = summary
    if found:
        save(target, {**earlier, **found})
    return len(found), notes


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
