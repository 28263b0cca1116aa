"""The command line: what it leaves, how it stops and goes on, and what it refuses with one line."""

import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import yaml
from toys import QUICK, REPOSITORY, VICTIM, command, environment, rows, stop_after, summary, the_error

import sau
from sau import cli as commands
from sau import device
from sau.attack import ATTACKS, BadNet
from sau.cli import TOOLS
from sau.config import options
from sau.data import sources
from sau.data.images import BACKDOOR, CROSS, Augment
from sau.defense import DEFENSES, FT, SAU
from sau.evaluate import Proportion, Score
from sau.optim import Training
from sau.record.attack_result import load_images
from sau.record.folder import Record
from sau.run import RECIPES, AttackRun

TINY = ("--dataset", "digits", "--width", "2", "--epochs", "0", *QUICK)  # an attack without training
PURIFY = ("--result_file", "victim", "--epochs", "2", *QUICK)


def without_time(row: dict) -> dict:
    return {name: value for name, value in row.items() if name not in ("seconds", "peak_memory_mb")}


def test_an_attack_from_a_foreign_folder(finished):
    """The folder, the screen and the log; nothing on stderr; the configuration is resolved and complete."""
    folder, out = finished / "record" / "victim", (finished / "attack.out").read_text()
    assert (finished / "attack.err").read_text() == ""
    first = out.splitlines()[0]
    assert "cpu" in first and "--recipe" in first
    assert "forecast" in out and [f"epoch {e}/4" in out for e in range(1, 5)] == [True] * 4
    assert (folder / "log.txt").read_text() == out
    Record(folder).check()
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert found["run"]["recipe"] == "cpu" and found["run"]["width"] == 4 and found["run"]["random_seed"] == 0
    assert found["threads"] == 1 and found["amp"] is False and found["versions"]["torch"] == torch.__version__
    assert found["versions"]["sau"] == sau.__version__ and "python" in found["versions"]
    assert found["command"].split()[0].endswith("attack/badnet.py") and "--save_folder_name victim" in found["command"]
    assert found["git"] is None or len(found["git"]) == 40
    assert set(options(Training)) | set(options(BadNet)) <= set(found["method"])
    assert set(options(AttackRun)) == set(found["run"])
    assert found["method"]["epochs"] == 4 and found["method"]["attack"] == "badnet"


def test_a_defense_needs_nothing_but_the_record(victim, here, monkeypatch):
    """`--result_file X` alone: data set, network, recipe and settings come from the record and the shipped YAML."""
    monkeypatch.setattr(device, "has_bf16", lambda where: False)
    monkeypatch.setattr(SAU, "step", lambda self, state, x, y: {"loss": x.mean()})  # the settings matter here
    monkeypatch.setattr(SAU, "end_epoch", lambda self, state, losses: None)
    for module in ("run", "cli"):
        monkeypatch.setattr(f"sau.{module}.score", lambda *given: Score(*[Proportion(1, 2)] * 3))
    status, out, err = here("defense", "sau", "--result_file", "victim")
    assert (status, err) == (0, "")
    folder = victim / "defense" / "sau"
    found = yaml.safe_load((folder / "config.yaml").read_text())
    assert found["method"]["eps"] == 0.2 and found["method"]["lr"] == 7.5e-4 and found["run"]["dataset"] == "digits"
    assert found["run"]["recipe"] == "cpu" and len(found["clean_index"]) == 143 and "cpu" in out.splitlines()[0]
    assert len(rows(folder)) == found["method"]["epochs"] == 50  # 250 updates of 5 batches


def test_the_summary_and_the_rounds_of_a_defense(victim, here):
    """Before is what the attack says, DER follows from both; SAU's losses and the three types stand in every round."""
    status, _, err = here("defense", "sau", *PURIFY)
    assert (status, err) == (0, "")
    folder = victim / "defense" / "sau"
    found, rounds, names = summary(folder), rows(folder), ("acc", "asr", "racc")
    Record(folder).check()
    Record(victim).check()  # the attack's record stays whole
    assert all(found["before"][name] == summary(victim)[name] for name in names)
    gain = max(0.0, found["before"]["asr"] - found["after"]["asr"])
    cost = max(0.0, found["before"]["acc"] - found["after"]["acc"])
    assert found["der"] == pytest.approx((gain - cost + 100) / 2, abs=0.011)  # of rounded figures
    assert [(row["epoch"], "asr" in row) for row in rounds] == [(1, False), (2, True)]  # whatever --eval_every says
    assert all(rounds[-1][name] == found["after"][name] for name in names)
    for row in rounds:
        assert row["loss"] == pytest.approx(row["clean_loss"] + row["shared_loss"], rel=1e-4)
        assert row["train_type1"] + row["train_type2"] + row["train_type3"] <= 143


