"""The README shows what the demo prints: its table by a short run of the same commands, its words by its figures."""

import re
import shlex

import pytest
from toys import REPOSITORY

from sau.evaluate import Proportion, Score, der, verdict

SHOWN = (REPOSITORY / "README.md").read_text().partition("    $ bash scripts/demo.sh\n")[2].partition("\n\n")[0]
LINES = [line[4:] for line in SHOWN.splitlines()]
DEMO = (REPOSITORY / "scripts" / "demo.sh").read_text()


def commands(*more: str) -> list[list[str]]:
    """The two runs of the demo, as arguments of `python -m sau`."""
    same = re.search(r"^same=\((.*)\)$", DEMO, re.M)
    assert same is not None
    found = []
    for kind, name, flags in re.findall(r"^python (attack|defense)/(\w+)\.py (.*)$", DEMO, re.M):
        line = flags.replace('"${same[@]}"', same[1]).replace('"$root"', "./record")
        found.append([kind, name, *shlex.split(line), *more])
    return found


WORDS = ("The backdoor ", "It cost ", "Triggered images ", "The trigger still ", "No verdict ")


def shape(line: str) -> str:
    """A line without its numbers and widths."""
    return re.sub(r" +", " ", re.sub(r"-?\d[\d.,e+-]*", "#", line)).strip()


def test_the_table_of_the_readme_is_that_of_the_demo(here):
    """Two epochs and two rounds."""
    printed: list[str] = []
    for argv in commands("--epochs", "2", "--eval_every", "2", "--lr_scheduler", "OneCycleLR"):
        status, out, err = here(*argv)
        assert (status, err) == (0, "")
        printed += out.splitlines()
    table = [shape(line) for line in LINES if line != "..." and not line.startswith(WORDS)]
    shapes = [shape(line) for line in printed]
    first = len(shapes) - 1 - shapes[::-1].index(table[0])
    assert len(commands()) == 2 and len(table) == 3 and shapes[first : first + 3] == table


def scores(name: str) -> Score:
    """A row of the README's table; its percentages as shares of ten thousand."""
    (row,) = (line for line in LINES if line.startswith(f"{name} "))
    shown = re.findall(r"([\d.]+) \[", row)
    return Score(*(Proportion(round(100 * float(value)), 10_000) for value in shown))


def test_the_verdict_of_the_readme_follows_from_its_table():
    before, after = scores("before"), scores("after")
    said = [line for line in LINES if line.startswith(WORDS)]
    assert said == [line for line in verdict(before, after).splitlines() if line.startswith(WORDS)]
    assert said[0].startswith("The backdoor is gone: ")
    (row,) = (line for line in LINES if line.startswith("after "))
    assert float(row.split()[-1]) == pytest.approx(der(before, after), abs=0.011)


def test_the_demo_fixes_what_its_figures_hang_on():
    """The recipe, the device, the number of threads and the precision; the seed is the default."""
    for argv in commands():
        assert {"cpu", "1", "false"} == {argv[argv.index(flag) + 1] for flag in ("--device", "--threads", "--amp")}
    assert "--recipe cpu" in DEMO
