"""Faults of files, disks and names."""

import errno
import hashlib
import os
import random
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torture_parts.common import Row, arguments, forked, result, run, tensors, whole
from torture_parts.runs import dying, victim

from sau.data.images import Images
from sau.errors import RecordError, SauError
from sau.files import folder as named
from sau.record import victim as victims
from sau.record.folder import CHECKPOINT, CONFIG, Record
from sau.record.lock import release

MUTATIONS, POINTS, NAMES = 10_000, 40, 5_000
AGAIN = "starts again"
KINDS = ("bit", "run", "cut", "zeros", "junk", "gone")


def spoiled(content: bytes, kind: str, draw: random.Random) -> bytes | None:
    """A file after a mishap; None means that it is gone."""
    place = draw.randrange(len(content))
    if kind == "bit":
        return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]
    if kind == "run":
        piece = draw.randbytes(draw.randrange(1, 65))[: len(content) - place]
        return content[:place] + piece + content[place + len(piece) :]
    if kind == "cut":
        return content[:place]
    if kind == "zeros":
        return content[:place] + bytes(len(content) - place)
    return content + draw.randbytes(draw.randrange(1, 200)) if kind == "junk" else None


def _finished(folder: Path) -> str:
    """What a reader of an attack's record gets, as a digest."""
    found = victims.load(folder)
    return _digest([*(getattr(found, part.name) for part in fields(found)), Record(folder).summary()])


def _purified(folder: Path) -> str:
    record = Record(folder)
    return _digest([record.check(), record.load_tensors("model"), record.summary()])


def _unfinished(folder: Path) -> str:
    record = Record(folder)
    record.begin({}, _IDENTITY[folder], overwrite=False)
    place = record.load()
    if place is None and not record.rows:
        return AGAIN  # without its checkpoint the run starts again, and ends as it would have
    return _digest([record.config, place, record.rows])


_IDENTITY: dict[Path, dict[str, Any]] = {}


