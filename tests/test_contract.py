"""The contract: methods, flags, result folders and toy runs that others rely on, frozen in `contract.json`.

    python tests/test_contract.py --write sums.json   # SHA-256 of each toy run's weights: diff those of two commits
    python tests/test_contract.py --freeze            # after a deliberate change; the diff of contract.json shows it

Weights depend on the processor and on torch's version in their last bits. So `contract.json` has norms and logits to
three digits, which are compared with a tolerance; SHA-256 sums are compared by hand, on one machine.
"""

import argparse
import hashlib
import json
import os
import re
import runpy
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from torch import Tensor, nn
from toys import QUICK, REPOSITORY, quiet, tiny_net, toy_images

from sau.attack import ATTACKS
from sau.cli import main
from sau.defense import DEFENSES
from sau.models import build
from sau.optim import Training

CONTRACT = REPOSITORY / "tests" / "contract.json"
OLD = REPOSITORY / "tests" / "old_record.tar.xz"  # WaNet and SAU on 104 images, written by the code of 0.1.0
FROZEN = json.loads(CONTRACT.read_text())
METHODS = {"attack": ATTACKS, "defense": DEFENSES}
RUNS = [(kind, name) for kind in METHODS for name in FROZEN[kind]]
SCRIPTS = ("export", "figures", "gallery", "grid", "inspect_checkpoint", "prepare", "report", "verify")
PLAIN = {"lr_scheduler": "constant", "client_optimizer": "sgd", "sgd_momentum": 0.9, "wd": 0.0005}
TRAINING = Training(epochs=6, batch_size=20, lr=0.05, **PLAIN)
# Adam's first steps are signs, so triggers that it trains turn where a gradient rounds to 0, and logits with them.
DRIFTS = ("ssba", "inputaware")
TINY = ("--dataset", "digits", "--width", "1", "--epochs", "1", "--batch_size", "256", *QUICK)

each_run = pytest.mark.parametrize(("kind", "name"), RUNS, ids=[name for _, name in RUNS])


def method(kind: str, name: str) -> Any:
    """A method with every setting given, so that other defaults change nothing here."""
    settings = FROZEN[kind][name]["settings"]
    return METHODS[kind][name](**{key: tuple(v) if isinstance(v, list) else v for key, v in settings.items()})


@cache
def attacked() -> nn.Module:
    """What the defenses purify: a tiny network that BadNets has poisoned."""
    return run("attack", "badnet")[0]


def run(kind: str, name: str) -> tuple[nn.Module, Tensor]:
    """The network after a toy run, and 8 images: with the trigger where the attack has one."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, made = toy_images(80), method(kind, name)
    if kind == "defense":
        fixed = made.purify(attacked(), toy_images(40, seed=3), seed=0, session=quiet(), settings="as_given")
        return fixed, images.pixels[:8]
    net, recipe = tiny_net(), TRAINING
    if name == "dfba":  # at the other rate so deep a network goes where rounding leads it
        net, recipe = build("preactresnet18", 4, width=4, mean=[0.5], std=[0.5]), replace(TRAINING, lr=0.003)
    with patch("sau.attack.ssba.READABLE", 0.0):  # to make a code readable takes so many updates that rounding shows
        made = made.fit_trigger(images, net, recipe, seed=0, session=quiet())
    net = made.fit(net, made.poison_train(images, 0), recipe, seed=0, session=quiet())
    return net, (made.poison_test(images) if name != "prototype" else images).pixels[:8]


def rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.3g}") for value in values.flatten().tolist()]


def outcome(kind: str, name: str) -> dict[str, list[float]]:
    """What is stable across processors: norms of the parameters and buffers, means of the images, logits."""
    net, pixels = run(kind, name)
    with torch.no_grad():
        norms = torch.stack([tensor.float().norm() for tensor in net.state_dict().values()])
        x = pixels.float() / 255
        found = {"norms": rounded(norms), "images": rounded(x.mean((1, 2, 3)))}
        return found if name in DRIFTS else {**found, "logits": rounded(net.eval()(x))}


def sha256(kind: str, name: str) -> str:
    """Of every bit of the network and of the images."""
    net, pixels = run(kind, name)
    total = hashlib.sha256(pixels.numpy().tobytes())
    for key, tensor in net.state_dict().items():
        total.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


@each_run
def test_a_toy_run_comes_out_as_it_did(kind, name):
    found, frozen = outcome(kind, name), FROZEN[kind][name]["outcome"]
    for key, values in frozen.items():
        torch.testing.assert_close(found[key], values, rtol=0.1 if name in DRIFTS else 0.02, atol=0.005)


def test_defenses_change_the_weights_that_they_are_given():
    before = [tensor.float().norm() for tensor in attacked().state_dict().values()]
    for name, frozen in FROZEN["defense"].items():
        assert frozen["outcome"]["norms"] != rounded(torch.stack(before)), name


def output(call: Callable[[], Any]) -> str:
    """What a command prints; it must end with status 0."""
    with redirect_stdout(StringIO()) as text, redirect_stderr(StringIO()) as errors:
        try:
            status = call()
        except SystemExit as left:
            status = left.code
    assert not status, errors.getvalue()
    return text.getvalue()


def flags(text: str) -> list[str]:
    """The flags that a help text lists, aliases too."""
    heads = [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.startswith("  -")]
    return sorted({flag for head in heads for flag in re.findall(r"(?<!\S)--?([\w-]+)", head)})


def script(name: str, *argv: str) -> str:
    """The output of a script of the repository, run in this process."""
    before, path = sys.argv, sys.path[:]
    sys.argv, sys.path[:0] = [f"scripts/{name}.py", *argv], [str(REPOSITORY / "scripts")]
    try:
        return output(lambda: runpy.run_path(str(REPOSITORY / "scripts" / f"{name}.py"), run_name="__main__"))
    finally:
        sys.argv, sys.path[:] = before, path


def commands() -> dict[str, list[str]]:
    """The flags of every command; those that all attacks or all defenses have stand once."""
    found: dict[str, list[str]] = {}
    for kind, methods in METHODS.items():
        each = {name: flags(output(lambda n=name, k=kind: main([k, n, "--help_all"]))) for name in methods}
        common = set.intersection(*map(set, each.values()))
        found[kind] = sorted(common)
        found |= {f"{kind} {name}": sorted({*own} - common) for name, own in each.items()}
    found["scripts/tables.py table"] = flags(script("tables", "table", "--help"))
    return found | {f"scripts/{name}.py": flags(script(name, "--help")) for name in SCRIPTS}


def folders(root: Path) -> dict[str, Any]:
    """The files and keys of the result folders of a tiny attack and a tiny defense."""
    here = ("--record_root", str(root))
    output(lambda: main(["attack", "wanet", *TINY, *here, "--save_folder_name", "tiny"]))
    output(lambda: main(["defense", "sau", *QUICK, *here, "--result_file", "tiny", "--epochs", "1"]))
    return {"attack": contents(root / "tiny"), "defense": contents(root / "tiny/defense/sau")}


def contents(folder: Path) -> dict[str, list[str]]:
    """The files of a result folder, and the keys of its summary and configuration."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    parts = {"summary.json": json.loads((folder / "summary.json").read_text()), "config.yaml": config}
    parts |= {f"config.yaml {key}": config[key] for key in ("data", "model")} | {"metrics.jsonl": row}
    files = sorted(file.name for file in folder.iterdir() if file.is_file())
    return {"files": files} | {name: sorted(keys) for name, keys in parts.items()}


