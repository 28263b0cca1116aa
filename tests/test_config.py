"""From signatures to flags and YAML and back: what is accepted, what beats what, what is refused in which words."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from toys import QUICK, REPOSITORY, refuses

from sau.attack import ATTACKS, SIG, BadNet, InputAware, WaNet
from sau.config import convert, options, param, values
from sau.data.sources import SOURCES
from sau.defense import DEFENSES, FT, IBAU, SAU
from sau.errors import ConfigError
from sau.optim import Method, Training
from sau.run import RECIPES, AttackRun, DefenseRun, OwnRun
from sau.settings import Settings, overlaid, read_yaml


class Base(Method):
    """About."""

    lr: float = param(0.1, "rate", aliases=("learning_rate",))
    steps: int = param(3, "how many", aliases=("n_steps",))


class Small(Base):
    """More."""

    steps: int = 5
    mode: Literal["Fast", "slow"] = param("slow", "one of two, 100 % sure", aliases=("m",))
    strict: bool = param(False, "a switch")
    path: str | None = param(None, "a file")


def test_the_published_settings_of_sau_are_its_defaults():
    found = {name: o.default for o in options(SAU).values() for name in (o.name, *o.aliases)}
    published = {
        "n_rounds": 100, "outer_steps": 1, "lmd_1": 1, "lmd_2": 0, "lmd_3": 1, "beta_1": 0.01, "beta_2": 1,
        "trigger_norm": 0.2, "pgd_init": "max", "norm_type": "L_inf", "adv_lr": 0.2, "adv_steps": 5,
        "train_mode": False, "lr": 1e-4, "batch_size": 256, "wd": 0, "optim": "adam", "adam_betas": (0.9, 0.999),
    }  # fmt: skip
    assert {name: found[name] for name in published} == published and options(DefenseRun)["ratio"].default == 0.05


@pytest.mark.parametrize(("hint", "expected", "values"), [
    (bool, True, ("True", "TRUE", "1", 1, True)),
    (bool, False, ("False", "0", 0, False)),
    (float, 1e-4, ("1e-4", 1e-4)),
    (float, 3.0, ("3", 3)),
    (float, -0.5, ("-.5",)),
    (int, 7, ("7", " 7 ")),
    (int, -7, ("-7",)),
    (tuple[int, ...], (60, 90), ("60,90", "60, 90", "[60, 90]", [60, 90])),
    (tuple[float, ...], (0.9, 0.999), ((0.9, 0.999),)),
    (tuple[int, ...], (), ("",)),
    (int | None, None, ("none", "None", "auto", "null", None)),
    (bool | None, None, ("auto", None)),
    (int | None, 3, ("3",)),
    (bool | None, True, ("true",)),
    (str, "2024", (2024,)),
    (str | None, "x.png", ("x.png",)),
    (Literal["Adam", "sgd"], "Adam", ("Adam", "adam", "ADAM")),
])  # fmt: skip
def test_values_that_are_accepted(hint, expected, values):
    converted = [convert(value, hint) for value in values]
    assert converted == [expected] * len(values) and {type(value) for value in converted} == {type(expected)}


@pytest.mark.parametrize(("hint", "values"), [
    (bool, ("yes", "2", "", None)),
    (int, ("1.5", "1e3", "one", "", 1.5, True, None, [1], {}, "9" * 5000)),
    (float, ("a", "nan", "inf", "1e39", True, [0.1], {"a": 1})),
    (tuple[int, ...], ("60,a", [60, 1.5], [None], {"a": 1})),
    (Literal["adam", "sgd"], ("lion", "", None, 3)),
    (int | None, ("nothing", "0.5", [["none"]])),
    (str, ([1], {"a": 1}, None, True)),
])  # fmt: skip
def test_values_that_are_refused(hint, values):
    for value in values:
        with pytest.raises(ConfigError, match="allowed is"):
            convert(value, hint)


def small(*argv: str) -> Small:
    return Settings("x", Small, (Small,), argv).settle("cpu", "digits")[0]


def test_flags_under_all_their_names_and_switches_without_a_value():
    assert small("--lr", "1", "--n_steps", "4", "--m=fast") == Small(lr=1.0, steps=4, mode="Fast")
    assert small("--learning_rate", "2") == Small(lr=2.0) and small() == Small()
    assert small("--lr", "1", "--learning_rate", "1") == Small(lr=1.0)
    assert small("--strict").strict and small("--strict", "--lr", "1").strict and not small("--strict", "false").strict
    assert asked(["--train_mode"])[1].train_mode is True


@pytest.mark.parametrize(("argv", "words"), [
    (["--step", "1"], ["no flag", "--step", "--steps"]),  # no abbreviations
    (["--zzzzzz"], ["no flag", "--zzzzzz"]),
    (["--lr", "1", "2"], ["'2'", "no flag"]),
    (["--lr=1", "--lr", "2"], ["--lr is '1'", "'2'"]),
    (["--lr", "1", "--learning_rate", "2"], ["--lr is '1'", "--learning_rate is '2'"]),
    (["-n", "4", "--num_workers", "2"], ["-n is '4'", "--num_workers is '2'"]),
    (["--lr"], ["--lr", "expected one argument"]),
])  # fmt: skip
def test_flags_that_are_refused(argv, words):
    with refuses(ConfigError, *words):
        small(*argv)


@pytest.mark.parametrize("name", DEFENSES)
def test_the_benchmarks_flags_without_effect_are_named_with_a_reason(name, tmp_path):
    """On the command line and in YAML; contract.json lists the flags that there are."""
    method = DEFENSES[name]
    names = {other for each in options(method).values() for other in (each.name, *each.aliases)}
    without = sorted({*method.ignored, "num_workers", "git_hash"} - names)
    file = written(tmp_path, "".join(f"{flag}: 3\n" for flag in without))
    argv = [word for flag in without for word in (f"--{flag}", "3")]
    for said in (argv, ["--yaml_path", str(file)]):
        found = Settings("x", method, (DefenseRun, OwnRun, method), said).ignored
        assert sorted(found) == without and all(found.values())


THEIR_FILES = {  # the keys of its files that its code does not read, and what runs without them
    "nad": ("epochs: 100\nte_epochs: 10\nwd: 5e-4\nweight_decay: 1e-4\nmomentum: 0.9\n", {"epochs": 20, "wd": 5e-4}),
    "sau": ("n_rounds: 100\nepochs: 7\nlr_scheduler: CosineAnnealingLR\namp: true\nlr: 1e-4\n", {"epochs": 100}),
    "i-bau": ("n_rounds: 5\nlr_scheduler: StepLR\namp: true\n", {"epochs": 5}),
    "fp": ("num_classes:\nonce_prune_ratio: 0.02\n", {"once_prune_ratio": 0.02}),
}


@pytest.mark.parametrize("name", THEIR_FILES)
def test_the_benchmarks_own_files_do_here_what_they_do_there(name, tmp_path):
    text, expected = THEIR_FILES[name]
    method = DEFENSES[name]
    sections = (DefenseRun, OwnRun, method)

    def settled(text):
        request = Settings("x", method, sections, ["--yaml_path", str(written(tmp_path, text))])
        return request, request.settle("cpu", "cifar10")

    request, (run, _, found) = settled("num_workers: 4\npin_memory: true\n" + text)
    plain = settled("")[1]
    assert {key: getattr(found, key) for key in expected} == expected
    assert run.amp == plain[0].amp and found.lr_scheduler == plain[2].lr_scheduler
    for key in {*method.unread} & {line.split(":")[0] for line in text.splitlines()}:
        assert "BackdoorBench does not read" in request.ignored[key]
    if name == "nad":  # in a file of the user's own they act, instead of the recipe's
        request, (_, _, found) = settled(text)
        assert found.epochs == 100 and request.replaced()["epochs"] == 20


@pytest.mark.parametrize("flag", ["--C_lr_scheduler", "--lr_scheduler"])
def test_no_schedule_is_a_constant_rate_but_of_input_aware_the_drops_of_the_benchmark(flag, tmp_path):
    sections = (AttackRun, Training, InputAware)
    file = written(tmp_path, f"{flag[2:]}: None\n")
    for argv in ([flag, "None"], ["--yaml_path", str(file)]):
        _, training, _ = Settings("x", InputAware, sections, argv).settle("cpu", "cifar10")
        assert training.lr_scheduler is None
    with pytest.raises(ConfigError) as refusal:
        Settings("x", InputAware, sections, [flag, "Linear"]).get("lr_scheduler")
    assert str(refusal.value).startswith(f"{flag} is 'Linear'")  # as it was typed
    argv = ["--lr_scheduler", "None"]
    for method, sections in ((BadNet, (AttackRun, Training, BadNet)), (FT, (DefenseRun, FT))):
        assert Settings("x", method, sections, argv).get("lr_scheduler") is None


@pytest.mark.parametrize("argv", [("--help", "--nonsense", "1"), ("--nonsense", "1", "-h"), ("--help_all",)])
def test_help_is_given_beside_mistakes(argv, capsys):
    with pytest.raises(SystemExit):
        small(*argv)
    assert ("--learning_rate" in capsys.readouterr().out) == ("--help_all" in argv)


KNOWN = options(Small)


def written(folder: Path, text: str) -> Path:
    file = folder / "settings.yaml"
    file.write_text(text)
    return file


def read(file: Path, recipe: str | None = None, dataset: str | None = None) -> dict[str, Any]:
    return values(overlaid(read_yaml(file, KNOWN), recipe or "fast", dataset or "gtsrb"), KNOWN)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "+1e-4", ".0001", "0.0001", "1.0e-04", "'1e-4'"])
def test_numbers_in_yaml_are_numbers(tmp_path, text):
    """YAML 1.1, which PyYAML reads, takes 1e-4 for a text."""
    assert read(written(tmp_path, f"lr: {text}\n")) == {"lr": 1e-4}


def test_a_yaml_file_with_every_kind_of_value(tmp_path):
    file = written(tmp_path, "# a comment\nlearning_rate: 2\nn_steps: 9\nmode: FAST\nstrict: yes\npath: none\n")
    assert read(file) == {"lr": 2.0, "steps": 9, "mode": "Fast", "strict": True, "path": None}
    assert read(written(tmp_path, "lr: 1\nlearning_rate: 1.0\n")) == {"lr": 1.0}
    assert read(written(tmp_path, "")) == {} and read(written(tmp_path, "# nothing\n")) == {}


@pytest.mark.parametrize("text", ["epochs: 100\nn_rounds: 5\n", "n_rounds: 5\nepochs: 100\n"])
def test_of_a_file_with_epochs_and_rounds_the_rounds_count(tmp_path, text):
    """BackdoorBench's files of i-BAU and of SAU on Tiny ImageNet hold both; on the command line both are refused."""
    argv = ["--yaml_path", str(written(tmp_path, text))]
    assert Settings("x", IBAU, (DefenseRun, IBAU), argv).get("epochs") == 5
    with pytest.raises(ConfigError, match="give one of them"):
        Settings("x", IBAU, (DefenseRun, IBAU), ["--epochs", "100", "--n_rounds", "5"])


