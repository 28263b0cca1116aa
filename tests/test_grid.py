"""The plan of a grid, its order and its books; nothing is trained here but in one pair of cells."""

import dataclasses
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from grids import SMALL, Scripted, finish, used
from toys import QUICK, REPOSITORY, environment, the_error

from sau.errors import ConfigError, LockedError, RecordError
from sau.files import write
from sau.grid import store as storing
from sau.grid.cells import LOCKED, Child, Job, Outcome, run_cell
from sau.grid.engines import Local, RayEngine
from sau.grid.names import attack_named, defense_named, without_digest
from sau.grid.plan import Cell, cells, select
from sau.grid.publish import of_others, publish
from sau.grid.runner import Runner, needed, scores
from sau.grid.spec import read
from sau.grid.status import status
from sau.grid.store import State, Store
from sau.grid.work import work
from sau.record.folder import CHECKPOINT, Record
from sau.record.lock import acquire, release, release_all
from sau.record.schema import dump_manifest as manifest
from sau.record.summaries import load

LARGE = "dataset: cifar10\nattacks: [badnet]\n"


@pytest.fixture
def planned(tmp_path) -> Callable[..., list[Cell]]:
    """`planned(text)` are the cells of a grid file with that text."""

    def plan(text: str = SMALL, name: str = "grid.yaml") -> list[Cell]:
        (tmp_path / name).write_text(text)
        return cells(read(tmp_path / name)[1])

    return plan


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Callable[..., tuple[Scripted, list[tuple[Cell, str]], list[str]]]:
    """`drive(cells, script)` runs a grid on a scripted engine: the engine, the failures and the lines."""
    monkeypatch.setattr("sau.grid.runner.POLL", 0.0)
    monkeypatch.setattr("sau.grid.runner.ELSEWHERE", 0.05)

    def run(every, script=None, *, retries=1, retry_failed=False, published=()):
        store, lines = Store(tmp_path / "root", tuple(published)), list[str]()
        store.prepare(every)
        engine = Scripted(store, script)
        todo = needed(every, store, retry_failed)
        runner = Runner(todo, store, engine, retries=retries, timeout=None, say=lines.append)
        return engine, runner.run(), lines

    return run


# Which cells there are


def test_an_attack_is_one_cell_for_all_of_its_defenses(planned):
    every = planned()
    labels = [cell.label for cell in every]
    assert labels[:3] == ["badnet_r0.1_s0", "badnet_r0.1_s0/defense/ft_c0.1", "badnet_r0.1_s0/defense/clp_c0.1"]
    assert labels[3:] == ["prototype_s0", "prototype_s0/defense/ft_c0.1", "prototype_s0/defense/clp_c0.1"]
    assert every[1].attack == every[2].attack == every[0].digest and every[0].attack is None
    assert every[1].folder.startswith(every[0].folder + "/defense/ft_c0.1_")
    assert len({cell.digest for cell in every}) == len({cell.folder for cell in every}) == 6


def test_seeds_ratios_and_shares_are_crossed(planned):
    text = SMALL.replace("[0.1]\nclean", "[0.05, 0.1]\nclean").replace(
        "clean_shares: [0.1]", "clean_shares: [0.1, 0.2]"
    )
    every = planned(text + "seeds: [0, 3]\n")
    assert len(every) == 2 * 3 * (1 + 2 + 1)  # a clean network has no poisoning ratio, and clp looks at no pictures
    assert {cell.label for cell in every if cell.kind == "attack"} >= {"badnet_r0.05_s3", "prototype_s3"}


CHANGES = {
    "a defense's setting": ("ft: {epochs: 1}", "ft: {epochs: 2}", {"ft"}),
    "an attack's setting": ("epochs: 1}\n  ft", "epochs: 2}\n  ft", {"badnet", "prototype", "ft", "clp"}),
    "the threads": ("dataset: digits", "dataset: digits\nthreads: 2", {"badnet", "prototype", "ft", "clp"}),
    "the precision": ("dataset: digits", "dataset: digits\namp: true", {"badnet", "prototype", "ft", "clp"}),
    "the data set": ("dataset: digits", "dataset: cifar10", {"badnet", "prototype", "ft", "clp"}),
    "the clean share": ("clean_shares: [0.1]", "clean_shares: [0.2]", {"ft", "clp"}),
    "memory and data folder": ("dataset: digits", "dataset: digits\nmemory_gb: 7\ndataset_path: /elsewhere", set()),
    "how often it is evaluated": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  defense: {eval_every: 1}", set()),
    "a default that is said": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  badnet: {attack_target: 0}", set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_makes_new_cells_only_where_it_acts(planned, change):
    old, new, names = CHANGES[change]
    before, after = planned(), planned(SMALL.replace(old, new))
    kept = {cell.digest for cell in before}
    assert {cell.name for cell in after if cell.digest not in kept} == names


def test_every_shipped_grid_is_named_in_the_guide():
    text = (REPOSITORY / "docs" / "grid.md").read_text()
    names = {f"`{file.stem}`" for file in (REPOSITORY / "configs" / "grid").glob("*.yaml")}
    assert names <= {*re.findall(r"`[\w-]+`", text[text.index("The shipped grids") :].split("\n## ")[0])}


def test_another_file_under_the_same_name_makes_new_cells(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, found = SMALL + "  badnet: {patch_mask_path: mask.png}\n  clp: {index: mine.txt}\n", []
    for name, content in (("mask.png", "1"), ("mask.png", "2"), ("mine.txt", "3")):
        for file in {"mask.png", "mine.txt"} - set(os.listdir()) | {name}:
            Path(file).write_text(content)
        found.append(planned(text.replace("clean_shares: [0.1]\n", "")))
    digests = [{cell.name: cell.digest for cell in every[:3]} for every in found]
    assert not {*digests[0].values()} & {*digests[1].values()}
    assert {name for name in digests[1] if digests[1][name] != digests[2][name]} == {"clp"}
    assert f"--patch_mask_path={tmp_path}/mask.png" in found[0][0].flags  # workers start in other folders
    (elsewhere := tmp_path / "elsewhere").mkdir()
    for name in ("mask.png", "mine.txt"):
        Path(name).rename(elsewhere / name)
    monkeypatch.chdir(elsewhere)
    assert {cell.name: cell.digest for cell in planned(text.replace("clean_shares: [0.1]\n", ""))[:3]} == digests[2]


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("attack: {width: 2, epochs: 1, trigger_radius: 0.1}", {"badnet", "prototype", "ft", "clp"}),
        ("defense: {track_risk: true, risk_eps: 0.1}", {"ft", "clp"}),
        ("defense: {track_risk: false, risk_eps: 0.1}", set()),
    ],
)
def test_what_else_is_measured_makes_new_cells(planned, more, names):
    kept = {cell.digest for cell in planned()}
    base = SMALL.replace("  attack: {width: 2, epochs: 1}\n", "") if more.startswith("attack") else SMALL
    assert {cell.name for cell in planned(f"{base}  {more}\n") if cell.digest not in kept} == names


def test_cells_whose_labels_would_be_one_have_their_digests_in_them(planned):
    every = planned(SMALL + "blocks:\n  - {}\n  - {attacks: [badnet], overrides: {ft: {lr: 0.5}}}\n")
    labels = [cell.label for cell in every if cell.name == "ft" and "badnet" in cell.label]
    assert len(every) == 7 and labels == [
        f"badnet_r0.1_s0/defense/ft_c0.1_{cell.digest[:10]}" for cell in (every[1], every[6])
    ]


def test_a_method_that_looks_at_no_pictures_runs_once_for_all_shares(planned):
    both = planned(SMALL.replace("clean_shares: [0.1]", "clean_shares: [0.1, 0.2]"))
    counts = Counter(cell.name for cell in both)
    assert counts["ft"] == 2 * counts["clp"] > 0
    assert {cell.digest for cell in planned() if cell.name == "clp"} == {c.digest for c in both if c.name == "clp"}


def test_pictures_of_ones_own_are_known_by_their_folder(planned):
    one, other = (planned(SMALL.replace("digits", f"folder\ndataset_path: {place}")) for place in ("a", "b"))
    assert one[0].digest != other[0].digest


