"""A grid under fire: cells killed, one that always fails, one that hangs, the driver killed; and what a grid costs.

    python scripts/grid_drill.py WORK --engine local|ray     exit status 0 if nothing was lost or repeated
    python scripts/grid_drill.py WORK --overhead --epochs 40       four cells by hand, the same by the grid, and so on

The drill runs configs/grid/digits.yaml undisturbed into WORK/reference (once), then with the engine into WORK/<engine>
while a tenth of its cells is killed at random moments (with ray of the second one the worker that
runs it), one cell is frozen whenever it starts, one more has a learning rate that no network survives, and the driver
is killed when a third is done; then it repeats the command, and compares.
The overhead is the ratio of two times, of `--repeats` pairs: its median, the least and the most. Since the
cells themselves take a few per cent more or less from run to run, what is added outside of them has a line of its own.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from script_parts.asking import Parser

from sau.errors import ConfigError, RecordError, told
from sau.grid.plan import Cell, cells
from sau.grid.spec import read
from sau.grid.store import Store
from sau.record import schema
from sau.record.folder import CONFIG
from sau.report.parse import COST

HERE = Path(__file__).resolve().parents[1]
HUNG = "blended_r0.1_s1/defense/ft_c0.1"


def grid(file: Path, root: Path, *flags: str) -> list[str]:
    """The command line of a grid."""
    return [sys.executable, str(HERE / "scripts" / "grid.py"), str(file), "--record_root", str(root), *flags]


def emptied(root: Path) -> None:
    """Take away what an earlier call left; ConfigError for what is no grid's or record's folder."""
    inside = [*root.iterdir()] if root.is_dir() else [root] if root.exists() else []
    if inside and not (root / ".grid").is_dir() and not any(map(_ours, inside)):
        raise ConfigError(f"{root} is no folder of an earlier drill; name another WORK, or take it away")
    shutil.rmtree(root, ignore_errors=True)


def _ours(place: Path) -> bool:
    """Whether a record was begun there."""
    with suppress(RecordError):
        return bool(schema.configuration(place / CONFIG, light=True))
    return False


def results(store: Store, every: Sequence[Cell]) -> dict[str, str]:
    """SHA-256 over the tensors and the scores of each finished cell, by label."""
    found = {}
    for cell in every:
        if store.over(cell) == "finished":
            seal = hashlib.sha256()
            for file in sorted(store.folder(cell).glob("*.safetensors")):
                seal.update(file.name.encode() + file.read_bytes())
            summary = {name: value for name, value in store.summary(cell).items() if name not in COST}
            seal.update(json.dumps(summary, sort_keys=True).encode())
            found[cell.label] = seal.hexdigest()
    return found


def runs(store: Store, every: Sequence[Cell]) -> dict[str, int]:
    """How often each finished cell was begun: every run says its recipe."""
    done = [cell for cell in every if store.over(cell) == "finished"]
    logs = {cell.label: (store.folder(cell) / "log.txt").read_text().splitlines() for cell in done}
    return {label: sum(line.startswith("recipe ") for line in lines) for label, lines in logs.items()}


class Fire:
    """Kills and freezes cells of a running grid, whose processes `ps` lists.

    Args:
        store: where the grid runs.
        every: its cells.
        seed: of who is killed, and when.
        workers: whether cells have workers of their engine above them; that of the second one is killed in its place.
    """

    def __init__(self, store: Store, every: Sequence[Cell], seed: int, workers: bool) -> None:
        self.store, self.draw, self.workers = store, random.Random(seed), workers
        self.healthy = [cell for cell in every if cell.label != HUNG]
        self.hung = next(cell for cell in every if cell.label == HUNG)
        self.blows, self.next = -(-len(every) // 10), time.monotonic() + self.draw.uniform(0.5, 6.0)
        self.killed: list[str] = []

    def look(self) -> None:
        """Strike where it is time; no cell twice, for it is tried twice."""
        if len(self.killed) < self.blows and time.monotonic() > self.next:
            left = [cell for cell in self.healthy if cell.label not in self.killed]
            running = [(cell, pid) for cell in left if (pid := _worker(self.store.folder(cell)))]
            if running:
                cell, worker = self.draw.choice(running)
                above = self.workers and len(self.killed) == 1
                if pid := _parent(worker) if above else worker:
                    _signal(pid, signal.SIGKILL)
                    self.killed.append(cell.label)
                    print(f"killed {'what runs ' if above else ''}{cell.label}", flush=True)
                self.next = time.monotonic() + self.draw.uniform(0.5, 6.0)
        if worker := _worker(self.store.folder(self.hung)):
            _signal(worker, signal.SIGSTOP)


def _worker(folder: Path) -> int | None:
    """The process that runs the cell `folder`; None if none does."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    lines = [line.split() for line in listed.splitlines()]
    return next((int(line[0]) for line in lines if "sau.grid.work" in line and str(folder) in line), None)