def test_overlays_of_recipe_and_data_set(tmp_path):
    """The file, over it the recipe's settings, over these the data set's."""
    text = "lr: 1\nsteps: 1\nmode: fast\nrecipes:\n  cpu: {steps: 2, mode: slow}\n  paper: {steps: 3}\n"
    text += "datasets:\n  digits: {steps: 4}\n  digits.paper: {lr: 5}\n"
    file = written(tmp_path, text)
    assert read(file) == {"lr": 1.0, "steps": 1, "mode": "Fast"}
    assert read(file, "cpu") == {"lr": 1.0, "steps": 2, "mode": "slow"}
    assert read(file, "paper", "cifar10") == {"lr": 1.0, "steps": 3, "mode": "Fast"}
    assert read(file, "cpu", "digits") == {"lr": 1.0, "steps": 4, "mode": "slow"}
    assert read(file, "paper", "digits") == {"lr": 5.0, "steps": 4, "mode": "Fast"}


@pytest.mark.parametrize(("key", "text"), [
    ("cannot read", ""),  # no file
    ("step", "lr: 1\nstep: 2\n"),
    ("lr", "lr: 1\nsteps: 2\nlr: 1\n"),
    ("learning_rate", "lr: 1\nlearning_rate: 2\n"),
    ("steps", "steps: 2.5\n"),
    ("lr", "lr: {a: 1}\n"),
    ("mapping", "- lr\n- steps\n"),
    ("step", "recipes:\n  cpu:\n    step: 2\n"),
    ("cpuu", "recipes:\n  cpuu: {lr: 1}\n"),
    ("cpu", "recipes: {cpu: 1, cpu: 2}\n"),
    ("datasets", "datasets: 3\n"),
    ("os.system", "lr: !!python/object/apply:os.system ['touch canary']\n"),
    ("abc", "steps: !!int abc\n"),
    ("month", "path: 2024-13-01\n"),  # looks like a date and is none
    *(("", text) for text in ("? [a, b]\n: 1\n", "lr: [1\n", "a: *b\n", "--- 1\n--- 2\n", "[" * 1200, "\xff")),
])  # fmt: skip
def test_yaml_that_is_refused(tmp_path, monkeypatch, key, text):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.yaml"
    if text:
        file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError) as refusal:
        read(file, "cpu")
    assert str(file) in str(refusal.value) and key in str(refusal.value).replace(str(file), "")
    assert not (tmp_path / "canary").exists()


