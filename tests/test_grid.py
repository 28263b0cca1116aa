"""The plan of a grid, the order of its cells, and what is kept of them; most cells are stubs."""

import json
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from grids import SMALL, Scripted, finish, plan
from toys import QUICK, REPOSITORY, refuses, the_error

from sau.errors import ConfigError, RecordError
from sau.files import acquire, release
from sau.grid import engines
from sau.grid.command import needed, run_cells, status
from sau.grid.engines import Cell, Local, Outcome, run_cell
from sau.grid.plan import cells, read, select
from sau.grid.store import Store, load, parse_name, publish
from sau.record.folder import Record

GRIDS = REPOSITORY / "configs" / "grid"
RESULTS = REPOSITORY / "docs" / "results"


@pytest.fixture
def planned(tmp_path) -> Callable[..., list[Cell]]:
    """`planned(text)` are the cells of a grid file with that text."""
    return lambda text=SMALL, name="grid.yaml": plan(tmp_path / name, text)


@pytest.fixture
def drive(tmp_path, monkeypatch) -> Callable[..., tuple[Scripted, list[Cell], list[str]]]:
    """`drive(cells, script)` runs a grid on a scripted engine: the engine, the cells that failed, and the lines."""

    def run(every, script=None, *, published=()):
        store, lines = Store(tmp_path / "root", tuple(published)), list[str]()
        todo = needed(every, store)
        engine = Scripted(store, script or {})
        monkeypatch.setattr("sau.grid.command.say", lines.append)
        return engine, run_cells(todo, store, engine, 1), lines

    return run


def test_an_attack_is_one_cell_for_all_of_its_defenses(planned):
    every = planned()
    labels = [cell.label for cell in every]
    assert labels[:3] == ["badnet_r0.1_s0", "badnet_r0.1_s0/defense/ft_c0.1", "badnet_r0.1_s0/defense/clp_c0.1"]
    assert labels[3:] == ["prototype_s0", "prototype_s0/defense/ft_c0.1", "prototype_s0/defense/clp_c0.1"]
    assert every[1].attack == every[2].attack == every[0].digest and every[0].attack is None
    assert every[1].folder.startswith(every[0].folder + "/defense/ft_c0.1_")
    assert len({cell.digest for cell in every}) == len({cell.folder for cell in every}) == 6


def test_seeds_ratios_and_shares_are_crossed(planned):
    text = SMALL.replace("ratios: [0.1]", "ratios: [0.05, 0.1]").replace("shares: [0.1]", "shares: [0.1, 0.2]")
    every = planned(text + "seeds: [0, 3]\n")
    assert len(every) == 2 * 3 * (1 + 2 + 1)  # a clean network has no poisoning ratio, and clp looks at no images
    assert {cell.label for cell in every if cell.kind == "attack"} >= {"badnet_r0.05_s3", "prototype_s3"}
    assert Counter(cell.name for cell in every)["ft"] == 2 * Counter(cell.name for cell in every)["clp"]