def _parent(pid: int) -> int | None:
    """Who started a cell's process, which its command names; None once somebody else has it as an orphan."""
    asked = ["ps", "-o", "ppid=,args=", "-p", str(pid)]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    return int(said[0]) if said and said[0] in said[1:] else None


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it ended between the look and the blow
        os.kill(pid, number)


def disturbed(argv: list[str], store: Store, every: Sequence[Cell], fire: Fire) -> set[str]:
    """Run a grid under fire, kill its driver once; the cells that were finished at that moment."""
    early = set[str]()
    for driver_dies in (True, False):
        with subprocess.Popen(argv, start_new_session=True) as driver:
            while driver.poll() is None:
                fire.look()
                done = {cell.label for cell in every if store.over(cell)}
                if driver_dies and len(done) >= len(every) // 3:
                    driver.kill()
                    driver.wait()
                    early = done
                    print("driver killed", flush=True)
                time.sleep(0.1)
        if not driver_dies and driver.returncode != 1:
            raise SystemExit(f"the grid left with {driver.returncode}, but two of its cells cannot finish")
    return early


def drill(work: Path, engine: str, seed: int, cell_timeout: float) -> list[str]:
    """The whole drill; what went wrong."""
    base = HERE / "configs" / "grid" / "digits.yaml"
    every = cells(read(base)[1])
    with_failure = work / "drill.yaml"
    with_failure.write_text(
        f"include: {base}\nblocks:\n  - {{}}\n"
        "  - {attacks: [badnet], seeds: [0], defenses: [ft], overrides: {ft: {lr: 1.0e+30}}}\n"
    )
    reference = Store(work / "reference")
    subprocess.run(grid(base, reference.root), check=True)
    store = Store(work / engine)
    emptied(store.root)
    more: list[str] = []
    limits = ("--cell_timeout", str(cell_timeout), "--retries", "1")
    argv = grid(with_failure, store.root, "--engine", engine, *limits, *more)
    fire = Fire(store, every, seed, workers=engine != "local")
    early = disturbed(argv, store, every, fire)
    wanted = {label: seal for label, seal in results(reference, every).items() if label != HUNG}
    got, counts = results(store, every), runs(store, every)
    wrong = [f"{label} differs or is missing" for label, seal in wanted.items() if got.get(label) != seal]
    wrong += [] if len(fire.killed) == fire.blows else [f"only {len(fire.killed)} cells were killed"]
    most = {label: 1 + (label in fire.killed) for label in early}
    wrong += [f"{label} was begun {counts[label]} times" for label in early if counts[label] > most[label]]
    states = {cell.label: state for cell, state in zip(every, store.states(every).values(), strict=True)}
    wrong += [] if "no end after" in states[HUNG].reason else [f"{HUNG} should have failed by its time: {states[HUNG]}"]
    reasons = [state.reason for state in store.states(cells(read(with_failure)[1])).values()]
    wrong += [] if sum("nan" in reason for reason in reasons) == 1 else ["the cell that cannot work has no reason"]
    third = subprocess.run(argv, check=False, capture_output=True, text=True)
    wrong += [] if ", 0 to run (" in third.stdout else [f"a third call had work to do: {third.stdout}{third.stderr}"]
    wrong += [] if runs(store, every) == counts else ["a third call began finished cells again"]
    return wrong


