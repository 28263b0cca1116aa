"""The mutation check: the changes it makes, and what it says of good and of idle tests."""

import subprocess
import sys

import pytest
from mutants import TARGETS
from mutants_parts.changes import changes
from toys import REPOSITORY, environment

SOURCE = '''"""A sum."""

import math


def share(hits: int, total: int = 10, *, exact: bool = False) -> float:
    """In percent."""
    if total <= 0 and not exact:
        raise ValueError(f"{total} is too few")
    kept = round(100 * hits / total, ndigits=2) if exact else 1.5
    return max(kept, -1)  # é
'''


def test_every_kind_of_change_is_made_and_texts_stay():
    found = {(change.line, change.becomes) for change in changes(SOURCE)}
    assert {line for line, _ in found} == {6, 8, 9, 10, 11}
    for line, becomes in (
        (6, "def share(hits: int, total: int = 11, *, exact: bool = False) -> float:"),
        (6, "def share(hits: int, total: int = 10, *, exact: bool = True) -> float:"),
        (8, "if (total < 0) and not exact:"),
        (8, "if (total <= 0 or not exact):"),
        (8, "if total <= 0 and exact:"),
        (8, "if (not (total <= 0 and (not exact))):"),
        (8, "if total <= 1 and not exact:"),
        (9, "pass"),
        (10, "kept = round((100 / hits) / total, ndigits=2) if exact else 1.5"),
        (10, "kept = round(100 * hits / total) if exact else 1.5"),
        (10, "kept = round(100 * hits / total, ndigits=3) if exact else 1.5"),
        (10, "kept = round(100 * hits / total, ndigits=2) if (not exact) else 1.5"),
        (10, "kept = round(100 * hits / total, ndigits=2) if exact else 2.5"),
        (11, "return None  # é"),
        (11, "return min(kept, -1)  # é"),
        (11, "return max(kept, 1)  # é"),
    ):
        assert (line, becomes) in found, (line, becomes, sorted(found))
    sources = [change.source for change in changes(SOURCE)]
    assert len(sources) == len({*sources}) and SOURCE not in sources
    for source in sources:
        compile(source, "mutant", "exec")
        assert len(source.splitlines()) == len(SOURCE.splitlines()) and ("too few" in source or "pass" in source)


def test_every_target_changes_files_that_are_there():
    assert {"evaluate", "record", "losses", "risk", "at"} == set(TARGETS)
    for target in TARGETS.values():
        assert all(changes((REPOSITORY / name).read_text()) for name in target.files)
        assert target.tests and all((REPOSITORY / name).is_file() for name in target.tests)


IDLE = "from part import share\n\n\ndef test_it():\n    share(1, 2)\n"
GOOD = """import pytest
from part import share


def test_it():
    assert share(1, 8) == 1.5 == share(7) and share(1, 8, exact=True) == 12.5 and share(5, exact=True) == 50
    assert share(1, 3, exact=True) == 33.33 and share(-9, 1, exact=True) == -1
    assert share(-1, 100, exact=True) == -1 == share(-1, 199, exact=True) - 0.5
    for total in (0, -1):
        with pytest.raises(ValueError):
            share(1, total)
    with pytest.raises(ZeroDivisionError):
        share(1, 0, exact=True)
    assert share(1, 1) == 1.5
"""


@pytest.mark.slow
def test_good_tests_kill_and_idle_ones_do_not(tmp_path):
    """In a repository of two files; the second call knows what the first one found out."""
    root, work = tmp_path / "root", tmp_path / "work"
    for name, text in (("part.py", SOURCE), ("test_idle.py", IDLE), ("test_good.py", GOOD), ("pytest.ini", "[pytest]")):
        root.mkdir(exist_ok=True)
        (root / name).write_text(text)

    def check(*targets: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(REPOSITORY / "scripts" / "mutants.py"), *targets]
        argv += ["--root", str(root), "--work", str(work), "--limit", "12"]
        return subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)

    idle = check("part.py=test_idle.py")
    assert idle.returncode == 1 and "survived" in idle.stdout, idle.stdout + idle.stderr
    assert "\n- return max(kept, -1)" in idle.stdout or "\n- kept = " in idle.stdout
    good = check("part.py=test_good.py")
    assert good.returncode == 0 and len((work / "known.jsonl").read_text().splitlines()) == 24, good.stdout
    again = check("part.py=test_good.py")
    assert again.stdout == good.stdout and len((work / "known.jsonl").read_text().splitlines()) == 24
    assert (root / "part.py").read_text() == SOURCE
    assert "fails without any change" in check("part.py=test_none.py").stderr
    assert check("part.py").returncode == 2 and check("--limit", "x").returncode == 2
