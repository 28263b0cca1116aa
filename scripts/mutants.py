"""Mutation check: do the tests notice when a line is wrong?

    python scripts/mutants.py [TARGET ...] [--least 85] [--limit 100] [--seed 0] [--work build/mutants]

Each mutant is a copy of the repository with one small change (`mutants_parts/changes.py`: comparisons, arithmetic,
constants, conditions, arguments, return values and statements), in which the tests of its target run until one fails.
Killed is what a test notices or what does not end in time. Of more than LIMIT mutants of a file so many are drawn by
SEED. Those that change nothing that a test could see stand in `mutants_parts/equivalent.yaml`, with the reason, and are
not counted. What is known of earlier calls is kept in WORK, as long as the mutant and its tests are the same.
Exit status 1 if less than LEAST percent of a target are killed, 2 for a mistake in the command.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml
from mutants_parts.changes import Change, changes
from script_parts.asking import Parser

ROOT = Path(__file__).resolve().parents[1]
CHECKED = (
    *("-q", "-x", "-m", "not slow", "--jaxtyping-packages=sau,beartype.beartype", "-p", "no:cacheprovider"),
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # of plugins that are shared
)
SHARED = ("torch", "torchvision", "sklearn", "scipy", "skimage", "hypothesis", "jaxtyping", "beartype", "pytest")


class Mistake(Exception):
    """Of the user; the library's own errors would bring its modules here, which the mutants have to bring."""


@dataclass(frozen=True)
class Target:
    """What is changed and what has to notice.

    Args:
        files: whose lines are changed.
        tests: arguments of pytest.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...]


TARGETS = {
    "evaluate": Target(("sau/evaluate.py",), ("tests/test_evaluate.py",)),
    "record": Target(("sau/record/folder.py",), ("tests/test_record.py",)),
    "losses": Target(
        ("sau/perturb.py", "sau/defense/searching.py", "sau/defense/sau.py"),
        ("tests/test_sau.py", "tests/test_config.py"),
    ),
    "risk": Target(("sau/risk.py", "sau/witness.py"), ("tests/test_risk.py",)),
    "at": Target(("sau/defense/at.py",), ("tests/test_at.py",)),
}


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant.

    Args:
        file: the changed file.
        change: what was changed.
        state: killed, timeout, survived or equivalent.
    """

    file: str
    change: Change
    state: str