def test_a_clean_network_is_defended_too(here, tmp_path):
    assert here("attack", "prototype", *TINY, "--save_folder_name", "victim")[0] == 0
    folder = tmp_path / "record" / "victim"
    found = summary(folder)
    assert found["asr"] is None and found["racc"] is None and isinstance(found["acc"], float)
    assert not (folder / "triggered.safetensors").exists() and not (folder / "poisoned.safetensors").exists()
    assert here("defense", "ft", "--result_file", "victim", "--epochs", "1", *QUICK)[0] == 0
    found = summary(folder / "defense" / "ft")
    assert found["before"]["asr"] is None and found["after"]["racc"] is None and found["der"] is None
    assert found["after"]["acc"] >= 0


@pytest.mark.parametrize(("argv", "expected"), [
    (("defense", "sau", "--recipe", "paper"), {"epochs": "100", "lr": "0.0001", "lr_scheduler": "constant"}),
    (("defense", "sau", "--result_file", "victim"), {"epochs": "10", "dataset": "digits", "ratio": "0.1"}),
    (("attack", "badnet", "--dataset", "digits"), {"dataset": "digits", "width": "16", "pratio": "0.1"}),
])  # fmt: skip
def test_help_shows_what_would_run_here(argv, expected, victim, here, capsys):
    with pytest.raises(SystemExit) as left:
        here(*argv, "--device", "cpu", "--help")
    out = capsys.readouterr().out
    shown = {flag: re.search(rf"^  --{flag} .*?\[([^][ ]*)\]\n", out, re.M | re.S)[1] for flag in expected}
    assert left.value.code == 0 and shown == expected


def test_the_list_has_everything_there_is(here):
    status, out, _ = here("list")
    names = set(re.findall(r"^  (\S+) ", out, re.M))
    assert status == 0 and names >= {*ATTACKS, *DEFENSES, *sources.SOURCES, *RECIPES}
    for kind, methods in (("attack", ATTACKS), ("defense", DEFENSES)):
        usage = f"usage: sau {kind} NAME [flags]; NAME is one of: {', '.join(methods)}\n"
        assert here(kind, "--help") == (0, usage, "") and here(kind) == (2, "", usage)


def test_python_m_sau_and_what_does_not_wait_for_torch(tmp_path):
    env = {name: text for name, text in environment(PYTHONPATH=str(REPOSITORY)).items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sau.__main__ as m\ntry: m.run()\nfinally: print(os.getenv('OMP_WAIT_POLICY'), *m.sys.modules)"
    for argv, line in ((["--version"], f"sau {sau.__version__}"), (["--help"], "usage: sau COMMAND ...")):
        run = [sys.executable, "-c", code, *argv]
        done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100)
        assert done.stdout.splitlines()[0] == line and {"PASSIVE", "torch"} & {*done.stdout.split()} == {"PASSIVE"}
    assert all(f"\n  {name} " in done.stdout for name in ("attack NAME", "defense NAME", "list", *TOOLS))
    run = [sys.executable, "-m", "sau", "attack", "badnett"]
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and "attack badnet" in the_error(done.stderr)


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_is_a_command_and_a_script(tool, here, script, capsys):
    name = f"{'inspect_checkpoint' if tool == 'inspect' else tool}.py"
    with pytest.raises(SystemExit):
        here(tool, "--help")
    help = capsys.readouterr().out
    assert script(name, "--help") == (0, help, "") and f"sau {tool}" in help
    status, out, err = here(tool, "--nonsense")
    assert script(name, "--nonsense") == (status, out, err) and (status, out) == (2, "") and f"sau {tool}" in err


def test_a_resumed_run_has_the_threads_of_the_interrupted_one(here, tmp_path, monkeypatch):
    """Where none are asked for: sums of other threads are rounded otherwise."""
    earlier = list[int | None]()
    monkeypatch.setattr("sau.run.set_threads", lambda wish, before: earlier.append(before) or 6)
    monkeypatch.setattr("sau.device.seconds_per_image", lambda *given: signal.default_int_handler(2, None))
    for more in ((), (), ("--overwrite",)):
        assert here("attack", "badnet", *TINY, "--save_folder_name", "a", *more)[0] == 130
        (tmp_path / "record" / "a" / "metrics.jsonl").write_text("")  # begun in earnest
    assert earlier == [None, 6, None]


def test_the_benchmarks_names_of_the_attacks_are_known(here, refused, tmp_path):
    (tmp_path / "theirs.yaml").write_text("attack: lowFrequency\n")
    assert here("attack", "lf", *TINY, "--bd_yaml_path", "theirs.yaml", "--save_folder_name", "a")[0] == 0
    assert "attack/lf.py" in refused("attack", "badnet", *TINY, "--attack", "lowFrequency")
    text = refused("attack", "badnet", *TINY, "--attack", "lira")
    assert "lira.py" not in text and "inputaware" in text  # no script that does not exist; those that do