def overhead(work: Path, epochs: int, repeats: int) -> None:
    """Seconds of the same four cells by hand and by the grid with one slot, in turns, for a machine's speed drifts."""
    base, file = HERE / "configs" / "grid" / "digits.yaml", work / "overhead.yaml"
    file.write_text(
        f"include: {base}\nattacks: [badnet, blended]\ndefenses: [ft]\nseeds: [0]\n"
        f"overrides: {{attack: {{epochs: {epochs}}}, ft: {{epochs: {20 * epochs}}}}}\n"
    )
    every, ratios, added = cells(read(file)[1]), list[float](), list[float]()
    for number in range(1, repeats + 1):
        hand, alone = timed("hand", file, every, work / "overhead_hand")
        by_grid, driven = timed("grid", file, every, work / "overhead_grid")
        ratios.append(by_grid / hand)
        added.append((by_grid - driven - hand + alone) / hand)
        both = f"{hand:.1f} s by hand, {alone:.1f} in the runs; {by_grid:.1f} s by the grid, {driven:.1f} in the runs"
        print(f"{number}/{repeats}: {len(every)} cells of {hand / len(every):.1f} s: {both}", flush=True)
    print(f"grid / hand: median {median(ratios):.3f}, least {min(ratios):.3f}, most {max(ratios):.3f}")
    print(f"added outside the runs: median {median(added):.2%}, least {min(added):.2%}, most {max(added):.2%}")


def timed(way: str, file: Path, every: Sequence[Cell], root: Path) -> tuple[float, float]:
    """Seconds of the cells, one at a time, into an empty folder, by hand or by the grid; and of their runs alone."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    emptied(root)
    started = time.monotonic()
    if way == "grid":
        subprocess.run(grid(file, root, "--cores", "1"), check=True, env=env)
    for cell in every if way == "hand" else ():
        script = [sys.executable, str(HERE / cell.kind / f"{cell.name}.py"), *cell.flags, f"--record_root={root}"]
        subprocess.run(script, check=True, env=env, stdout=subprocess.DEVNULL)
    ended = time.monotonic()
    store = Store(root)
    return ended - started, sum(store.summary(cell)["seconds"] for cell in every)


def main() -> int:
    """The drill or the measurement."""
    parser = Parser(__doc__)
    parser.add_argument("work", type=Path, help="folder for the runs")
    parser.add_argument("--engine", choices=("local", "ray"), help="what runs the cells [local]")
    parser.add_argument("--seed", type=int, help="of who is killed, and when [0]")
    parser.add_argument("--cell_timeout", type=float, help="seconds; ten times what a cell takes [60]")
    parser.add_argument("--overhead", action="store_true", help="measure what the grid costs")
    parser.add_argument("--epochs", type=int, help="of the attacks whose cost is measured [40]")
    parser.add_argument("--repeats", type=int, help="pairs of times of the measurement [3]")
    asked = parser.parse_args()
    settings: dict[str, Any] = {"epochs": 40, "repeats": 3}
    others: dict[str, Any] = {"engine": "local", "seed": 0, "cell_timeout": 60.0}
    if not asked.overhead:
        settings, others = others, settings
    for name in others:
        if getattr(asked, name) is not None:
            parser.error(f"--{name} has no effect {'with' if asked.overhead else 'without'} --overhead; leave it out")
    settings |= {name: getattr(asked, name) for name in settings if getattr(asked, name) is not None}
    for name in settings.keys() & {"epochs", "repeats", "cell_timeout"}:
        if not 0 < settings[name] < math.inf:
            parser.error(f"--{name} is {settings[name]}, allowed is above 0")
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.overhead:
        overhead(asked.work.absolute(), **settings)
        return 0
    wrong = drill(asked.work.absolute(), **settings)
    print("\n".join(wrong) or "nothing lost, nothing repeated, every result as undisturbed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(told(main))