class Check:
    """The mutants of one target.

    Args:
        target: which files and which tests.
        root: the repository.
        work: folder for the copy and for what is known.
    """

    def __init__(self, target: Target, root: Path, work: Path) -> None:
        self.target, self.root, self.tree, self.known = target, root, work / "tree", work / "known.jsonl"
        self.scratch = work / "scratch"
        shutil.rmtree(self.tree, ignore_errors=True)
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=root, capture_output=True, text=True
        )
        names = listed.stdout.splitlines() if listed.returncode == 0 else []
        for name in names or [str(file.relative_to(root)) for file in root.rglob("*") if work not in file.parents]:
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, self.tree / name)
        helpers = sorted(str(file.relative_to(self.tree)) for file in (self.tree / "tests").glob("*.py"))
        tests = [test.split("::")[0] for test in target.tests] + [name for name in helpers if "/test_" not in name]
        sources = [(self.tree / name).read_bytes() for name in tests if (self.tree / name).is_file()]
        self.suite = hashlib.sha256(b"".join([repr(target.tests).encode(), *sources])).hexdigest()

    def run(self, limit: int, seed: int, excused: list[dict[str, str]]) -> list[Verdict]:
        """Every mutant that is drawn, in the order of the lines."""
        started = time.monotonic()
        if self.tests(3600) != "survived":
            tests, output = " ".join(self.target.tests), self.scratch / "out.txt"
            raise Mistake(f"{tests} fails without any change; see {output}")
        patience = 30 + 3 * (time.monotonic() - started)
        memory = dict(map(json.loads, self.known.read_text().splitlines())) if self.known.is_file() else {}
        found = []
        for file in self.target.files:
            every = changes((self.tree / file).read_text())
            drawn = sorted(random.Random(seed).sample(range(len(every)), min(limit, len(every))))
            for count, change in enumerate([every[place] for place in drawn], 1):
                same = {"file": file, "was": change.was, "becomes": change.becomes}
                if any(same.items() <= excuse.items() for excuse in excused):
                    state = "equivalent"
                else:
                    key = hashlib.sha256(f"{self.suite} {file} {change.source}".encode()).hexdigest()
                    if key not in memory:
                        memory[key] = self.try_out(file, change, patience)
                        with self.known.open("a") as lines:
                            lines.write(json.dumps([key, memory[key]]) + "\n")
                    state = memory[key]
                found.append(Verdict(file, change, state))
                print(f"{count}/{len(drawn)} {file}:{change.line} {state}", flush=True)
        return found

    def try_out(self, file: str, change: Change, patience: float) -> str:
        """What becomes of one mutant."""
        original = (self.tree / file).read_text()
        (self.tree / file).write_text(change.source)
        try:
            return self.tests(patience)
        finally:
            (self.tree / file).write_text(original)

    def tests(self, patience: float) -> str:
        """Run the tests in the copy, in a process that has the large libraries already."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir(parents=True)
        child = os.fork()
        if child == 0:
            self._child()
        end = time.monotonic() + patience
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                _stop(child)
                return "survived" if status == 0 else "killed"
            time.sleep(0.05)
        _stop(child)
        os.waitpid(child, 0)
        return "timeout"

    def _child(self) -> None:
        status = 1
        try:
            os.setsid()
            with (self.scratch / "out.txt").open("wb") as out:
                os.dup2(out.fileno(), 1)
                os.dup2(out.fileno(), 2)
            os.environ.update(TMPDIR=str(self.scratch), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
            os.chdir(self.tree)
            sys.path[0], sys.dont_write_bytecode = str(self.tree), True
            status = int(sys.modules["pytest"].main([*CHECKED, *self.target.tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _stop(leader: int) -> None:
    """End a process and all that it started."""
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def table(found: dict[str, list[Verdict]]) -> tuple[str, float]:
    """A row for each target, and the smallest share of killed ones in percent."""
    lines, least = (
        ["| target | mutants | killed | timeouts | survived | equivalent | killed % |", "|---" * 7 + "|"],
        100.0,
    )
    for name, verdicts in found.items():
        states = Counter(verdict.state for verdict in verdicts)
        caught, counted = states["killed"] + states["timeout"], len(verdicts) - states["equivalent"]
        share = 100 * caught / max(1, counted)
        least = min(least, share)
        cells = (len(verdicts), *(states[state] for state in ("killed", "timeout", "survived", "equivalent")))
        lines.append(f"| {name} | {' | '.join(map(str, cells))} | {share:.1f} |")
    return "\n".join(lines), least


def main() -> int:
    """Check the targets, show what survived and how much was killed."""
    parser = Parser(__doc__)
    parser.add_argument("target", nargs="*", help=f"{', '.join(TARGETS)}, or FILE=TESTS of your own [all]")
    parser.add_argument("--least", type=float, default=85.0, help="percent that have to be killed [85]")
    parser.add_argument("--limit", type=int, default=100, help="mutants of a file; 0 means all [100]")
    parser.add_argument("--seed", type=int, default=0, help="of the draw [0]")
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository [this one]")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/mutants", help="what may be thrown away [build/mutants]"
    )
    asked = parser.parse_args()
    try:
        return check(asked)
    except Mistake as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2


def check(asked: argparse.Namespace) -> int:
    """The exit status."""
    if not 0 <= asked.least <= 100 or asked.limit < 0:
        raise Mistake(f"least is {asked.least:g}, limit {asked.limit}; allowed are 0 to 100, and 0 and more")
    targets = {name: TARGETS.get(name) or _own(name) for name in asked.target or TARGETS}
    asked.root, asked.work = asked.root.resolve(), asked.work.resolve()
    for name in SHARED:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    excuses = yaml.safe_load((Path(__file__).parent / "mutants_parts/equivalent.yaml").read_text())
    found = {}
    for name, target in targets.items():
        found[name] = Check(target, asked.root, asked.work).run(asked.limit or sys.maxsize, asked.seed, excuses)
    for verdict in (verdict for verdicts in found.values() for verdict in verdicts if verdict.state == "survived"):
        change = verdict.change
        print(f"\n{verdict.file}:{change.line}\n- {change.was}\n+ {change.becomes}")
    text, least = table(found)
    print(f"\n{text}")
    return int(least < asked.least)


def _own(text: str) -> Target:
    file, _, tests = text.partition("=")
    if not tests:
        raise Mistake(f"target is {text!r}; allowed are {', '.join(TARGETS)}, and FILE=TESTS")
    return Target((file,), tuple(tests.split()))


if __name__ == "__main__":
    sys.exit(main())