def asked(argv: Sequence[str], record: dict[str, Any] | None = None, recipe: str = "paper", dataset: str = "cifar10"):
    request = Settings("x", SAU, (DefenseRun, SAU), argv)
    return request.settle(recipe, dataset, record)


def test_flag_beats_yaml_beats_record_beats_shipped_beats_signature(tmp_path):
    file = ("--yaml_path", str(written(tmp_path, "lr: 3\ndatasets:\n  digits: {dataset_path: from yaml}\n")))
    assert asked([])[1].lr == SAU().lr == 1e-4
    assert asked([], recipe="cpu")[1].lr == 1e-3  # the shipped overlay
    assert asked(file, recipe="cpu")[1].lr == 3
    assert asked([*file, "--lr", "4"], recipe="cpu")[1].lr == 4
    record = {"dataset": "digits", "model": "preactresnet18", "dataset_path": "from record"}
    assert asked([])[0].dataset_path == "./data"
    assert asked([], record)[0].dataset_path == "from record" and asked([], record)[0].model == "preactresnet18"
    assert asked(file, record, dataset="digits")[0].dataset_path == "from yaml"
    assert asked([*file, "--dataset_path", "from flag"], record, dataset="digits")[0].dataset_path == "from flag"


def test_the_attacks_yaml_beats_the_recipes_yaml_and_names_no_further_file(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("lr: 3\nepochs: 3\npratio: 0.3\n")
    two.write_text("lr: 4\npratio: 0.4\n")
    sections = (AttackRun, Training, BadNet)
    argv = ["--yaml_path", str(one), "--bd_yaml_path", str(two), "--pratio", "0.5"]
    for order in (argv, argv[2:4] + argv[:2] + argv[4:]):
        run, training, method = Settings("x", BadNet, sections, order).settle("cpu", "cifar10")
        assert (training.lr, training.epochs, method.pratio) == (4.0, 3, 0.5)
    one.write_text(f"lr: 3\nbd_yaml_path: {two}\n")
    with refuses(ConfigError, f"{one}: bd_yaml_path"):
        Settings("x", BadNet, sections, ["--yaml_path", str(one)])


def test_what_is_needed_before_the_recipe_is_known_does_not_depend_on_it(tmp_path):
    with refuses(ConfigError, "settings.yaml: datasets: digits: record_root cannot depend on"):
        asked(["--yaml_path", str(written(tmp_path, "datasets:\n  digits: {record_root: elsewhere}\n"))])


@pytest.mark.parametrize(("name", "theirs"), [("dataset", "digits"), ("model", "preactresnet18")])
def test_a_flag_that_contradicts_the_record_is_refused_with_both_values(tmp_path, name, theirs):
    record = {"dataset": "digits", "model": "preactresnet18", "dataset_path": "."}
    assert asked([f"--{name}", theirs], record)
    for argv in ([f"--{name}", "other"], ["--yaml_path", str(written(tmp_path, f"{name}: other\n"))]):
        with refuses(ConfigError, "'other'", repr(theirs)):
            asked(argv, record)


SHIPPED = sorted(file for file in (REPOSITORY / "configs").rglob("*.yaml") if file.parent.name != "grid")


def sections_of(file: Path) -> tuple[type, ...]:
    kind, name = file.parent.name, file.stem
    if kind == "recipe":
        return (AttackRun, Training)
    return (AttackRun, Training, ATTACKS[name]) if kind == "attack" else (DefenseRun, OwnRun, DEFENSES[name])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_shipped_file_is_read_and_its_values_are_allowed(file):
    known = {name: option for cls in sections_of(file) for name, option in options(cls).items()}
    for recipe, dataset in product(RECIPES, SOURCES):
        found = values(overlaid(read_yaml(file, known), recipe, dataset), known)
        for cls in sections_of(file):
            cls(**{name: value for name, value in found.items() if name in options(cls)})
    if file.parent.name != "recipe":  # defaults stand in the class alone
        assert {*(yaml.safe_load(file.read_text()) or {})} <= {"recipes", "datasets"}


@pytest.mark.parametrize("name", ["sig", "sau"])
def test_print_config_writes_a_file_that_changes_nothing(name, tmp_path, capsys):
    sections = (AttackRun, Training, SIG) if name == "sig" else (DefenseRun, OwnRun, SAU)
    request = Settings("x", sections[-1], sections, ["--print_config", "--lr", "0.3"])
    with pytest.raises(SystemExit) as left:
        request.help("cpu", "digits")
    text = capsys.readouterr().out
    again = Settings("x", sections[-1], sections, ["--yaml_path", str(written(tmp_path, text))])
    flags = Settings("x", sections[-1], sections, ["--lr", "0.3"])
    assert again.get("lr") == 0.3 and not left.value.code and not again.ignored
    for one, other in zip(again.settle("cpu", "digits"), flags.settle("cpu", "digits"), strict=True):
        assert replace(one, yaml_path=None) == other if hasattr(one, "yaml_path") else one == other
    assert "# learning rate at the start (OneCycleLR: at its highest); above 0\n" in text


def with_recipe(method: type, *flags: str) -> tuple:
    request = Settings("x", method, (AttackRun, Training, method), [*flags, "--device", "cpu"])
    return request.recipe(), *request.settle(request.recipe()[0], "cifar10")


def test_fast_is_for_attacks_beforehand(refused):
    (recipe, why), run, training, _ = with_recipe(BadNet, "--recipe", "fast")
    assert (recipe, why, run.recipe, run.width, training.epochs) == ("fast", "as asked", "fast", 64, 24)
    (recipe, why), _, training, _ = with_recipe(WaNet, "--recipe", "fast")
    assert recipe == "paper" and "poisoned beforehand" in why and training.epochs == 100
    for recorded, full in (("fast", "paper"), ("cpu", "cpu")):
        assert Settings("x", SAU, (DefenseRun, SAU), []).recipe(recorded)[0] == full
    assert Settings("x", SAU, (DefenseRun, SAU), ["--recipe", "fast", "--device", "cpu"]).recipe("cpu")[0] == "paper"
    line = refused("attack", "badnet", "--dataset", "digits", "--recipe", "fast", *QUICK)
    assert "recipe is fast, which digits does not have; allowed is paper" in line
