"""Where a grid stands, from the disk alone."""

from collections.abc import Sequence

from sau.grid.plan import Cell
from sau.grid.runner import needed
from sau.grid.store import Store


def status(cells: Sequence[Cell], store: Store) -> list[str]:
    """Counts, what runs, what failed and why, and what is left to do."""
    states = store.states(cells)
    names = ("finished", "published", "running", "waiting", "failed", "blocked")
    counts = {name: sum(state.name == name for state in states.values()) for name in names}
    lines = [f"{len(cells)} cells: " + ", ".join(f"{count} {name}" for name, count in counts.items() if count)]
    running = [cell for cell in cells if states[cell.digest].name == "running"]
    lines += [f"running {cell.label}" for cell in running]
    for cell in cells:
        state = states[cell.digest]
        if state.reason and state.name != "blocked":  # a published attack whose weights could not be made again, too
            lines.append(f"failed  {cell.label}: {state.reason}; see {store.errors(cell)}")
    todo = needed(cells, store, retry_failed=False)
    if todo:
        lines.append(f"left: {len(todo)} cells")
    return lines