ALL = {"badnet", "prototype", "ft", "clp"}
CHANGES = {
    "a defense's setting": ("ft: {epochs: 1}", "ft: {epochs: 2}", {"ft"}),
    "an attack's setting": ("epochs: 1}\n  ft", "epochs: 2}\n  ft", ALL),
    "threads": ("dataset: digits", "dataset: digits\nthreads: 2", ALL),
    "precision": ("dataset: digits", "dataset: digits\namp: true", ALL),
    "device": ("dataset: digits", "dataset: digits\ndevice: cuda", ALL),
    "data set": ("dataset: digits", "dataset: cifar10", ALL),
    "network": ("{width: 2, epochs: 1}", "{model: resnet18, epochs: 1}", ALL),
    "clean share": ("clean_shares: [0.1]", "clean_shares: [0.2]", {"ft", "clp"}),
    "a measured radius": ("width: 2,", "width: 2, trigger_radius: 0.1,", ALL),
    "measured risks": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  defense: {track_risk: true}", {"ft", "clp"}),
    "risks that are not measured": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  defense: {risk_eps: 0.1}", set()),
    "memory and data folder": ("dataset: digits", "dataset: digits\nmemory_gb: 7\ndataset_path: /elsewhere", set()),
    "GPUs of a cell without any": ("dataset: digits", "dataset: digits\ngpus: 0.5", set()),
    "another name of a setting": ("width: 2,", "width: 2, weight_decay: 0.0005,", set()),
    "how often it is evaluated": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  defense: {eval_every: 1}", set()),
    "an explicit default": ("ft: {epochs: 1}", "ft: {epochs: 1}\n  badnet: {attack_target: 0}", set()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setting_makes_new_cells_only_where_it_acts(planned, change):
    old, new, names = CHANGES[change]
    kept = {cell.digest for cell in planned()}
    assert {cell.name for cell in planned(SMALL.replace(old, new)) if cell.digest not in kept} == names


def test_a_file_is_known_by_its_content_and_a_folder_of_images_by_its_path(planned, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, digests = SMALL + "  badnet: {patch_mask_path: mask.png}\n", []
    for content in ("1", "2"):
        Path("mask.png").write_text(content)
        digests.append({cell.digest for cell in planned(text)[:3]})
    assert not digests[0] & digests[1]
    assert f"--patch_mask_path={tmp_path}/mask.png" in planned(text)[0].flags  # workers start in other folders
    (elsewhere := tmp_path / "elsewhere").mkdir()
    Path("mask.png").rename(elsewhere / "mask.png")
    monkeypatch.chdir(elsewhere)
    assert {cell.digest for cell in planned(text)[:3]} == digests[1]
    one, other = (planned(SMALL.replace("digits", f"folder\ndataset_path: {place}")) for place in ("a", "b"))
    assert one[0].digest != other[0].digest


def test_blocks_replace_the_rest_and_shared_cells_come_once(planned):
    blocks = "blocks:\n  - {seeds: [0]}\n  - {seeds: [0, 1], attacks: [badnet], overrides: {ft: {lr: 0.5}}}\n"
    every = planned(SMALL + blocks)
    assert len(every) == 6 + 1 + 3  # of the second block on seed 0, attack and clp are there already
    flags = [cell.flags for cell in every if cell.name == "ft" and "--lr=0.5" in cell.flags]
    assert len(flags) == 2 and all("--epochs=1" in each for each in flags)


def test_a_file_replaces_parts_of_those_that_it_includes(planned, tmp_path):
    planned(SMALL + "published: there\n", "base.yaml")
    (tmp_path / "mine.yaml").write_text("include: base.yaml\nseeds: [4]\noverrides: {ft: {lr: 0.5}}\n")
    grid = read(tmp_path / "mine.yaml")
    (block,) = grid.blocks
    wanted = {"attack.width": 2, "attack.epochs": 1, "ft.epochs": 1, "ft.lr": 0.5}
    assert block.seeds == (4,) and block.overrides == wanted and grid.published == (str(tmp_path / "there"),)


def test_some_cells_can_be_chosen_and_bring_their_attacks(planned):
    every = planned(SMALL + "seeds: [0, 1]\n")
    chosen = ["badnet_r0.1_s1", "badnet_r0.1_s1/defense/clp_c0.1"]
    assert [cell.label for cell in select(every, ["badnet*s1/*clp*"])] == chosen
    assert {cell.name for cell in select(every, ["clp"])} == {"badnet", "prototype", "clp"}
    with pytest.raises(ConfigError, match="nothing"):
        select(every, ["nothing*"])


def test_names_of_folders_are_read_back(planned):
    for folder, wanted in {
        "badnet_r5e-05_0123456789_s3": ("badnet", 5e-5, 3),
        "badnet_r2.5e-05_s3": ("badnet", 2.5e-5, 3),
        "mine_r-e_s3": ("mine_r-e", None, 3),
        "demo": ("demo", None, None),
        "sau_c1.23457e-05": ("sau", 1.23457e-5, None),
        "clp_c0.1_oracle_0123456789": ("clp", 0.1, None),
        "sau_c..": ("sau_c..", None, None),
    }.items():
        assert parse_name(folder) == wanted
    for cell in planned(SMALL + "  clp: {select: oracle}\n"):
        assert parse_name(cell.folder.split("/")[-1]).method == cell.name


@pytest.mark.parametrize("file", sorted(GRIDS.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_grid_can_be_planned_and_is_named_in_the_guide(file):
    assert len(cells(read(file).blocks)) >= 6
    table = (REPOSITORY / "docs" / "grid.md").read_text().split("The shipped grids")[1].split("\n## ")[0]
    assert f"`{file.stem}`" in re.findall(r"`[\w-]+`", table)


KEPT = (
    "table1_cpu fp32_cpu clean_share precision_cpu ratios rivals_cpu variants_cpu sau_sam_cpu sau_sam_gpu "
    "sau_sam_paper newer_cpu"
)


@pytest.mark.parametrize("name", KEPT.split())
def test_kept_results_are_still_those_of_their_cells(name):
    """Whatever is added to what a digest is of, cells without it keep theirs, or weeks of runs are lost."""
    grid, found = read(GRIDS / f"{name}.yaml"), load(RESULTS / f"{name}.jsonl")
    assert len(found) >= 6 and found.keys() <= {cell.folder for cell in cells(grid.blocks)}
    assert str(RESULTS / f"{name}.jsonl") in grid.published


def test_a_clone_repeats_no_finished_cell(tmp_path):
    grid = read(GRIDS / "table1_cpu.yaml")
    every, store = cells(grid.blocks), Store(tmp_path, [Path(file) for file in grid.published])
    assert not needed(every, store) and status(every, store) == [f"{len(every)} cells: {len(every)} published"]


# Refusals: by the key

BAD = {
    "seedz": SMALL + "seedz: [0]\n",
    "badnets": SMALL.replace("badnet,", "badnets,"),
    "clip": SMALL.replace("clp", "clip"),
    "attacks": "dataset: digits\n",
    "saw": SMALL + "  saw: {lr: 1}\n",
    "overrides: ft: epochz": SMALL.replace("ft: {epochs", "ft: {epochz"),
    "epochs": SMALL.replace("ft: {epochs: 1", "ft: {epochs: many"),
    "threads": SMALL + "threads: 0\n",
    "recipe is fast": SMALL + "recipe: fast\n",
    "seeds is": SMALL + "seeds: [-1]\n",
    "random_seed": SMALL.replace("ft: {epochs: 1", "ft: {random_seed: 1"),
    "overwrite": SMALL.replace("ft: {epochs: 1", "ft: {overwrite: true"),
    "overrides.badnet.pratio": SMALL + "  badnet: {pratio: 0.2}\n",
    "index": SMALL + "  clp: {index: mine.txt}\n",
    "blocks[0]: published": SMALL + "blocks:\n  - {published: x}\n",
    "gpus": SMALL + "gpus: 2\n",
    "blocks[0]: memory_gb": SMALL + "blocks:\n  - {memory_gb: 1}\n",
    "blocks": SMALL + "blocks: {seeds: [0]}\n",
    "overrides: ft": SMALL.replace("{epochs: 1}\n", "3\n"),
    "ratio": SMALL.replace("clean_shares: [0.1]", "clean_shares: [5]"),
    "patch_mask_path": SMALL + "  badnet: {patch_mask_path: nowhere.png}\n",
    "memory_gb": SMALL + "memory_gb: .nan\n",
    "include": "include: grid.yaml\n",
}


@pytest.mark.parametrize("key", BAD)
def test_a_wrong_file_is_refused_by_the_name_of_the_key(planned, key):
    with refuses(ConfigError, key):
        planned(BAD[key])


@pytest.mark.parametrize(
    "flags", ["--only x", "--memory_gb 1", "--memory_gb inf", "--retries -1", "--published nowhere", "--cores 4000"]
)
def test_wrong_flags_are_one_line_that_names_them(planned, script, flags):
    planned()
    status, _, err = script("grid.py", "grid.yaml", *flags.split())
    assert status == 2 and flags.split()[0].lstrip("-") in the_error(err)


def test_attacks_come_before_their_defenses_and_finished_cells_are_not_run_again(planned, drive):
    every = planned()
    engine, failed, lines = drive(every)
    assert not failed and engine.order == [cell.label for cell in every] and engine.stopped
    assert len(lines) == 6 and lines[0] == "[1/6] done    badnet_r0.1_s0: ACC 90.00, ASR 1.00; 4 s"
    again, failed, lines = drive(every)
    assert (again.order, failed, lines) == ([], [], [])


def test_a_crash_is_tried_again_and_a_mistake_is_not(planned, drive):
    every = planned()
    crash, mistake = Outcome("killed by SIGKILL"), Outcome("no such file", again=False)
    script = {every[1].label: [OSError("no process")], every[2].label: [mistake], every[4].label: [crash, crash]}
    engine, failed, lines = drive(every, script)
    assert failed == [every[2], every[4]]
    assert [engine.order.count(every[at].label) for at in (1, 2, 4)] == [2, 1, 2]
    assert any(line.startswith(f"retry   {every[1].label}: worker lost: no process; try 2 of 2") for line in lines)


def test_a_failed_cell_takes_its_defenses_along_and_the_next_call_tries_them_again(planned, drive, tmp_path):
    every, store = planned(), Store(tmp_path / "root")
    _, failed, lines = drive(every, {every[0].label: [Outcome("why", again=False)]})
    assert failed == every[:3] and f"[1/6] failed  {every[0].label}: why; see {every[0].log(store.root)}.err" in lines
    assert status(every, store) == ["6 cells: 3 finished, 3 waiting", "left: 3 cells"]
    assert drive(every)[0].order == [cell.label for cell in every[:3]] and not needed(every, store)


def test_a_published_result_counts_and_its_attack_is_trained_again_only_for_work_that_is_left(planned, drive, tmp_path):
    every, kept = planned(), tmp_path / "kept"
    drive(every)
    assert publish(Store(tmp_path / "root"), [*every[:2], *every[3:]], kept) == 5
    assert [json.loads(line)["cell"] for line in kept.read_text().splitlines()] == sorted(load(kept))
    (tmp_path / "root").rename(tmp_path / "gone")
    engine, _, lines = drive(every, published=[kept])
    assert engine.order == [every[0].label, every[2].label] and not any("differs" in line for line in lines)
    store = Store(tmp_path / "root", (kept,))
    assert [store.state(cell) for cell in every] == ["finished", "published", "finished", *["published"] * 3]
    acquire(store.folder(every[3]))
    assert status(every, store)[1:] == [f"running {every[3].label}"]
    release(store.folder(every[3]))


def test_an_attack_that_comes_out_otherwise_than_published_is_told(planned, drive, tmp_path):
    every, other = planned(), Store(tmp_path / "other")
    finish(other, every[0], acc=12.0)
    publish(other, every, tmp_path / "kept")
    lines = drive(every, published=[tmp_path / "kept"])[2]
    assert "differs" in lines[0] and not any("differs" in line for line in lines[1:])


def test_a_damaged_cell_is_neither_skipped_nor_published(planned, drive, tmp_path):
    every, store = planned(), Store(tmp_path / "root")
    drive(every)
    store.verify(every)
    summary = store.folder(every[1]) / "summary.json"
    summary.write_text(summary.read_text().replace("90.0", "12.0"))
    for look in (store.verify, lambda cells: publish(store, cells, tmp_path / "kept")):
        with pytest.raises(RecordError, match=str(store.folder(every[1]))):
            look(every)


def test_the_script_plans_looks_and_publishes(planned, script, tmp_path, monkeypatch):
    every, store = planned(), Store(tmp_path / "record" / "grid")
    status, out, _ = script("grid.py", "grid.yaml", "--dry_run", "--only", "badnet*")
    assert status == 0 and "would run badnet_r0.1_s0\nwould run badnet_r0.1_s0/defense/ft_c0.1" in out
    assert out.splitlines()[-1] == "3 cells" and os.listdir(tmp_path) == ["grid.yaml"]
    for cell in every:
        finish(store, cell)
    assert script("grid.py", "status", "grid.yaml", "--only", "clp") == (0, "4 cells: 4 finished\n", "")
    assert script("grid.py", "grid.yaml", "--publish", "kept", "--only", "clp")[0] == 0
    status, out, _ = script("grid.py", "status", "grid.yaml", "--record_root", "new", "--published", "kept")
    assert status == 0 and out.startswith("6 cells: 4 published, 2 waiting")
    status, out, _ = script("grid.py", "grid.yaml")
    assert status == 0 and "6 cells, 0 to run" in out
    (store.folder(every[0]) / "manifest.json").unlink()
    crash = Scripted(store, {every[0].label: [Outcome("why", again=False)]})
    monkeypatch.setattr("sau.grid.command.Local", lambda *given: crash)
    monkeypatch.setenv("SAU_CACHE", "")
    status, out, _ = script("grid.py", "grid.yaml")
    assert os.environ["SAU_CACHE"] == str(store.root / ".grid" / "cache")  # also of what is loaded for all cells
    assert status == 1 and f"failed  {every[0].label}: why" in out
    crash.stopped = False
    monkeypatch.setattr(Scripted, "submit", lambda *given: signal.default_int_handler(2, None))
    assert script("grid.py", "grid.yaml")[0] == 130 and crash.stopped  # whatever ends the grid


CELL = Cell("attack", "badnet", "0" * 64, "badnet_s0", "cell", (), None, 1, 0.0, ("digits", "data"))


@pytest.fixture
def program(tmp_path, monkeypatch) -> Callable[[str], None]:
    """`program(code)` stands in the place of Python's."""
    file = tmp_path / "python"
    real = sys.executable
    monkeypatch.setattr(engines.sys, "executable", str(file))
    monkeypatch.setattr(engines, "GRACE", 0.2)

    def write(code: str) -> None:
        file.write_text(f"#!{real}\nimport os, signal, sys, time\n{code}\n")
        file.chmod(0o755)

    return write


@pytest.mark.parametrize(("code", "outcome"), [
    ("raise SystemExit(3)", Outcome("exit status 3")),
    ("raise ValueError('broken\\x1b')", Outcome("ValueError: broken\\x1b")),
    ("print('error: no such file', file=sys.stderr); sys.exit(2)", Outcome("no such file", again=False)),
    ("os.kill(os.getpid(), signal.SIGTERM)", Outcome("killed by signal 15 (Terminated)")),
])  # fmt: skip
def test_how_a_process_ends_is_told(program, tmp_path, code, outcome):
    program(code)
    log = Path(CELL.log(tmp_path) + ".err")
    log.parent.mkdir(parents=True)
    log.write_text("of an earlier try\n")
    assert run_cell(CELL, tmp_path, "cache", None) == outcome


def test_a_process_gets_its_threads_and_devices_and_is_killed_after_its_time(program, tmp_path):
    program("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
            "print(*(os.environ[n] for n in ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'SAU_CACHE')), flush=True)\n"
            "print(*sys.argv[1:], flush=True); time.sleep(60)")  # fmt: skip
    outcome = run_cell(replace(CELL, threads=3, flags=("--lr=1",)), tmp_path, "cache", 1.0, "4")
    assert "cell_timeout" in outcome.reason
    first, argv = Path(CELL.log(tmp_path) + ".out").read_text().splitlines()
    assert first == "3 4 cache"
    assert argv == f"-P -m sau.grid.engines attack badnet --record_root={tmp_path} --lr=1"


def test_all_cells_are_stopped_together(program, tmp_path):
    program("open(os.environ['SAU_CACHE'] + str(os.getpid()), 'w'); time.sleep(60)")
    how = {"root": tmp_path, "cache": str(tmp_path / "started"), "timeout": None}
    here, waited = Local([CELL], how, 1.0, cores=1, memory_gb=8.0), threading.Event()
    future = here.submit(CELL)
    while not list(tmp_path.glob("started*")):
        waited.wait(0.05)
    here.stop()
    assert future.result().reason.startswith("killed by signal 15")
    (pid,) = (int(file.name.removeprefix("started")) for file in tmp_path.glob("started*"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("needs", "memory", "seen"), [
    ({"threads": 2}, 1.0, [None] * 2),
    ({}, 3.0, [None] * 3),
    ({"gpus": 0.5}, 1.0, ["4", "7", "4", "7"]),
    ({"gpus": 1.0, "threads": 4}, 1.0, ["4"]),
])  # fmt: skip
def test_cores_memory_and_gpus_are_never_oversubscribed(monkeypatch, needs, memory, seen):
    monkeypatch.setattr(engines, "cpu_count", lambda: 8)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert engines.visible_gpus() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    here = Local([CELL, replace(CELL, **needs)], {}, memory, cores=5, memory_gb=10.0)
    assert here.places == len(seen) and here.devices == seen


@pytest.mark.parametrize(("name", "needs", "memory"), [
    ("memory_gb", {}, 10.0), ("threads", {"threads": 9}, 1.0), ("device", {"gpus": 1.0}, 1.0),
])  # fmt: skip
def test_a_cell_that_fits_nowhere_is_refused_before_the_first_starts(monkeypatch, name, needs, memory):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(ConfigError) as refusal:
        Local([CELL, replace(CELL, **needs)], {}, memory, cores=1, memory_gb=4.0)
    assert refusal.value.param == name


def test_the_grid_computes_what_the_commands_by_hand_do(tmp_path, here, script, planned):
    """Two cells in processes; the same bytes as attack/badnet.py and defense/clp.py leave."""
    every = planned(SMALL.replace("[badnet, prototype]", "[badnet]").replace("[ft, clp]", "[clp]"))
    status, out, err = script("grid.py", "grid.yaml", "--record_root", "grid")
    assert status == 0 and "2 cells: 2 finished" in out and "[2/2] done" in out, out + err
    assert out.count("; the attack did not take") == 2
    attack = ("--dataset", "digits", "--pratio", "0.1", "--width", "2", "--epochs", "1", *QUICK)
    assert here("attack", "badnet", *attack, "--save_folder_name", "a")[0] == 0
    assert here("defense", "clp", "--result_file", "a", "--ratio", "0.1", *QUICK, "--save_folder_name", "mine")[0] == 0
    for cell, folder in zip(every, (Path("record/a"), Path("record/a/defense/mine")), strict=True):
        mine = Store(tmp_path / "grid").folder(cell)
        assert Record(mine).check()["command"].startswith(f"sau {cell.kind} {cell.name} --")
        for file in folder.glob("*.safetensors"):
            assert file.read_bytes() == (mine / file.name).read_bytes()
        scores = [json.loads((place / "summary.json").read_text()) for place in (folder, mine)]
        for found in scores:
            del found["seconds"], found["peak_memory_mb"]
        assert scores[0] == scores[1]