def _digest(parts: Any) -> str:
    sum_ = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            sum_.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        elif isinstance(value, Images):
            add(value.tensors())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                sum_.update(str(key).encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            for one in value:
                add(one)
        else:
            sum_.update(repr(value).encode())

    add(parts)
    return sum_.hexdigest()


def mutations(folder: Path, seed: int, share: float) -> list[Row]:
    """Every file of a finished attack, of a finished defense and of an unfinished attack, spoiled and read."""
    cache = folder / "cache"
    attacked = victim(folder, cache)
    whole(arguments("defense", "ft", folder), cache)
    half = result("attack", "badnet", folder)
    status, wrong = forked(run(arguments("attack", "badnet", folder), cache, dying(14, "renamed")))
    assert status == -signal.SIGKILL and (half / CHECKPOINT).is_file(), wrong
    for leftover in half.glob(".*"):
        leftover.unlink()
    _IDENTITY[half] = Record(half)._ours()["identity"]
    config = (half / CONFIG).read_bytes()
    places: list[tuple[Path, Callable[[Path], str]]] = [
        (attacked, _finished), (attacked / "defense" / "ft", _purified), (half, _unfinished)]  # fmt: skip
    files = [(file, read) for place, read in places for file in sorted(place.iterdir()) if file.is_file()]
    right = {place: read(place) for place, read in places}
    draw, count, found = random.Random(seed), round(MUTATIONS * share), Counter[str]()
    for i in range(count):
        (half / CONFIG).write_bytes(config)  # to read an unfinished run is to go on with it, which notes its command
        file, read = files[i % len(files)]
        content = file.read_bytes()
        changed = spoiled(content, KINDS[draw.randrange(len(KINDS))], draw)
        file.unlink() if changed is None else file.write_bytes(changed)
        try:
            got = read(file.parent)
            same = got == right[file.parent] or (got == AGAIN and changed is None)
            found["harmless" if same else "silently wrong"] += 1
            if not same:
                print(f"silently wrong: {file}")
        except SauError as error:
            found["refused" if "\n" not in str(error) else "of several lines"] += 1
        except Exception as error:
            found["foreign exception"] += 1
            print(f"foreign exception: {file}: {type(error).__name__}: {error}")
        file.write_bytes(content)
    release(half)
    bad = sum(found[name] for name in ("silently wrong", "foreign exception", "of several lines"))
    figures = ", ".join(f"{number:,} {name}" for name, number in sorted(found.items()))
    return [Row("R1", f"spoiled files ({len(files)} of them)", count, count - bad, figures)]


def _full(number: int, code: int) -> Callable[[], None]:
    """From the `number`th flush to disk on the disk is full."""

    def prepare() -> None:
        seen, sync = [0], os.fsync

        def fsync(file: int) -> None:
            seen[0] += 1
            if seen[0] >= number:
                raise OSError(code, os.strerror(code))
            sync(file)

        os.fsync = fsync

    return prepare


def _limited(size: int) -> Callable[[], None]:
    """No file may become larger than `size` bytes: a limit of the system."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def disks(folder: Path, seed: int, share: float) -> list[Row]:
    """A disk that fills up at some write of an attack or a defense; then there is room again."""
    attacked, cache = victim(folder / "first", folder / "cache"), folder / "cache"
    draw, count, survived, faults = random.Random(seed), max(1, round(POINTS * share)), 0, []
    wanted, writes = {}, {}
    for kind, name in (("attack", "badnet"), ("defense", "sau")):
        root = folder / f"whole {kind}"
        shutil.copytree(attacked, root / "victim")
        writes[kind] = whole(arguments(kind, name, root), cache)
        wanted[kind] = tensors(result(kind, name, root))
    for i in range(count):
        kind, name = (("attack", "badnet"), ("defense", "sau"))[i % 2]
        root = folder / str(i)
        shutil.copytree(attacked, root / "victim")
        argv, place = arguments(kind, name, root), result(kind, name, root)
        code = (errno.ENOSPC, errno.EDQUOT)[i // 2 % 2]
        prepare = _limited(draw.randrange(100, 150_000)) if i % 5 == 4 else _full(draw.randint(1, writes[kind]), code)
        status, text = forked(run(argv, cache, prepare))
        one_line = (
            text.count("\n") == 1 and text.startswith("error: ") and ("no room" in text or "cannot write" in text)
        )
        clean = not place.is_dir() or not [file for file in place.iterdir() if file.name.startswith(".")]
        again, trouble = forked(run(argv, cache))
        if status == 1 and one_line and clean and again == 0 and tensors(place) == wanted[kind]:
            survived += 1
        else:
            faults.append(f"{kind} {status} {text.strip()[-80:]} then {again} {trouble.strip()[-80:]}")
        shutil.rmtree(root)
    figures = "; ".join(faults)[:400] or "one line, status 1, nothing temporary left, the repeated run is bit-equal"
    return [Row("R4", "full disk, quota, limit of file sizes", count, survived, figures)]


def names(folder: Path, seed: int, share: float) -> list[Row]:
    """Any text at all as a folder's name."""
    from hypothesis import HealthCheck, given, settings
    from hypothesis import seed as seeded
    from hypothesis import strategies as st

    root, found = folder / "record", Counter[str]()
    root.mkdir()
    (root / "linked").mkdir()
    (root / "linked" / "defense").symlink_to(folder)
    given_links = {*folder.rglob("*")}
    parts = st.sampled_from(["..", "/", ".", "\\", "~", "\0", "\n", "a", "CON", "%2e", "\u2024", "\u2215", "-", " "])
    plain = st.from_regex(r"[A-Za-z0-9._-]{1,110}", fullmatch=True)
    texts = st.one_of(st.text(max_size=300), st.lists(parts, max_size=12).map("".join), plain)

    @seeded(seed)
    @settings(max_examples=round(NAMES * share), database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(texts)
    def attempt(name: str) -> None:
        try:
            path = named(root, name)
        except RecordError:
            found["refused"] += 1
            return
        inside = path.resolve().parent == root.resolve() and path != root
        found["inside the root" if inside else "escaped"] += 1
        with suppress(RecordError):
            named(root, "linked", "defense", name)  # a link below the root
            found["escaped"] += 1

    attempt()
    count = sum(found.values())
    left = {*folder.rglob("*")} - given_links
    figures = ", ".join(f"{number:,} {name}" for name, number in sorted(found.items()))
    return [Row("P1", "names of folders", count, count - found["escaped"] - len(left), figures)]
