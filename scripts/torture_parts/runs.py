"""Faults that need whole runs of every attack and defense: kills, repetitions, triggered pictures made noise."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torture_parts.common import METHODS, Row, arguments, forked, result, run, tensors, whole

from sau.defense import DEFENSES
from sau.record import schema
from sau.record.folder import MANIFEST

KILLS = 10  # of each method


def victim(root: Path, cache: Path) -> Path:
    """An attack to purify, as `root/victim`."""
    whole(arguments("attack", "badnet", root), cache)
    (root / "badnet").rename(root / "victim")
    return root / "victim"


def _with_victim(root: Path, attacked: Path) -> Path:
    shutil.copytree(attacked, root / "victim")
    return root


def repeats(folder: Path, seed: int, share: float) -> list[Row]:
    """Every method twice."""
    attacked = victim(folder / "first", folder / "cache")
    differ = []
    for kind, name in METHODS:
        found = []
        for turn in ("a", "b"):
            root = _with_victim(folder / f"{name} {turn}", attacked)
            whole(arguments(kind, name, root, seed), root / "cache")  # a cache of its own: triggers are made twice
            found.append(tensors(result(kind, name, root)))
        if found[0] != found[1] or not found[0]:
            differ.append(name)
    return [Row("G2", "the same seed again", len(METHODS), len(METHODS) - len(differ), f"differ: {differ or 'none'}")]


def leaks(folder: Path, seed: int, share: float) -> list[Row]:
    """Every defense with the triggered test set, and with noise in its place."""
    attacked = victim(folder / "first", folder / "cache")
    noisy = Path(shutil.copytree(attacked, folder / "noisy"))
    content = load_file(noisy / "triggered.safetensors")
    content["pixels"] = torch.randint(0, 256, content["pixels"].shape, dtype=torch.uint8)
    content["labels"] = content["labels"].flip(0)
    save_file(content, noisy / "triggered.safetensors")
    kept = [file for file in sorted(noisy.iterdir()) if file.is_file() and file.name != MANIFEST]
    (noisy / MANIFEST).write_bytes(schema.manifest(kept))
    differ = []
    for name in DEFENSES:
        found = []
        for which in (attacked, noisy):
            root = _with_victim(folder / f"{name} {which.name}", which)
            whole(arguments("defense", name, root, seed), folder / "cache")
            found.append(tensors(result("defense", name, root)))
        if found[0] != found[1] or not found[0]:
            differ.append(name)
    return [Row("E2", "noise for triggers", len(DEFENSES), len(DEFENSES) - len(differ), f"differ: {differ or 'none'}")]


def kills(folder: Path, seed: int, share: float) -> Iterator[Row]:
    """SIGKILL at random moments and inside writes, again and again, then to the end."""
    attacked, count = victim(folder / "first", folder / "cache"), max(1, round(KILLS * share))
    for kind, name in METHODS:
        draw = random.Random(f"{seed} {name}")
        root = _with_victim(folder / f"{name} whole", attacked)
        started, argv = time.monotonic(), arguments(kind, name, root, seed)
        writes = whole(argv, root / "cache")
        seconds, wanted = time.monotonic() - started, tensors(result(kind, name, root))
        survived, inside, ends, text = 0, 0, 0, ""
        killed = chain = 0
        root = _with_victim(folder / f"{name} 0", attacked)
        while killed < count or chain:
            last = killed >= count
            in_write = not last and killed % 2 == 0
            number, moment = draw.randint(1, writes), draw.choice(("before", "after", "renamed"))
            if killed == 0:
                number, moment = 1, "before"  # of the first write only a half file is left
            prepare = dying(number, moment) if in_write else lambda: None
            status, text = forked(
                run(arguments(kind, name, root, seed), root / "cache", prepare),
                None if last or in_write else draw.uniform(0, seconds),
            )
            if status == -signal.SIGKILL:
                killed, chain, inside = killed + 1, chain + 1, inside + in_write
                continue
            if status != 0:
                killed += 1  # so that there is one more than survived
                break
            ends += 1
            if tensors(result(kind, name, root)) == wanted:
                survived += chain
            chain = 0
            shutil.rmtree(root)
            root = _with_victim(folder / f"{name} {ends}", attacked)
        good = f"{inside} inside writes, {ends} runs to the end with equal bits"
        figures = good if survived == killed else f"{ends} runs to the end; {text[-200:].strip()}"
        yield Row("R2", f"kill -9, {kind} {name}", killed, survived, figures)
        for used in folder.glob(f"{name} *"):
            shutil.rmtree(used)


def dying(number: int, when: str) -> Callable[[], None]:
    """Kill this process at its `number`th atomic write: before or after the flush to disk, or after the new name."""

    def prepare() -> None:
        seen, sync, rename = [0], os.fsync, Path.replace

        def die(moment: str) -> None:
            if seen[0] == number and moment == when:
                os.kill(os.getpid(), signal.SIGKILL)

        def fsync(file: int) -> None:
            seen[0] += 1
            die("before")
            sync(file)
            die("after")

        def replaced(self: Path, target: Path) -> Path:
            made = rename(self, target)
            die("renamed")
            return made

        os.fsync, Path.replace = fsync, replaced  # type: ignore[assignment, method-assign]

    return prepare