def test_blocks_are_laid_over_the_rest_and_shared_cells_come_once(planned):
    blocks = "blocks:\n  - {seeds: [0]}\n  - {seeds: [0, 1], attacks: [badnet], overrides: {ft: {lr: 0.5}}}\n"
    every = planned(SMALL + blocks)
    assert len(every) == 6 + 1 + 3  # of the second block on seed 0, attack and clp are there already
    flags = [cell.flags for cell in every if cell.name == "ft" and "--lr=0.5" in cell.flags]
    assert len(flags) == 2 and all("--epochs=1" in each for each in flags)


def test_a_file_is_laid_over_those_that_it_includes(planned, tmp_path):
    planned(SMALL + "published: there\n", "base.yaml")
    grid, (block,) = read_text(tmp_path, "include: base.yaml\nseeds: [4]\noverrides: {ft: {lr: 0.5}}\n")
    assert block.seeds == (4,) and block.overrides["ft"] == {"epochs": 1, "lr": 0.5}
    assert block.overrides["attack"] == {"width": 2, "epochs": 1}
    assert grid.published == (str(tmp_path / "there"),)


def test_overrides_of_an_included_file_may_be_of_methods_that_no_block_runs(planned, tmp_path):
    planned(SMALL, "base.yaml")
    text = "include: base.yaml\ndefenses: [clp]\n"
    assert planned(text, "mine.yaml")
    with pytest.raises(ConfigError, match="mine.yaml: overrides has ft, which no block runs"):
        planned(text + "overrides: {ft: {lr: 0.5}}\n", "mine.yaml")