def test_a_finished_run_is_not_made_again_and_another_one_is_refused_its_folder(here, refused, tmp_path):
    """Status 0 and one line for the same command, however long ago; a refusal for other settings or another wish."""
    flags = ("attack", "badnet", *TINY, "--save_folder_name", "a")
    assert here(*flags)[0] == 0
    file = tmp_path / "record" / "a" / "manifest.json"
    before = file.read_bytes()
    status, out, err = here(*flags)
    assert (status, err) == (0, "") and "--overwrite" in out.splitlines()[-1]
    assert "--overwrite" in refused(*flags, "--random_seed", "1") and file.read_bytes() == before
    assert here(*flags, "--overwrite", "--random_seed", "1")[0] == 0 and file.read_bytes() != before
    assert here(*flags, "--random_seed", "1")[0] == 0  # whether it was to overwrite is no setting


def test_commands_augment_as_their_data_set_says(here, few, monkeypatch):
    seen, call = set(), Augment.__call__
    monkeypatch.setitem(sources.SOURCES, "digits", replace(few, augment=Augment(2, flip=True)))
    monkeypatch.setattr(Augment, "__call__", lambda self, *given: seen.add(self) or call(self, *given))
    attack = ("attack", "badnet", "--dataset", "digits", "--width", "2", "--save_folder_name", "a")
    for argv in (attack, ("defense", "ft", "--result_file", "a")):
        seen.clear()
        assert here(*argv, "--epochs", "1", *QUICK)[0] == 0
        assert seen == {Augment(2, flip=True)}, argv


@pytest.mark.parametrize("name", ["wanet", "inputaware", "bpp"])
@pytest.mark.usefixtures("few_digits")
def test_an_attack_inside_the_batches_leaves_a_record_that_can_be_defended(here, tmp_path, name):
    """It keeps examples of what it did, with their roles, and what stamps further images."""
    own = ("--epochs", "2", "--clean_train_epochs", "1") if name == "inputaware" else ("--epochs", "1")
    flags = ("--dataset", "digits", "--width", "4", *own, *QUICK)
    status, out, err = here("attack", name, *flags, "--save_folder_name", "a")
    assert status == 0, err
    assert "of each batch of 128 12 images poisoned, 12" in out and "trigger: PSNR" in out
    record = Record(tmp_path / "record" / "a")
    record.check()
    assert rows(record.path)[-1]["asr"] is not None  # the last epoch is evaluated, though eval_every is 5
    kept = load_images(record, "poisoned")
    first = kept[kept.index < 128]
    assert (first.role == BACKDOOR).sum() == 12 and (first.role == CROSS).sum() == 12
    assert name == "bpp" or record.load_tensors("trigger")
    found = summary(record.path)
    assert found["trigger"]["psnr"] > 0 and 0 <= found["trigger"]["in_ball"] <= 100 and "made" not in found["trigger"]
    assert f"cross ACC {found['cross_acc']:.2f} %" in out and found["cross_acc_count"][1] == found["acc_count"][1]
    assert here("defense", "ft", "--result_file", "a", "--epochs", "1", *QUICK)[0] == 0


