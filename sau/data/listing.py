"""Which pictures a data set has, in which order, before any is decoded; refusals name the file in one line."""

import os
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

from sau.errors import DataError
from sau.files import read

Rows = Iterable[tuple[int, os.DirEntry[str]]]  # (label, file)


class Split:
    """Paths and labels of a split in order, and the texts that its cache is keyed by.

    Args:
        base: folder of the data set; the key holds paths below it, so that a data set may be moved.
    """

    def __init__(self, base: Path) -> None:
        self.base = str(base)
        self.paths: list[str] = []
        self.labels: list[int] = []
        self.key: list[str] = []

    def add(self, rows: Rows) -> None:
        """Append pictures."""
        for label, file in rows:
            status = file.stat()
            self.paths.append(file.path)
            self.labels.append(label)
            self.key.append(f"{file.path.removeprefix(self.base)} {status.st_size} {status.st_mtime_ns}")

    def text(self, file: Path) -> str:
        """The content of an annotation file; DataError if it is missing, empty or no text."""
        try:
            text = read(file).decode("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise DataError(f"cannot read the list {file}: {reason}") from None
        if not text.strip():
            raise DataError(f"the list {file} is empty")
        self.key.append(text)
        return text

    def annotated(
        self, table: Path, folder: Path, separator: str, column: int, classes: Mapping[str, int]
    ) -> list[tuple[int, os.DirEntry[str]]]:
        """A row for each line of `table`: the name of a file in `folder` first, a key of `classes` in `column`."""
        files = visible(folder)
        rows: dict[str, tuple[int, os.DirEntry[str]]] = {}
        for number, line in enumerate(self.text(table).split("\n"), 1):
            cells = [cell.strip() for cell in line.split(separator)]
            name, where = cells[0], f"{table}, line {number},"
            if not line.strip() or (number == 1 and name.lower() == "filename"):
                continue
            if len(cells) <= column:
                raise DataError(f"{where} has {len(cells)} columns between {separator!r}; needed are {column + 1}")
            if "/" in name or "\\" in name:
                raise DataError(f"{where} names {name!a}; allowed is the name of a file in {folder}, not a path")
            if name not in files or not files[name].is_file():
                raise DataError(f"{where} names {name!a}, but {folder} has no such picture")
            if name in rows:
                raise DataError(f"{where} names {name!a} a second time; allowed is once")
            if cells[column] not in classes:
                raise DataError(f"{where} gives {name!a} the class {cells[column]!a}, which is none of {folder}")
            rows[name] = (classes[cells[column]], files[name])
        if not rows:
            raise DataError(f"the list {table} names no pictures")
        return list(rows.values())


# What Windows, macOS, a NAS or a file system leaves between the files of a user; names beginning with "." go anyway.
_LEFT = "thumbs.db ehthumbs.db desktop.ini __macosx @eadir lost+found $recycle.bin".split() + [
    "system volume information"
]


def visible(folder: Path) -> dict[str, os.DirEntry[str]]:
    """Files and folders by name, sorted, without hidden ones and those that only a system made. DataError for names
    with control characters or of broken text."""
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from None
    odd = [name for name in found if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in name)]
    if odd:
        raise DataError(f"{folder} holds {odd[0]!a}; allowed are names without control characters")
    return {name: found[name] for name in sorted(found) if name.lower() not in _LEFT}


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, in order: by number where all are whole numbers (2 before 10), else as text.
    Files beside them are no classes."""
    names = [name for name, entry in visible(folder).items() if entry.is_dir()]
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else names


def pictures(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a class, sorted by name; DataError if there are none or something else lies between them."""
    files = list(visible(folder).values())
    if not files:
        raise DataError(f"the folder {folder} is empty; each class needs a picture")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file.path} is no file; allowed in a class folder are pictures")
    return files


def same_classes(place: Path, classes: Iterable[str], other: Path, others: Iterable[str]) -> None:
    """DataError unless both places have the same classes."""
    for missing, there, here in (
        (set(classes) - set(others), place, other),
        (set(others) - set(classes), other, place),
    ):
        if missing:
            raise DataError(f"{there} has the class {min(missing)!a}, which {here} lacks; both need the same classes")