@pytest.mark.parametrize("name", ["defenses: [sau]", "seeds: [0]"])
def test_what_every_included_block_says_itself_is_refused_outside_of_blocks(planned, tmp_path, one_line, name):
    planned(SMALL + "blocks:\n  - {seeds: [1], defenses: [ft]}\n  - {seeds: [2], defenses: [clp]}\n", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        read_text(tmp_path, f"include: base.yaml\nattacks: [badnet]\n{name}\n")
    assert f"mine.yaml:3: {name.split(':')[0]}: every block of the included file" in one_line(caught.value)
    _, blocks = read_text(tmp_path, f"include: base.yaml\nattacks: [lf]\n{name}\nblocks:\n  - ratios: [0.2]\n")
    assert [block.attacks for block in blocks] == [("lf",)]
    _, blocks = read_text(tmp_path, "include: base.yaml\nattacks: [lf]\n")
    assert [(block.attacks, block.seeds) for block in blocks] == [(("lf",), (1,)), (("lf",), (2,))]


def read_text(folder: Path, text: str) -> Any:
    (folder / "mine.yaml").write_text(text)
    return read(folder / "mine.yaml")


def test_the_smallest_shares_are_read_back_from_names():
    assert attack_named("badnet_r5e-05_0123456789_s3") == ("badnet", 3, {"pratio": 5e-5})
    assert attack_named("badnet_r0.00333333_0123456789_s3") == ("badnet", 3, {"pratio": 0.00333333})
    assert defense_named("sau_c1.23457e-05") == ("sau", {"ratio": 1.23457e-5, "select": "defender"})
    assert attack_named("badnet_r2.5e-05_s3") == ("badnet", 3, {"pratio": 2.5e-5})
    assert defense_named("sau_c5e-05_0123456789") == ("sau", {"ratio": 5e-5, "select": "defender"})
    assert attack_named("mine_r-e_s3")[2] is None and defense_named("sau_c..") == ("sau_c..", None)


def test_a_reason_from_a_strangers_folder_is_a_line(planned, tmp_path):
    cell = planned(SMALL)[0]
    store = Store(tmp_path / "root")
    store.fail(cell, "x\x1b]0;evil\x07\nfinished badnet", 1)
    assert store.reason(cell) == "x\\x1b]0;evil\\x07 finished badnet"


def test_some_cells_can_be_chosen_and_bring_their_attacks(planned):
    every = planned(SMALL + "seeds: [0, 1]\n")
    assert [cell.label for cell in select(every, ["badnet*s1/*clp*"])] == [
        "badnet_r0.1_s1",
        "badnet_r0.1_s1/defense/clp_c0.1",
    ]
    assert {cell.name for cell in select(every, ["clp"])} == {"badnet", "prototype", "clp"}
    with pytest.raises(ConfigError, match="fits no cell"):
        select(every, ["nothing*"])


def test_the_names_of_folders_without_their_digests():
    assert (
        without_digest("badnet_r0.1_0123456789_s3") == "badnet_r0.1_s3"
        and without_digest("ft-sam_c0.05_0123456789") == "ft-sam_c0.05"
    )
    assert without_digest("badnet_s0") == "badnet_s0"


def test_a_report_reads_what_a_grid_calls_its_folders(planned):
    every = planned(SMALL + "blocks:\n  - {}\n  - {overrides: {clp: {select: oracle}}}\n")
    read = {defense_named(cell.folder.split("/")[-1])[0]: cell.name for cell in every if cell.attack}
    assert read == {"ft": "ft", "clp": "clp"}
    chosen = [defense_named(cell.folder.split("/")[-1])[1] for cell in every if cell.name == "clp"]
    assert chosen == [{"ratio": 0.1, "select": select} for select in ("defender", "defender", "oracle", "oracle")]


@pytest.mark.parametrize("file", sorted((REPOSITORY / "configs" / "grid").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_grid_can_be_planned(file):
    assert len(cells(read(file)[1])) >= 6


TABLE = (
    "badnet blended inputaware lf sig ssba wanet prototype".split(),
    "sau ft ft-sam i-bau d3 at anp bnp clp ep fp fst nad nc npd rnp".split(),
)


def test_the_table_of_the_cpu_track_is_what_was_promised():
    every = cells(read(REPOSITORY / "configs" / "grid" / "table1_cpu.yaml")[1])
    attacks = {cell.name for cell in every if cell.kind == "attack"}
    assert len({cell.label for cell in every}) == len(every)
    rows: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in every:
        seed = next(flag.removeprefix("--random_seed=") for flag in cell.flags if flag.startswith("--random_seed"))
        if cell.kind == "defense":
            assert cell.label.endswith("_oracle") is ("--select=oracle" in cell.flags)
            rows[cell.label.split("_")[0], seed].add(cell.name + ("+" if cell.label.endswith("_oracle") else ""))
    assert attacks == set(TABLE[0])  # a contribution need not be among them, for the table takes days
    for attack in attacks:
        classical = attack in ("badnet", "blended")
        assert {name for name in rows[attack, "0"] if "+" not in name} == set(TABLE[1])
        assert {name for name in rows[attack, "0"] if "+" in name} == (
            {"anp+", "clp+", "ep+", "fp+"} if classical else set()
        )
        for seed in ("1", "2"):
            assert rows[attack, seed] == (set(TABLE[1]) if classical else {"ft", "ft-sam", "i-bau", "d3", "sau"})


def test_the_top_of_a_file_may_leave_devices_and_seeds_to_its_blocks(planned):
    top = "recipe: fast\ndataset: cifar10\nattacks: [badnet]\nseeds: []\n"
    (cell,) = planned(top + "blocks:\n  - {device: cuda, gpus: 1, seeds: [3]}\n")
    assert cell.label == "badnet_r0.1_s3"


# What cannot be


BAD = {
    "unknown key": (SMALL + "seedz: [0]\n", "did you mean seeds?"),
    "unknown attack": (SMALL.replace("badnet", "badnets"), "'badnets'; did you mean badnet?"),
    "unknown defense": (SMALL.replace("clp", "clip"), "'clip'; did you mean clp?"),
    "unknown data set": (SMALL.replace("digits", "digit"), "digit"),
    "no attack": ("dataset: digits\n", "attacks names none"),
    "twice": (SMALL.replace("[badnet,", "[badnet, badnet,"), "attacks has badnet twice"),
    "unknown method in overrides": (SMALL + "  saw: {lr: 1}\n", "overrides has 'saw'; did you mean sau?"),
    "unknown setting": (SMALL.replace("ft: {epochs", "ft: {epochz"), "overrides.ft.epochz: ft has no such setting"),
    "bad value": (SMALL.replace("ft: {epochs: 1", "ft: {epochs: many"), "'many'"),
    "out of range": (SMALL.replace("clean_shares: [0.1]", "clean_shares: [0.1]\nthreads: 0"), "threads is 0"),
    "auto": (SMALL + "recipe: auto\n", "allowed is one of paper, cpu, fast"),
    "fast of a data set without": (SMALL + "recipe: fast\n", "recipe is fast, which digits does not have"),
    "no seeds": (SMALL + "seeds: []\n", "seeds names none"),
    "the grid's own": (SMALL.replace("ft: {epochs: 1", "ft: {random_seed: 1"), "the grid itself says seeds"),
    "the runner's own": (SMALL.replace("ft: {epochs: 1", "ft: {overwrite: true"), "the grid chooses this itself"),
    "two homes of a ratio": (SMALL + "  badnet: {pratio: 0.2}\n", "overrides.badnet.pratio contradicts ratios"),
    "two homes of a share": (SMALL + "  defense: {ratio: 0.2}\n", "contradicts clean_shares"),
    "twice, by two names": (SMALL + "  clp: {u: 2, clp_u: 3}\n", "no such setting"),
    "a flag under two names": (SMALL + "  badnet: {attack_target: 0, target_label: 1}\n", "under two of its names"),
    "the same key twice": (SMALL + "  ft: {lr: 1}\n", "ft is given twice"),
    "a name that no file has": (SMALL + 'include: "a\\0b"\n', "include: it has the character NUL"),
    "a block's unknown key": (SMALL + "blocks:\n  - {published: x}\n", "blocks[0] has 'published'"),
    "an override of defenses without any": (
        "dataset: digits\nattacks: [badnet]\noverrides: {defense: {lr: 1}}\n",
        "overrides has defense, which no block runs",
    ),
    "an override that acts in no block": (SMALL + "  sau: {lr: 1}\n", "overrides has sau, which no block runs"),
    "an override that acts nowhere": (SMALL + "blocks:\n  - {overrides: {sau: {lr: 1}}}\n", "does not run"),
    "blocks that are none": (SMALL + "blocks: 3\n", "list of mappings"),
    "overrides that are none": ("dataset: digits\nattacks: [badnet]\noverrides: [1]\n", "mapping of methods"),
    "GPUs without CUDA": (SMALL + "gpus: 0.5\n", "device is cpu, but gpus is 0.5"),
    "one GPU and a half": (SMALL + "device: cuda\ngpus: 1.5\n", "share up to 1 or a whole number"),
    "a share above 1": (SMALL.replace("[0.1]\noverrides", "[5]\noverrides"), "ratio (clean share) is 5"),
    "two homes of the pictures": (SMALL + "  clp: {index: configs}\n", "index is /"),
    "a file that is none": (
        SMALL + "  badnet: {patch_mask_path: nowhere.png}\n",
        "badnet: patch_mask_path: cannot read /",
    ),
    "one class with too few pictures": (
        "dataset: tiny\nattacks: [sig]\nratios: [0.0051]\n",
        "sig: pratio is 0.0051, which is 510 of 100000 pictures of tiny, but its class has 500; allowed is up to 0.005",
    ),
    "a setting of a method that one block runs": (
        SMALL + "  sau: {lrr: 1}\nblocks:\n  - {}\n  - {defenses: [sau]}\n",
        "overrides.sau.lrr: sau has no such setting",
    ),
    "a setting of no attack": (
        SMALL.replace("{width: 2,", "{widht: 2,"),
        "no attack has such setting; did you mean width?",
    ),
    "a setting of no defense": (SMALL + "  defense: {lrr: 1}\n", "overrides.defense.lrr: no defense has such setting"),
    "no clean picture": (
        LARGE + "defenses: [ft]\nclean_shares: [1.0e-5]\n",
        "ft: ratio (clean share) is 1e-05, which is less than one of 50000 pictures of cifar10; allowed is 2e-05",
    ),
    "no such network": (SMALL + "  badnet: {model: vgg20}\n", "attack badnet: unknown model 'vgg20'; choose preact"),
    "a network without channels": (SMALL.replace("width: 2", "width: 0"), "badnet: width is 0, allowed is 1 and more"),
    "a target beyond the classes": (
        LARGE + "overrides: {badnet: {attack_target: 10}}\n",
        "badnet: attack_target is 10, allowed is 0..9",
    ),
    "memory": (SMALL + "memory_gb: .nan\n", "memory_gb is nan"),
    "no timeout": (SMALL + "cell_timeout: .nan\n", "cell_timeout is nan"),
    "retries": (SMALL + "retries: -1\n", "retries is -1"),
    "timeout": (SMALL + "cell_timeout: 0\n", "cell_timeout is 0"),
    "seed": (SMALL + "seeds: [-1]\n", "random_seed is -1"),
    "an engine that has gone": (SMALL + "slurm: {partition: gpu}\n", "slurm"),
    "the grid's threads": (SMALL.replace("ft: {epochs: 1", "ft: {threads: 2"), "the grid itself says threads"),
    "the grid's device": (SMALL.replace("ft: {epochs: 1", "ft: {device: cpu"), "the grid itself says device"),
    "the grid's precision": (SMALL.replace("ft: {epochs: 1", "ft: {amp: true"), "the grid itself says amp"),
    "the grid's compiler": (SMALL.replace("ft: {epochs: 1", "ft: {compile: true"), "the grid chooses this itself"),
    "a limit of a run": (SMALL.replace("ft: {epochs: 1", "ft: {max_minutes: 5"), "the grid chooses this itself"),
    "a ratio twice": (SMALL.replace("ratios: [0.1]", "ratios: [0.1, 0.1]", 1), "ratios has 0.1 twice"),
    "a share twice": (SMALL.replace("shares: [0.1]", "shares: [0.1, 0.1]"), "clean_shares has 0.1 twice"),
    "a file that is a number": (
        SMALL + "  badnet: {patch_mask_path: 3}\n",
        "patch_mask_path of badnet is 3, allowed is the path of a file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_in_one_line(planned, one_line, case):
    text, words = BAD[case]
    with pytest.raises(ConfigError) as caught:
        planned(text)
    assert words in one_line(caught.value)


def test_one_class_may_be_poisoned_whole_and_others_have_no_such_bound(planned):
    for dataset, attacks, ratio in (("tiny", "sig", 0.005), ("cifar10", "sig", 0.1), ("tiny", "badnet, wanet", 0.1)):
        assert planned(f"dataset: {dataset}\nattacks: [{attacks}]\nratios: [{ratio}]\n")


def test_a_circle_of_includes_is_named(tmp_path, one_line):
    for name, other in (("a", "b"), ("b", "c"), ("c", "b")):
        (tmp_path / f"{name}.yaml").write_text(f"include: {other}.yaml\n")
    with pytest.raises(ConfigError) as caught:
        read(tmp_path / "a.yaml")
    assert "b.yaml -> c.yaml -> b.yaml" in one_line(caught.value)


def test_a_cell_that_fits_nowhere_is_refused_before_the_first_starts(planned, one_line, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.usable", lambda: 2)
    with pytest.raises(ConfigError) as caught:
        Local(cores=3, memory_gb=4.0).check([])
    assert "cores is 3, but this process may use 2" in one_line(caught.value)
    for change, words in (
        ({"memory_gb": 10.0}, "memory_gb is 10, but"),
        ({"threads": 3}, "threads is 3, but"),
        ({"gpus": 1.0}, "has 0"),
    ):
        cell = dataclasses.replace(planned()[0], **change)
        with pytest.raises(ConfigError) as caught:
            here = Local(cores=2, memory_gb=4.0)
            here.gpus = []
            here.check([planned()[1], cell])
        assert words in one_line(caught.value)


def test_a_root_of_another_version_is_refused(planned, tmp_path, one_line, monkeypatch):
    Store(tmp_path).prepare(planned())
    Store(tmp_path).prepare(planned())
    monkeypatch.setattr("sau.__version__", "0.0.0")
    with pytest.raises(RecordError) as caught:
        Store(tmp_path).prepare(planned())
    assert "this is 0.0.0" in one_line(caught.value)


def test_another_version_is_told_before_anything_runs(planned, script, tmp_path, monkeypatch):
    """By a dry run and by status, too; and of published summaries, whose digests are the same in all versions."""
    every, store = planned(), Store(tmp_path / "record" / "grid")
    store.prepare(every)
    for cell in every[:2]:
        finish(store, cell)
    assert publish(store, every, tmp_path / "kept") == (2, []) and of_others(store, every) == []
    monkeypatch.setattr("sau.__version__", "0.0.0")
    for flags in (("--dry_run",), ()):
        status, out, err = script("grid.py", "grid.yaml", *flags)
        assert (status, out) == (2, "") and "was made by sau" in the_error(err)
    status, out, _ = script("grid.py", "status", "grid.yaml")
    assert status == 0 and out.startswith("note: ") and "this is 0.0.0" in out and "2 finished" in out
    published = Store(tmp_path / "new", (tmp_path / "kept",))
    assert len(of_others(published, every)) == 1 and "note: 2 published summaries are" in of_others(published, every)[0]
    assert publish(published, every, tmp_path / "again") == (2, [])  # by whom they were made stays in them
    found = Store(tmp_path / "new", (tmp_path / "again",))
    assert found.summary(every[0]) == published.summary(every[0]) and published.summary(every[0])["sau"] != "0.0.0"


def test_a_root_that_does_not_say_its_version_is_not_taken(planned, tmp_path, one_line):
    """Nor is it advised to remove what says it: cells of another version would count as this one's."""
    (tmp_path / ".grid").mkdir()
    (tmp_path / ".grid" / "version.json").write_text("{")
    with pytest.raises(RecordError) as caught:
        Store(tmp_path).prepare(planned())
    assert "is damaged" in one_line(caught.value) and caught.value.args[0].endswith("; choose another --record_root")


def test_ray_that_is_not_installed_is_named(monkeypatch, one_line):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError) as caught:
        RayEngine()
    assert "pip install -e '.[ray]'" in one_line(caught.value)


def test_a_full_disk_stops_the_grid_in_one_line(planned, tmp_path, monkeypatch, one_line, drive):
    every = planned()

    def full(*args: object) -> None:
        raise RecordError("no room for it")

    monkeypatch.setattr(Store, "fail", full)
    with pytest.raises(RecordError) as caught:
        drive(every, {every[0].label: [Outcome("failed", "x", again=False)]})
    assert "no room" in one_line(caught.value)


def test_a_cell_that_finds_the_disk_full_stops_the_grid_and_is_not_to_blame(
    planned, tmp_path, monkeypatch, one_line, drive
):
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    every, store = planned(), Store(tmp_path / "root")
    with monkeypatch.context() as patched, pytest.raises(RecordError) as found:
        patched.setattr(os, "fsync", full)
        write(tmp_path / "file", b"x")
    uncaught = Outcome("failed", f"OSError: [Errno 28] {os.strerror(errno.ENOSPC)}")
    for outcome in (Outcome("failed", one_line(found.value), again=False), uncaught):
        with pytest.raises(RecordError) as caught:
            drive(every, {every[0].label: [outcome]})
        line = one_line(caught.value)
        assert line.startswith(f"the disk is full ({every[0].label}: ") and line.count("free some") == 1
        assert store.states(every)[every[0].digest].name == "waiting"
    assert not drive(every)[1]


# The order of things


def test_attacks_come_before_their_defenses_and_finished_cells_are_not_run_again(planned, drive):
    every = planned()
    engine, failures, lines = drive(every)
    assert not failures and sorted(engine.order) == sorted(cell.label for cell in every) and engine.stopped
    for cell in every:
        assert cell.attack is None or engine.order.index(cell.label) > engine.order.index(cell.label.split("/")[0])
    assert len(lines) == 6 and lines[0].startswith("[1/6] done") and lines[0].endswith("ACC 90.00, ASR 1.00; 4 s")
    again, failures, lines = drive(every)
    assert (again.order, failures, lines) == ([], [], [])


def test_a_crash_is_tried_again_and_a_mistake_is_not(planned, drive):
    every = planned()
    crash, mistake = Outcome("failed", "killed by SIGKILL"), Outcome("failed", "no such file", again=False)
    script = {every[1].label: [crash], every[2].label: [mistake], every[4].label: [crash, crash]}
    engine, failures, lines = drive(every, script)
    assert [(cell.label, reason) for cell, reason in failures] == [
        (every[2].label, "no such file"), (every[4].label, "killed by SIGKILL")
    ]  # fmt: skip
    assert engine.order.count(every[1].label) == engine.order.count(every[4].label) == 2
    assert engine.order.count(every[2].label) == 1
    assert any(line.startswith(f"again   {every[1].label}: killed by SIGKILL; try 2 of 2") for line in lines)


def test_a_try_that_left_a_later_checkpoint_does_not_count(planned, drive, monkeypatch):
    """Jobs end by time limits and by those who come first; a cell that needs five of them ends, too."""
    every, reached = planned(), iter([0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4])
    monkeypatch.setattr(Store, "progress", lambda store, cell: next(reached) if cell == every[1] else 0)
    engine, failures, lines = drive(every, {every[1].label: [Outcome("failed", "out of time")] * 5})
    assert not failures and engine.order.count(every[1].label) == 6
    assert f"again   {every[1].label}: out of time; it goes on" in lines


def test_the_training_of_a_trigger_is_progress(planned, tmp_path, monkeypatch):
    """Else an encoder that takes longer than a job would end the cell after two of them."""
    store, cells = Store(tmp_path / "root"), planned(SMALL.replace("badnet", "ssba, badnet"))
    monkeypatch.delenv("SAU_CACHE", raising=False)
    first, other = (next(cell for cell in cells if cell.name == name) for name in ("ssba", "badnet"))
    shelf = Path(store.cache, "triggers", "ssba-0123456789abcdef", CHECKPOINT)
    assert store.progress(first) == 0
    shelf.parent.mkdir(parents=True)
    shelf.write_bytes(b"")
    assert store.progress(first) == shelf.stat().st_mtime_ns and store.progress(other) == 0
    own = store.folder(first) / CHECKPOINT
    own.parent.mkdir(parents=True)
    own.write_bytes(b"")
    os.utime(own, ns=(7, 7))
    assert store.progress(first) == 7


def test_a_failed_cell_runs_again_only_when_asked(planned, drive, tmp_path):
    every = planned()
    drive(every, {every[0].label: [Outcome("failed", "why", again=False)]})
    states = Store(tmp_path / "root").states(every)
    assert [states[cell.digest].name for cell in every[:3]] == ["failed", "blocked", "blocked"]
    assert states[every[0].digest].reason == "why" and states[every[5].digest].name == "finished"
    assert drive(every)[0].order == []
    assert drive(every, retry_failed=True)[0].order[0] == every[0].label
    assert not list((tmp_path / "root" / ".grid" / "failed").iterdir())
    assert {state.name for state in Store(tmp_path / "root").states(every).values()} == {"finished"}


@pytest.mark.parametrize("retry_failed", [False, True])
def test_a_cell_that_fails_elsewhere_meanwhile_is_not_tried_again(planned, drive, tmp_path, monkeypatch, retry_failed):
    """Of two runners with equal cells one tries for both; a failure from before this call is another matter."""
    every, store, submit = planned(), Store(tmp_path / "root"), Scripted.submit
    if retry_failed:
        for cell in (every[1], every[4]):
            store.fail(cell, "long ago", 2)

    def both(self: Scripted, cell: Cell, job: Job) -> None:
        if cell.digest == every[0].digest:
            store.fail(every[1], "no such file", 1)
            store.fail(every[3], "no such file", 1)
        submit(self, cell, job)

    monkeypatch.setattr(Scripted, "submit", both)
    engine, failures, lines = drive(every, retry_failed=retry_failed)
    assert {cell.label: reason for cell, reason in failures} == {
        every[1].label: "elsewhere: no such file", every[3].label: "elsewhere: no such file",
        every[4].label: "its attack failed", every[5].label: "its attack failed",
    }  # fmt: skip
    assert sorted(engine.order) == sorted([every[0].label, every[2].label]) and len(lines) == 6
    assert store.reason(every[1]) == "no such file"


def test_a_cell_that_another_runner_has_is_waited_for(planned, drive):
    every = planned()
    wait = Outcome("later", "it is in use")
    engine, failures, lines = drive(every, {every[0].label: [wait, wait]})
    assert not failures and engine.order.count(every[0].label) == 3
    assert sum(line == f"waits   {every[0].label}: it is in use" for line in lines) == 1
    assert engine.order.index(every[1].label) > 2


def test_a_cell_whose_lock_is_held_is_not_even_started(planned, drive, tmp_path):
    every, seen = planned(), list[str]()
    folder = Store(tmp_path / "root").folder(every[0])
    acquire(folder)

    class Freed(dict[str, list[Outcome]]):
        def get(self, label: str, default: Any = None) -> Any:
            seen.append(label)
            release(folder)
            return None

    engine, failures, _ = drive(every, Freed({"": []}))
    assert not failures and seen[0] == engine.order[0] == every[3].label and len(engine.order) == 6


def test_a_cell_that_another_runner_finished_is_not_started(planned, drive, tmp_path, monkeypatch):
    every, store = planned(), Store(tmp_path / "root")
    submit = Scripted.submit

    def both(self: Scripted, cell: Cell, job: Job) -> None:
        if cell.digest == every[0].digest:  # meanwhile, elsewhere
            finish(store, every[3])
            finish(store, every[4])
        submit(self, cell, job)

    monkeypatch.setattr(Scripted, "submit", both)
    engine, failures, lines = drive(every)
    assert not failures and every[3].label not in engine.order and every[4].label not in engine.order
    assert any("elsewhere" in line for line in lines) and len(lines) == 6


def test_a_published_summary_counts_and_its_attack_is_trained_again_only_for_work_that_is_left(
    planned, drive, tmp_path
):
    every = planned()
    drive(every)
    done, kept = Store(tmp_path / "root"), tmp_path / "kept"
    assert publish(done, [*every[:2], *every[3:]], kept) == (5, [])
    assert [json.loads(line)["cell"] for line in kept.read_text().splitlines()] == sorted(load(kept))
    (tmp_path / "root").rename(tmp_path / "gone")
    engine, _, lines = drive(every, published=[kept])
    assert engine.order == [every[0].label, every[2].label] and not any("differs" in line for line in lines)
    states = Store(tmp_path / "root", (kept,)).states(every)
    assert [states[cell.digest].name for cell in every] == ["finished", "published", "finished", *["published"] * 3]
    assert drive(every, published=[kept])[0].order == []


def test_an_attack_that_comes_out_otherwise_than_published_is_told(planned, drive, tmp_path):
    every = planned()
    finish(Store(tmp_path / "other"), every[0], acc=12.0)
    publish(Store(tmp_path / "other"), every, tmp_path / "kept")
    lines = drive(every, published=[tmp_path / "kept"])[2]
    assert any(line.startswith(f"warning: {every[0].label} differs") for line in lines)


def test_a_cell_that_dies_after_its_last_file_is_done(planned, drive, monkeypatch):
    """Its record is whole, whatever its process did then."""

    def dying(engine: Scripted) -> list[tuple[Cell, Outcome]]:
        ended, engine.running = engine.running, []
        for cell in ended:
            finish(engine.store, cell)
        return [(cell, Outcome("failed", "SIGSEGV", again=True)) for cell in ended]

    monkeypatch.setattr(Scripted, "poll", dying)
    engine, failures, lines = drive(planned(), retries=0)
    assert not failures and len(engine.order) == 6 and sum("done" in line for line in lines) == 6


def test_a_damaged_cell_is_made_again(planned, drive, tmp_path):
    every = planned()
    drive(every)
    store = Store(tmp_path / "root")
    with (store.folder(every[1]) / "summary.json").open("a") as file:
        file.write(" ")
    (note,) = store.prepare(every)
    assert "differs from manifest.json" in note and "made again" in note
    assert [cell.label for cell in needed(every, store, False)] == [every[1].label]


def test_a_damaged_cell_that_is_published_is_not_made_again_and_spoils_nothing(planned, drive, tmp_path):
    every, kept = planned(), tmp_path / "kept"
    drive(every)
    publish(Store(tmp_path / "root"), every, kept)
    store = Store(tmp_path / "root", (kept,))
    summary = store.folder(every[1]) / "summary.json"
    summary.write_text(summary.read_text().replace("90.0", "12.0"))
    count, notes = publish(store, every, kept)
    assert count == 6 and len(notes) == 1 and "what was published before stays" in notes[0]
    assert publish(Store(tmp_path / "root"), every, tmp_path / "new")[0] == 5
    (note,) = store.prepare(every)
    assert "its published summary counts" in note and store.summary(every[1])["acc"] == 90
    assert needed(every, store, False) == [] and not publish(store, every, kept)[1]
    assert load(kept)[every[1].folder]["acc"] == 90


def test_a_cell_that_does_not_say_what_it_is_is_made_again_beside_its_defenses(planned, drive, tmp_path):
    every, store = planned(), Store(tmp_path / "root")
    drive(every)
    (store.folder(every[0]) / "config.yaml").write_text("- 1\n")
    (note,) = store.prepare(every)
    assert "made again" in note and os.listdir(store.folder(every[0])) == ["defense"]
    engine, failures, _ = drive(every)
    assert engine.order == [every[0].label] and not failures
    assert store.prepare(every) == [] and {state.name for state in store.states(every).values()} == {"finished"}


def test_two_runners_may_find_the_same_damage(planned, drive, tmp_path, monkeypatch):
    every, store = planned(), Store(tmp_path / "root")
    drive(every)
    file = store.folder(every[1]) / "manifest.json"
    file.write_text("{}")
    running = Store.running
    monkeypatch.setattr(Store, "running", lambda store, cell: (file.unlink(missing_ok=True), running(store, cell))[1])
    assert len(store.prepare(every)) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [("{", "line 2 is no summary"), ('{"cell": "CELL"}', "holds no scores"), ("[1]", "line 2 is no summary")],
)
def test_a_published_file_that_is_no_summary_is_refused(planned, tmp_path, one_line, content, words):
    every = planned()
    (tmp_path / "kept").write_text(f'{{"cell": "other"}}\n{content.replace("CELL", every[0].folder)}\n')
    with pytest.raises(RecordError) as caught:
        Store(tmp_path / "root", (tmp_path / "kept",)).prepare(every)
    assert words in one_line(caught.value)


def test_a_published_attack_that_cannot_be_trained_again_blocks_its_defenses(planned, drive, tmp_path):
    every, kept = planned(), tmp_path / "kept"
    drive(every)
    publish(Store(tmp_path / "root"), [every[0], *every[2:]], kept)
    (tmp_path / "root").rename(tmp_path / "gone")
    store = Store(tmp_path / "root", (kept,))
    assert "left: 2 cells" in status(every, store)[1]  # the attack, for its weights are not kept
    why = {every[0].label: [Outcome("failed", "why", again=False)]}
    assert [cell.label for cell, _ in drive(every, why, published=[kept])[1]] == [every[0].label, every[1].label]
    lines = status(every, store)
    assert lines[0] == "6 cells: 5 published, 1 blocked" and lines[1].startswith(f"failed  {every[0].label}: why; see ")
    assert drive(every, published=[kept])[0].order == []
    assert drive(every, published=[kept], retry_failed=True)[0].order == [every[0].label, every[1].label]


def test_status_counts_and_names_what_runs_and_what_failed(planned, tmp_path):
    every, store = planned(), Store(tmp_path)
    finish(store, every[0])
    store.fail(every[1], "killed by SIGKILL", 2)
    with used(store, every[2]):
        lines = status(every, store)
    assert lines[0] == "6 cells: 1 finished, 1 running, 3 waiting, 1 failed"
    assert lines[1] == f"running {every[2].label}"
    assert lines[2] == f"failed  {every[1].label}: killed by SIGKILL; see {store.errors(every[1])}"
    assert lines[3] == "left: 4 cells"


def test_ten_thousand_cells_are_planned_and_looked_through_quickly(tmp_path, planned):
    """Half of them finished, a thousand failed, a hundred running. 5 and 2 seconds are asked (measured without tests: 3
    and 1); here every call has its types checked, so the time is counted in that of making their files."""
    text = SMALL.replace("[badnet, prototype]", "[badnet, blended, lf, ssba, wanet, inputaware, prototype]")
    text = text.replace("[ft, clp]", "[sau, ft, at, ft-sam, d3, fst, nad, i-bau, nc, npd, fp, anp, rnp, clp, bnp, ep]")
    text += f"seeds: [{', '.join(map(str, range(85)))}]\n"
    started = time.process_time()
    every = planned(text)
    took = time.process_time() - started
    store = Store(tmp_path / "root")
    (store.own / "failed").mkdir(parents=True)
    started = time.process_time()
    for number, cell in enumerate(every):
        folder, key = store.folder(cell), storing._key(cell)
        if number % 2:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "summary.json").write_text('{"acc": 90.0, "seconds": 4.0}')
            (folder / "config.yaml").touch()
            (folder / "manifest.json").write_bytes(manifest([folder / "summary.json", folder / "config.yaml"]))
        elif number % 10 == 0:
            (store.own / "failed" / key).write_text('{"reason": "killed"}')
        elif number % 100 == 2:
            acquire(folder)
    made = time.process_time() - started
    started = time.process_time()
    store.prepare(every)
    todo = needed(every, store, retry_failed=False)
    took += time.process_time() - started
    started = time.process_time()
    lines = status(every, store)
    looked = time.process_time() - started
    release_all()
    assert len(every) == 10_115 and 3_000 < len(todo) < 4_500
    assert lines[0].startswith("10115 cells: 5057 finished, 102 running, ")
    assert took < 10 * made and looked < 4 * made, (took, looked, made)


# Slots and processes


def test_gpus_are_shared_out(planned, monkeypatch):
    class Nothing:
        def __init__(self, job: Job, gpus: str | None) -> None:
            seen.append(gpus)

    seen: list[str | None] = []
    monkeypatch.setattr("sau.grid.engines.Child", Nothing)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    here, plan = Local(cores=8, memory_gb=64.0), planned(SMALL + "seeds: [0, 1, 2]\n")
    here.gpus = [1.0, 1.0]
    job = Store(Path("x")).job(plan[0], None)
    shares = [0.5, 0.75, 0.5, 0.5, 1.0, 0.25, 2.0]
    fitted = []
    for cell, share in zip(plan, shares, strict=False):
        cell = dataclasses.replace(cell, gpus=share)
        fitted.append(here.room(cell))
        if fitted[-1]:
            here.submit(cell, job)
    assert fitted == [True, True, True, False, False, True, False] and seen == ["4", "7", "4", "7"]
    here.running.clear()
    here.submit(dataclasses.replace(plan[0], gpus=2.0), job)
    assert seen[-1] == "4,7"


def test_cores_and_memory_are_never_oversubscribed(planned, monkeypatch):
    monkeypatch.setattr("sau.grid.engines.Child", lambda job, gpus: None)
    job = Store(Path("x")).job(planned()[0], None)
    for change, most in ({"threads": 2, "memory_gb": 1.0}, 2), ({"threads": 1, "memory_gb": 3.0}, 3):
        here, count = Local(cores=5, memory_gb=10.0), 0
        for cell in planned():
            cell = dataclasses.replace(cell, **change)
            if here.room(cell):
                here.submit(cell, job)
                count += 1
        assert count == most


def test_a_process_that_is_not_to_be_had_is_that_cells_failure(planned, monkeypatch, tmp_path):
    def none(job: Job, gpus: str | None) -> Child:
        raise RecordError("cannot start a cell with its output in x: Resource temporarily unavailable")

    monkeypatch.setattr("sau.grid.engines.Child", none)
    here, cell = Local(cores=2, memory_gb=8.0), planned()[0]
    here.submit(cell, Store(tmp_path).job(cell, None))
    ((failed, outcome),) = here.poll()
    assert failed is cell and (outcome.status, outcome.again) == ("failed", True)
    assert "temporarily unavailable" in outcome.reason and here.poll() == [] and here.room(cell)


@pytest.mark.parametrize("own", [None, "mine"])
def test_triggers_that_are_trained_lie_where_every_engine_finds_them(planned, tmp_path, monkeypatch, own):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SAU_CACHE")
    if own is not None:
        monkeypatch.setenv("SAU_CACHE", own)
    store, seen = Store(tmp_path / "root"), list[str]()
    monkeypatch.setattr(subprocess, "Popen", lambda argv, env, **more: seen.append(env["SAU_CACHE"]))
    job = store.job(planned()[0], None)
    monkeypatch.delenv("SAU_CACHE", raising=False)  # as on another machine
    Child(job)
    assert seen == [str(tmp_path / own) if own else str(tmp_path / "root" / ".grid" / "cache")]


def test_what_waits_for_a_cell_is_light():
    """A worker of Ray holds no second copy of torch beside that of the cell."""
    code = "import sys; import sau.grid.cells; print('torch' in sys.modules)"
    env = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_device_a_network_and_a_size_make_other_cells(planned):
    def digests(text: str) -> set[str]:
        return {cell.digest for cell in planned(text)}

    assert not digests(SMALL) & digests(SMALL.replace("dataset: digits", "dataset: digits\ndevice: cuda\ngpus: 1"))
    signs = SMALL.replace("digits", "gtsrb")
    base = digests(signs.replace("{width: 2, epochs: 1}", "{epochs: 1, model: resnet18}"))
    for other in ("{epochs: 1, model: resnet34}", "{epochs: 1, model: resnet18, img_size: 48}"):
        assert not base & digests(signs.replace("{width: 2, epochs: 1}", other))


def test_kept_summaries_are_still_those_of_their_cells():
    """Whatever is added to what a digest is of, cells without it keep theirs, or weeks of runs are lost."""
    found = load(REPOSITORY / "docs" / "results" / "table1_cpu.jsonl")
    known = {cell.folder for cell in cells(read(REPOSITORY / "configs" / "grid" / "table1_cpu.yaml")[1])}
    assert len(found) >= 215 and found.keys() <= known


def test_a_cell_that_another_process_runs_is_for_later(tmp_path, capsys, monkeypatch):
    def refuse(folder: Path) -> None:
        raise LockedError(f"{folder} is in use")

    monkeypatch.setattr("sau.grid.work.acquire", refuse)
    assert work(tmp_path / "folder", ["attack", "nothing"]) == LOCKED
    assert "is in use" in the_error(capsys.readouterr().err)


def test_a_cell_for_cuda_does_not_run_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    flags = ["attack", "badnet", "--dataset=digits", "--device=cuda", f"--record_root={tmp_path}"]
    assert work(tmp_path / "a", flags) == 2
    assert "device is 'cuda', but" in the_error(capsys.readouterr().err) and not (tmp_path / "a").exists()


def test_a_cell_that_cannot_be_started_is_one_line(tmp_path, one_line):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(RecordError) as caught:
        Child(Job("attack", "badnet", (), "x", str(tmp_path / "logs" / "log"), 1, None))
    assert "cannot start a cell" in one_line(caught.value)


SLEEPER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("threads", os.environ["OMP_NUM_THREADS"], flush=True)
time.sleep(60)
"""


def test_a_process_that_hangs_is_killed_and_one_that_dies_says_of_what(tmp_path, monkeypatch):
    """With a program of our own in the place of Python's: it prints, and sleeps or dies."""
    monkeypatch.setattr("sau.grid.cells.GRACE", 0.2)
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\n{SLEEPER}")
    program.chmod(0o755)
    monkeypatch.setattr("sau.grid.cells.sys", type("other", (), {"executable": str(program)}))
    job = Job("attack", "badnet", (), str(tmp_path / "x"), str(tmp_path / "log"), 3, 1.0)
    child = Child(job)
    while (outcome := child.poll()) is None:
        time.sleep(0.05)
    assert outcome == Outcome("failed", "no end after 1 s (cell_timeout)") and child.process.returncode == -9
    assert (tmp_path / "log.out").read_text() == "threads 3\n"
    for code, reason, again in (
        ("raise SystemExit(3)", "exit status 3", True),
        ("os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL, perhaps for want of memory", True),
        ("os.kill(os.getpid(), signal.SIGRTMIN + 6)", f"killed by signal {signal.SIGRTMIN + 6}", True),
        ("raise ValueError('broken')", "ValueError: broken", True),
        ("raise SystemExit(1)", "exit status 1", True),
        ("print('error: no such file', file=sys.stderr); raise SystemExit(2)", "no such file", False),
    ):
        program.write_text(f"#!{sys.executable}\nimport os, signal, sys\n{code}\n")
        child = Child(job)
        while (outcome := child.poll()) is None:
            time.sleep(0.02)
        assert outcome == Outcome("failed", reason, again)


def test_a_process_gets_its_threads_its_devices_and_this_library(planned, tmp_path, monkeypatch):
    """As a session of its own, so that Ctrl-C reaches the grid alone, and without the folder that it starts in."""
    seen: dict[str, Any] = {}
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **more: seen.update(more, argv=argv))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "9")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    job = dataclasses.replace(Store(tmp_path).job(planned()[0], None), threads=3)
    Child(job, "4,7")
    threads = {seen["env"][f"{library}_NUM_THREADS"] for library in ("OMP", "MKL", "OPENBLAS")}
    assert threads == {"3"} and seen["env"]["CUDA_VISIBLE_DEVICES"] == "4,7"
    assert seen["env"]["PYTHONPATH"] == str(REPOSITORY) and "-P" in seen["argv"] and seen["start_new_session"]
    Child(job)
    assert seen["env"]["CUDA_VISIBLE_DEVICES"] == "9"


def test_a_process_that_finds_its_cell_in_use_is_to_come_later(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport sys\nprint('error: it is in use', file=sys.stderr)\nraise SystemExit({LOCKED})\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr("sau.grid.cells.sys", type("other", (), {"executable": str(program)}))
    child = Child(Job("attack", "badnet", (), "x", str(tmp_path / "log"), 1, None))
    assert child.process.wait(60) == LOCKED and child.poll() == Outcome("later", "it is in use")


def test_a_worker_that_is_interrupted_stops_its_cell(tmp_path, monkeypatch):
    class Running:
        def __init__(self, job: Job) -> None:
            pass

        def poll(self) -> None:
            raise KeyboardInterrupt

        def stop(self) -> None:
            stopped.append(True)

    stopped: list[bool] = []
    monkeypatch.setattr("sau.grid.cells.Child", Running)
    with pytest.raises(KeyboardInterrupt):
        run_cell(Job("attack", "badnet", (), "x", str(tmp_path / "log"), 1, None))
    assert stopped == [True]


def test_a_cell_that_is_finished_by_now_is_not_run(planned, tmp_path, monkeypatch):
    store, cell = Store(tmp_path), planned()[0]
    finish(store, cell)
    monkeypatch.setattr("sau.grid.work.main", lambda argv: 1)
    assert work(store.folder(cell), ["attack", "badnet"]) == 0


def test_a_share_goes_to_the_fullest_gpu_that_has_room_and_fills_it(planned, monkeypatch):
    seen: list[str | None] = []
    monkeypatch.setattr("sau.grid.engines.Child", lambda job, gpus: seen.append(gpus))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    here, plan = Local(cores=8, memory_gb=64.0), planned(SMALL + "seeds: [0, 1, 2]\n")
    here.gpus = [1.0, 1.0]
    for cell, share in zip(plan, (0.5, 0.9, 0.1, 0.5), strict=False):
        cell = dataclasses.replace(cell, gpus=share)
        assert here.room(cell)
        here.submit(cell, Store(Path("x")).job(cell, None))
    assert seen == ["0", "1", "1", "0"]  # 1.0 - 0.9 is less than 0.1


def test_all_cells_are_asked_to_stop_before_the_first_is_waited_for(planned, monkeypatch):
    class Slow:
        def __init__(self, job: Job, gpus: str | None) -> None:
            pass

        def interrupt(self) -> None:
            calls.append("asked")

        def stop(self) -> None:
            calls.append("stopped")

    calls: list[str] = []
    monkeypatch.setattr("sau.grid.engines.Child", Slow)
    here = Local(cores=8, memory_gb=64.0)
    for cell in planned()[:2]:
        here.submit(cell, Store(Path("x")).job(cell, None))
    here.stop()
    assert calls == ["asked", "asked", "stopped", "stopped"] and not here.running


def test_the_scores_of_a_defense_are_those_after_it():
    before, after = {"acc": 90.0, "asr": 98.0}, {"acc": 88.0, "asr": 2.0, "racc": 80.0}
    assert scores({"before": before, "after": after, "der": 96.0}) == "ACC 88.00, ASR 2.00"
    assert scores({"acc": 90.0, "asr": None}) == "ACC 90.00"


def test_the_engine_is_stopped_whatever_ends_the_grid(planned, tmp_path, monkeypatch):
    every, store = planned(), Store(tmp_path / "root")

    def stopped(self: Scripted) -> list[tuple[Cell, Outcome]]:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scripted, "poll", stopped)
    engine = Scripted(store)
    runner = Runner(every, store, engine, retries=0, timeout=None, say=lambda line: None)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert engine.stopped


def test_a_quota_that_is_used_up_stops_the_grid_too(planned, drive):
    every = planned()
    full = Outcome("failed", f"OSError: [Errno 122] {os.strerror(errno.EDQUOT)}")
    with pytest.raises(RecordError, match="the disk is full"):
        drive(every, {every[0].label: [full]})


def test_another_asr_than_published_is_told(planned, drive, tmp_path):
    every, other = planned(), Store(tmp_path / "other")
    for cell in every[:2]:
        finish(other, cell, asr=50.0)
    publish(other, every[:1], tmp_path / "kept")
    lines = drive(every, published=[tmp_path / "kept"])[2]
    assert any(line.startswith(f"warning: {every[0].label} differs") for line in lines)


def test_a_cell_in_use_elsewhere_lets_the_others_go_first(planned, drive, monkeypatch):
    monkeypatch.setattr("sau.grid.runner.ELSEWHERE", 0.5)
    every = planned()
    engine, failures, _ = drive(every, {every[0].label: [Outcome("later", "it is in use")]})
    assert not failures and engine.order[:4] == [every[at].label for at in (0, 3, 4, 5)]


def test_status_shares_what_is_left_among_those_that_run_and_names_no_blocked_cell(planned, tmp_path):
    every, store = planned(), Store(tmp_path)
    store.fail(every[0], "why", 1)
    with used(store, every[3], every[4]):
        lines = status(every, store)
    assert [line.split()[0] for line in lines] == ["6", "running", "running", "failed", "left:"]
    assert lines[-1] == "left: 3 cells"


def test_what_failed_once_and_is_finished_now_or_runs_again_has_not_failed(planned, tmp_path):
    every, store = planned(), Store(tmp_path)
    finish(store, every[0])
    for cell in (every[0], every[3]):
        store.fail(cell, "why", 1)
    with used(store, every[3]):
        states = store.states(every)
        assert not any(line.startswith("failed") for line in status(every, store))
    names = [states[cell.digest].name for cell in every]
    assert names == ["finished", "waiting", "waiting", "running", "waiting", "waiting"]
    finish(other := Store(tmp_path / "other"), every[1])
    publish(other, every, tmp_path / "kept")
    store = Store(tmp_path, (tmp_path / "kept",))
    store.fail(every[1], "why", 1)
    assert store.states(every)[every[1].digest] == State("published")


def test_a_damaged_cell_that_somebody_makes_again_is_left_to_them(planned, tmp_path):
    every, store = planned(), Store(tmp_path)
    finish(store, every[0])
    (store.folder(every[0]) / "summary.json").write_text("{}")
    with used(store, every[0]):
        assert store.prepare(every) == [] and (store.folder(every[0]) / "manifest.json").is_file()


def test_jobs_name_their_places_wholly(planned, tmp_path, monkeypatch):
    """Their workers start in other folders, and do not know what ~ is of this user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    monkeypatch.setenv("SAU_CACHE", "~/cache")
    cell = planned(SMALL.replace("digits", "digits\ndataset_path: there"))[0]
    job = Store(Path("root")).job(cell, None)
    assert all(os.path.isabs(place) for place in (job.folder, job.log))
    assert f"--record_root={tmp_path}/root" in job.flags and f"--dataset_path={tmp_path}/there" in job.flags
    assert job.cache == str(tmp_path / "me" / "cache")


def test_overrides_of_methods_that_are_included_may_be_added_to(planned, tmp_path):
    block = "blocks:\n  - {attacks: [badnet], overrides: {ft: {lr: 0.5}}}\n"
    planned(SMALL + block, "base.yaml")
    _, (found,) = read_text(tmp_path, "include: base.yaml\noverrides: {ft: {wd: 0.1}}\n")
    assert found.overrides["ft"] == {"epochs": 1, "wd": 0.1, "lr": 0.5}


def test_a_clean_share_of_one_picture_is_taken(planned):
    assert planned(LARGE + "defenses: [ft]\nclean_shares: [2.0e-5]\n")


def test_a_dry_run_changes_nothing(planned, script, tmp_path):
    planned()
    status, out, _ = script(
        "grid.py", "grid.yaml", "--dry_run", "--only", "badnet*", "--cores", "1", "--memory_gb", "3"
    )
    assert status == 0 and "would run badnet_r0.1_s0\nwould run badnet_r0.1_s0/defense/ft_c0.1" in out
    assert out.splitlines()[-1] == "3 cells"
    assert [file.name for file in tmp_path.iterdir()] == ["grid.yaml"]


@pytest.mark.parametrize("gpus", ["0.25", "2"])
def test_a_dry_run_shows_the_cells_of_another_machine(planned, script, monkeypatch, gpus):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    planned(f"{SMALL}device: cuda\ngpus: {gpus}\n")
    status, out, err = script("grid.py", "grid.yaml", "--dry_run")
    assert (status, err) == (0, "") and f"note: badnet_r0.1_s0: gpus is {gpus}, but this machine has 0\n" in out
    assert out.count("would run ") == 6 and out.splitlines()[-1] == "6 cells"
    status, _, err = script("grid.py", "grid.yaml")
    assert status == 2 and f"gpus is {gpus}" in the_error(err)


def test_a_reader_that_leaves_ends_the_script_quietly(planned, tmp_path):
    planned()
    argv = [sys.executable, str(REPOSITORY / "scripts" / "grid.py"), "grid.yaml", "--dry_run"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, cwd=tmp_path, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        process.stdout.close()  # long before the first line, as imports take their time
        assert process.stderr.read() == ""
        assert process.wait(60) == 1


def test_the_script_looks_publishes_and_has_nothing_to_do(planned, script, tmp_path):
    every, store = planned(), Store(tmp_path / "record" / "grid")
    for cell in every:
        finish(store, cell)
    assert script("grid.py", "status", "grid.yaml") == (0, "6 cells: 6 finished\n", "")
    assert script("grid.py", "status", "grid.yaml", "--only", "clp") == (0, "4 cells: 4 finished\n", "")
    assert script("grid.py", "grid.yaml", "--publish", "kept", "--only", "clp")[:2] == (
        0,
        "4 summaries of 4 cells are in kept\n",
    )
    status, out, _ = script("grid.py", "grid.yaml")
    assert status == 0 and "6 cells, 0 to run" in out
    status, out, _ = script("grid.py", "status", "grid.yaml", "--record_root", "new", "--published", "kept")
    assert status == 0 and out.startswith("6 cells: 4 published, 2 waiting")
    store.fail(every[0], "why", 1)
    (store.folder(every[0]) / "manifest.json").unlink()
    status, out, _ = script("grid.py", "grid.yaml")
    assert status == 1 and f"failed  {every[0].label}: why" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("none.yaml",), "none.yaml: No such file or directory;"),
        (("grid.yaml", "--only", "x"), "--only 'x' fits no cell"),
        (("grid.yaml", "--memory_gb", "1"), "memory_gb is 2, but this machine has 1"),
        (("grid.yaml", "--retries", "-1"), "retries is -1"),
        (("grid.yaml", "--cell_timeout", "nan"), "--cell_timeout is nan"),
        (("grid.yaml", "--address", "auto"), "--address has an effect only with --engine ray"),
        (
            ("grid.yaml", "--engine", "ray", "--address", "x", "--cores", "2"),
            "--cores has an effect only with --engine local",
        ),
        (("grid.yaml", "--engine", "ray", "--memory_gb", "2"), "--memory_gb has an effect only with --engine local"),
        (("status", "grid.yaml", "--publish", "kept"), "--publish has no effect on status"),
        (("status", "grid.yaml", "--retry_failed"), "--retry_failed has no effect on status"),
        (("status", "grid.yaml", "--retries", "0"), "--retries has no effect on status"),
        (("status", "grid.yaml", "--cell_timeout", "9"), "--cell_timeout has no effect on status"),
        (("status", "grid.yaml", "--engine", "local"), "--engine has no effect on status"),
        (("status", "grid.yaml", "--cores", "1"), "--cores has no effect on status"),
        (("status", "grid.yaml", "--memory_gb", "1"), "--memory_gb has no effect on status"),
        (("grid.yaml", "--dry_run", "--publish", "kept"), "--dry_run has no effect on --publish"),
        (("grid.yaml", "--publish", "kept", "--retry_failed"), "--retry_failed has no effect on --publish"),
        (("grid.yaml", "--publish", "kept", "--engine", "local"), "--engine has no effect on --publish"),
        (("grid.yaml", "--published", "nowhere"), "--published nowhere is no file; name one that is there, or none"),
        (("loop.yaml",), "loop.yaml: Too many levels of symbolic links"),
        (("grid.yaml", "--publish", "."), "--publish . is a folder; name a file"),
        (("grid.yaml", "--publish", "grid.yaml"), "grid.yaml, line 1 is no summary"),
        (("grid.yaml", "--cores", "0"), "--cores is 0"),
        (("grid.yaml", "--memory_gb", "0"), "--memory_gb is 0"),
        (("far.yaml",), "there is no folder /nowhere/train"),
        (
            ("grid.yaml", "--record_root", "grid.yaml"),
            "grid.yaml is a file, not a folder; choose another --record_root",
        ),
        (("grid.yaml", "--record_root", "grid.yaml/below"), "grid.yaml is a file, not a folder"),
    ],
)
def test_the_script_says_mistakes_in_one_line(planned, script, flags, words):
    planned(SMALL.replace("digits", "folder\ndataset_path: /nowhere"), "far.yaml")
    planned()
    Path("loop.yaml").symlink_to("loop.yaml")
    status, _, err = script("grid.py", *flags)
    assert status == 2 and words in the_error(err)


def test_only_data_of_cells_that_are_to_run_is_looked_for(planned, script, tmp_path):
    """Two blocks, of which one has its data set; its cells end at once, for no process is to be had."""
    every = planned(SMALL + "blocks:\n  - {}\n  - {dataset: folder, dataset_path: /nowhere, attacks: [lf]}\n")
    (tmp_path / "record" / "grid").mkdir(parents=True)
    (tmp_path / "record" / "grid" / ".grid" / "logs").parent.mkdir()
    (tmp_path / "record" / "grid" / ".grid" / "logs").write_text("a file, so that no cell is started")
    status, _, err = script("grid.py", "grid.yaml", "--retries", "0")
    assert status == 2 and "there is no folder /nowhere/train" in the_error(err)
    status, out, err = script("grid.py", "grid.yaml", "--retries", "0", "--only", every[0].label)
    assert (status, err) == (1, "") and "1 cells, 1 to run" in out and "cannot start a cell" in out


@pytest.mark.parametrize("flags", [("grid.yaml", "--dry_run"), ("status", "grid.yaml")])
def test_ctrl_c_before_the_first_cell_is_one_line(planned, script, monkeypatch, flags):
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    planned()
    monkeypatch.setattr(Store, "over", stop)
    status, _, err = script("grid.py", *flags)
    assert (status, err) == (130, "\nstopped; repeat the command to go on\n")


def test_the_grid_computes_what_the_commands_by_hand_do(tmp_path, here, script, planned):
    """Through the script: two cells, then nothing; the same bytes as attack/badnet.py and defense/clp.py leave."""
    text = (
        SMALL.replace("[badnet, prototype]", "[badnet]")
        .replace("[ft, clp]", "[clp]")
        .replace("  ft: {epochs: 1}\n", "")
    )
    every = planned(text)
    status, out, err = script("grid.py", "grid.yaml", "--record_root", "grid")
    assert status == 0 and "2 cells: 2 finished" in out and "[2/2] done" in out, out + err
    assert needed(every, Store(tmp_path / "grid"), retry_failed=False) == []
    attack = ("--dataset", "digits", "--pratio", "0.1", "--width", "2", "--epochs", "1", *QUICK)
    assert here("attack", "badnet", *attack, "--save_folder_name", "a")[0] == 0
    assert here("defense", "clp", "--result_file", "a", "--ratio", "0.1", *QUICK, "--save_folder_name", "mine")[0] == 0
    for cell, folder in zip(
        every, (tmp_path / "record" / "a", tmp_path / "record" / "a" / "defense" / "mine"), strict=True
    ):
        mine = Store(tmp_path / "grid").folder(cell)
        assert Record(mine).check()["command"].startswith(f"sau {cell.kind} {cell.name} --")
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (mine / file.name).read_bytes()
        scores = [json.loads((place / "summary.json").read_text()) for place in (folder, mine)]
        for found in scores:
            del found["seconds"], found["peak_memory_mb"]
        assert scores[0] == scores[1]