def test_an_attack_that_is_killed_and_stopped_goes_on_to_the_same_bits(finished, tmp_path, cli):
    """kill -9 in epoch 2, Ctrl-C in epoch 3, SIGTERM in epoch 4, and to the end; beside an undisturbed run."""
    argv = command("attack", "badnet", *VICTIM, "--save_folder_name", "again")
    folder = tmp_path / "record" / "again"
    status, _ = stop_after("epoch 1/4", signal.SIGKILL, argv, tmp_path)
    assert status == -signal.SIGKILL and not (folder / "manifest.json").exists()
    for words, number in (("epoch 2/4", signal.SIGINT), ("epoch 3/4", signal.SIGTERM)):
        status, err = stop_after(words, number, argv, tmp_path)
        assert status == 130 and "resume" in err and "Traceback" not in err
        assert (folder / "checkpoint.bin").is_file() and not (folder / "manifest.json").exists()
    done = cli("attack", "badnet", *VICTIM, "--save_folder_name", "again", cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    assert "resuming after epoch 3" in done.stdout or "resuming after epoch 2" in done.stdout
    undisturbed = finished / "record" / "victim"
    for name in ("model", "poisoned", "triggered"):
        assert (folder / f"{name}.safetensors").read_bytes() == (undisturbed / f"{name}.safetensors").read_bytes()
    assert list(map(without_time, rows(folder))) == list(map(without_time, rows(undisturbed)))
    assert without_time(summary(folder)) == without_time(summary(undisturbed))
    names, wanted = ({file.name for file in place.iterdir()} for place in (folder, undisturbed))
    assert names == wanted and "checkpoint.bin" not in names
    Record(folder).check()


@pytest.mark.usefixtures("few_digits")
def test_another_run_does_not_go_on_from_a_stopped_one(here, refused, tmp_path, monkeypatch):
    run = ("attack", "badnet", *(flag if flag != "0" else "3" for flag in TINY), "--save_folder_name", "a")
    really = commands.RunLogger.on_epoch

    def stop(self, epoch, losses, state):
        if epoch == 2:
            raise KeyboardInterrupt
        return really(self, epoch, losses, state)

    with monkeypatch.context() as patch:
        patch.setattr(commands.RunLogger, "on_epoch", stop)
        assert here(*run)[0] == 130
    assert "lr: 0.1 there, 0.5 here" in refused(*run, "--lr", "0.5")
    assert "amp is True" in refused(*["true" if flag == "false" else flag for flag in run])
    status, out, _ = here(*run, "--compile", "true", "--frequency_save", "2")
    assert status == 0 and "resuming after epoch 1" in out and "--compile has no effect" in out
    folder = tmp_path / "record" / "a"
    assert [row["epoch"] for row in rows(folder)] == [1, 2, 3]
    assert [file.name for file in folder.glob("model_epoch_*")] == ["model_epoch_2.safetensors"]
    copy = safetensors.torch.load_file(folder / "model_epoch_2.safetensors")
    assert list(copy) == list(safetensors.torch.load_file(folder / "model.safetensors"))
    assert "amp is True" in refused(*["true" if flag == "false" else flag for flag in run])  # also of a finished one


# Bad input. Everything below ends with status 2 and exactly one line on stderr.


def test_a_place_that_is_none_is_refused_and_nothing_is_left(refused, tmp_path):
    (tmp_path / "a file").write_text("in the way")
    assert "'../up'" in refused("attack", "badnet", *TINY, "--save_folder_name", "../up")
    assert "a file" in refused("attack", "badnet", *TINY, "--save_folder_name", "a", "--record_root", "a file")
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"a file", ".a.lock"}


@pytest.mark.usefixtures("few_digits")
def test_a_rate_that_breaks_the_network_is_one_line(refused, tmp_path):
    flags = [flag if flag != "0" else "2" for flag in TINY]
    text = refused("attack", "badnet", *flags, "--lr", "1e30", "--save_folder_name", "a")
    assert "finite" in text or "NaN" in text
    assert not (tmp_path / "record" / "a" / "manifest.json").exists()


REFUSED = {
    "--result_file": (), "../victim": ("--result_file", "../victim"), "other": PURIFY[:2],
    "'digits'": ("--result_file", "victim", "--dataset", "cifar10"),
    "empty": ("--result_file", "victim", "--ratio", "0.0001"),
}  # fmt: skip


@pytest.mark.parametrize("word", REFUSED)
def test_defenses_that_are_refused(refused, victim, word, request):
    if word == "other":  # images than those that the attack saw
        request.getfixturevalue("few_digits")
    assert word in refused("defense", "sau", *REFUSED[word], *QUICK) and not (victim / "defense").exists()


@pytest.mark.slow
def test_an_epoch_and_a_round_on_real_cifar10(real_data, cli, tmp_path):
    flags = ("--dataset_path", str(real_data), "--width", "4", "--epochs", "1", *QUICK)
    assert cli("attack", "badnet", *flags, "--save_folder_name", "a", cwd=tmp_path).returncode == 0
    done = cli("defense", "sau", "--result_file", "a", "--epochs", "1", *QUICK, cwd=tmp_path)
    assert done.returncode == 0 and "2,500 clean images of cifar10" in done.stdout
    index = yaml.safe_load((tmp_path / "record/a/defense/sau/config.yaml").read_text())["clean_index"]
    assert index[:5] == [25247, 49673, 27562, 2653, 16968]


@pytest.mark.usefixtures("few_digits")
def test_the_seed_reaches_poisons_training_and_defense(here, monkeypatch):
    seen: list[int] = []
    for cls, name in ((BadNet, "fit"), (FT, "purify")):
        own = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda *a, own=own, **k: seen.append(k["seed"]) or own(*a, **k))
    poison = BadNet.poison_train
    monkeypatch.setattr(BadNet, "poison_train", lambda self, i, s: seen.append(s) or poison(self, i, s))
    assert here("attack", "badnet", *TINY, "--random_seed", "7", "--save_folder_name", "a")[0] == 0
    flags = ("--result_file", "a", "--epochs", "0", "--random_seed", "8", "--ratio", "0.5", *QUICK)
    assert here("defense", "ft", *flags)[0] == 0
    assert seen == [7, 7, 8]