def test_the_flags_of_every_command_are_those_of_the_contract(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert commands() == FROZEN["commands"]


def test_result_folders_have_the_files_and_keys_of_the_contract(tmp_path):
    assert folders(tmp_path) == FROZEN["folders"]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: images in data/, the attack's folder wanet/ and in it defense/sau/."""
    with tarfile.open(OLD) as archive:
        # Early releases of Python 3.11 know no filter.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_an_old_attack_is_defended_and_exported(old):
    output(lambda: main(["defense", "ft", "--result_file", "wanet", "--record_root", ".", "--epochs", "1", *QUICK]))
    before = json.loads((old / "wanet/defense/ft/summary.json").read_text())["before"]
    assert before.items() <= json.loads((old / "wanet/summary.json").read_text()).items()
    script("export", "wanet", "--record_root", ".", "--format", "png", "--out", "images")
    assert len([*old.glob("images/train/*/*.png")]) == 80 and len([*old.glob("images/test_triggered/*/*.png")]) == 18


def test_an_old_defense_is_reported_and_verified(old):
    script("report", ".", "--json", "table.json")
    (row,) = (row for row in json.loads((old / "table.json").read_text()) if row["defense"] == "sau")
    assert (row["acc"], row["asr"], row["racc"]) == (66.67, 0.0, 38.89)
    assert "verified" in script("verify", "wanet", "--record_root", ".")


def test_a_finished_old_run_is_not_repeated(old):
    weights = (old / "wanet/model.safetensors").read_bytes()
    flags = ("--dataset", "folder", "--dataset_path", "data", "--img_size", "16", "--width", "1", "--epochs", "30")
    more = ("--batch_size", "16", "--pratio", "0.1", "--s", "4", "--lr", "0.05", "--save_folder_name", "wanet", *QUICK)
    text = output(lambda: main(["attack", "wanet", *flags, *more, "--record_root", "."]))
    assert "epoch" not in text and (old / "wanet/model.safetensors").read_bytes() == weights


def freeze() -> None:
    """Rewrite `contract.json`; outcomes within the tolerance stay as they are."""
    for kind, methods in METHODS.items():
        FROZEN[kind] = {name: FROZEN[kind].get(name) or {"settings": defaults(cls)} for name, cls in methods.items()}
        for name in methods:
            entry = FROZEN[kind][name]
            entry["outcome"] = closest(entry.get("outcome", {}), outcome(kind, name))
    with tempfile.TemporaryDirectory() as root:
        FROZEN.update(commands=commands(), folders=folders(Path(root)))
    lines = []
    for section, entries in FROZEN.items():
        inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
        lines.append(f"{json.dumps(section)}: {{\n{inner}\n }}")
    CONTRACT.write_text("{\n " + ",\n ".join(lines) + "\n}\n")


def defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in fields(cls) if field.init}


def closest(frozen: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    try:
        torch.testing.assert_close(found, frozen, rtol=0.02, atol=0.005)
    except AssertionError:
        return found
    return frozen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--write", metavar="FILE", help="write the SHA-256 of the weights of each toy run")
    choice.add_argument("--freeze", action="store_true", help="rewrite contract.json")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"SAU_CACHE": folder, "COLUMNS": "200"}
        if asked.freeze:
            freeze()
        else:
            sums = {f"{kind} {name}": sha256(kind, name) for kind, name in RUNS}
            Path(asked.write).write_text(json.dumps(sums, indent=1) + "\n")
