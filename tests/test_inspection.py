"""Other people's network files: what is in them, hostile ones, honest layouts, and the way to safetensors."""

import argparse
import collections
import datetime
import hashlib
import json
import os
import random
import subprocess
import sys
import types
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from hostile import HERE, hostile, in_zip, saved, text, watched
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import REPOSITORY, environment, refuses, the_error

from sau.compat import inspect, torch_file, weights
from sau.compat.inspect import HARMLESS, SUSPICIOUS, UNREADABLE
from sau.compat.weights import SAFE, Weights, guess
from sau.errors import RecordError
from sau.models import build

NET = "preactresnet18"
ZIP, OLD = "torch zip archive", "torch before 1.6"
EVIL = "\x1b[2J\nharmless to open\ud800\u202e" + "x" * 200


def small() -> dict[str, Tensor]:
    """A state dict of the library's network."""
    torch.manual_seed(0)
    return build(NET, 7, width=4, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()


def stored(tmp_path: Path, content: Any, name: str = "net.pt", **options: Any) -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else saved(content, **options))
    return tmp_path / name


def lightning(own: dict[str, Tensor]) -> dict[str, Any]:
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    state = OrderedDict({f"model.{name}": value for name, value in own.items()})
    return {"epoch": 3, "state_dict": state, "optimizer_states": [adam], "hyper_parameters": {"name": "cifar"}}


LAYOUTS = {
    "plain": lambda own: saved(OrderedDict(own)),
    "several GPUs": lambda own: saved(OrderedDict({f"module.{name}": value for name, value in own.items()})),
    "Lightning": lambda own: saved(lightning(own)),
    "BackdoorBox": lambda own: saved(OrderedDict(own), _use_new_zipfile_serialization=False),
    "bfloat16": lambda own: saved({k: v.bfloat16() if v.is_floating_point() else v for k, v in own.items()}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_honest_layouts_load_or_the_missing_key_is_named(layout, tmp_path):
    own = {name: value.bfloat16().to(value.dtype) for name, value in small().items()}  # which every layout can hold
    found = weights.read(stored(tmp_path, LAYOUTS[layout](own)))
    assert found.kind == (OLD if layout == "BackdoorBox" else ZIP)
    loaded = found.of(own)
    assert list(loaded) == [*own] and all(torch.equal(value, own[name]) for name, value in loaded.items())
    assert {value.dtype for value in loaded.values()} == {torch.float32, torch.int64} and guess(found).name == NET
    lost = {name: value for name, value in own.items() if name != "layer2.0.bn1.bias"}
    with pytest.raises(RecordError, match=r"layer2\.0\.bn1\.bias has nothing"):
        weights.read(stored(tmp_path, LAYOUTS[layout](lost))).of(own)


def test_names_decide_and_never_positions(tmp_path):
    own = {f"{a}.{b}": torch.full((4,), float(i)) for i, (a, b) in enumerate((a, b) for a in "xyz" for b in "abcd")}
    for seed in range(20):
        names = random.Random(seed).sample(sorted(own), len(own))
        with pytest.raises(RecordError):
            Weights(tmp_path, ZIP, "", {f"m.{name[::-1]}": own[name] for name in names}).of(own)
    with pytest.raises(RecordError, match=r"x\.a has nothing"):
        Weights(tmp_path, ZIP, "", {f"n{name}": value for name, value in own.items()}).of(own)


@pytest.mark.parametrize(("change", "word"), [
    (lambda own: {**own, "conv1.weight": torch.zeros(4, 3, 5, 5)}, "conv1.weight has (4, 3, 5, 5)"),
    (lambda own: {**own, "conv2.weight": torch.zeros(1)}, "conv2.weight has (1,), but the network needs nothing"),
    (lambda own: {"a": dict(own), "b": dict(own)}, "--model_prefix"),
    (lambda own: {"x": torch.zeros(3)}, "conv1.weight has nothing"),
    (lambda own: {name: value.to(torch.int8) for name, value in own.items()}, "torch.int8"),
    (lambda own: {**own, "linear.bias": own["linear.bias"] + float("nan")}, "not finite"),
    (lambda own: {**own, "linear.bias": own["linear.bias"].double() + 1e300}, "not finite"),
    (lambda own: {**own, "layer1.0.bn1.num_batches_tracked": torch.tensor(float("nan"))}, "not finite"),
    (lambda own: {**own, "linear.bias": torch.zeros(1).expand(7)}, "holds fewer values"),
])  # fmt: skip
def test_weights_of_another_network_or_kind_are_refused(change, word, tmp_path):
    own = small()
    with refuses(RecordError, word):
        weights.read(stored(tmp_path, change(own))).of(own)


@pytest.mark.parametrize(("name", "width"), [(NET, 1), (NET, 1024), ("resnet18", None), ("vgg19_bn", None)])
def test_networks_are_recognised(name, width, tmp_path):
    with torch.device("meta"):
        own = build(name, 12, width=width, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()
    found = guess(Weights(tmp_path, ZIP, "", {f"net.{key}": value for key, value in own.items()}))
    assert found == (name, width, 12, "net.")


def test_the_report_of_a_harmless_file(tmp_path):
    own = small()
    own["linear.bias"][1] = float("nan")
    path = stored(tmp_path, {"net": own})
    report = inspect.inspect(path)
    assert report["status"] == HARMLESS and report["format"] == ZIP
    assert report["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert report["network"] == {"name": NET, "width": 4, "classes": 7, "prefix": "net."}
    assert sum(tensor["values"] for tensor in report["tensors"]) == sum(value.numel() for value in own.values())
    assert {tensor["name"]: tensor["nan"] for tensor in report["tensors"] if tensor["nan"]} == {"net.linear.bias": 1}


def test_class_names_are_found(tmp_path):
    names = ["cat", "dog", "emu"]
    for content in (
        {"classes": names},
        {"meta": {"CLASSES": tuple(names)}},
        {"hyper_parameters": argparse.Namespace(class_names=names)},
        {"class_to_idx": {"emu": 2, "cat": 0, "dog": 1}},
        {"config": {"id2label": {"2": "emu", "0": "cat", "1": "dog"}}},
        {"classes": 3, "label2id": {"cat": np.int64(0), "dog": np.int64(1), "emu": np.int64(2)}},
    ):
        assert weights.read(stored(tmp_path, content)).classes == names, content
    for content in ({"classes": 3}, {"classes": ["a", "a"]}, {"class_to_idx": {"a": 1, "b": 2}}, {"classes": [1, 2]}):
        assert weights.read(stored(tmp_path, content)).classes is None, content


def ordinary() -> dict[str, Any]:
    """What trainers leave in a checkpoint beside the weights."""
    about, counts = torch.zeros(3), collections.defaultdict(list)
    about.about = "a tensor with an attribute"  # type: ignore[attr-defined]
    counts["loss"].append(0.5)
    return {
        "numpy scalars": [np.float32(98), np.int64(3), np.bool_(True), np.uint8(7), np.str_("best")],
        "arrays": [np.zeros((3, 4)), np.asfortranarray(np.ones((2, 3))), np.arange(3, dtype=">i4"), np.array(["a"])],
        "objects": [np.array([None, "x", 3], dtype=object), np.zeros(2, dtype=[("x", "f4"), ("y", "i8")])],
        "random states": [np.random.get_state(), random.getstate(), torch.get_rng_state()],
        "Namespace": argparse.Namespace(lr=0.1, inner=types.SimpleNamespace(epochs=3)),
        "collections": [counts, {1, 2}, collections.Counter([3, 3, 6])],
        "paths": [Path("/x"), PurePosixPath("a/b")],
        "times": [datetime.datetime(2026, 1, 2), datetime.timedelta(seconds=3), datetime.date(2026, 1, 2)],
        "numbers": [1j, 1 << 80, slice(1, 2), torch.Size([2, 3]), b"ab\xff", bytearray(b"ab\xff")],
        "tensor with an attribute": about,
        "version": torch.torch_version.TorchVersion("2.1"),
    }


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ordinary())
def test_ordinary_things_beside_the_weights_are_read(what, old, tmp_path):
    own = {"w": torch.rand(3)}
    path = stored(tmp_path, {"net": own, "more": ordinary()[what]}, _use_new_zipfile_serialization=not old)
    assert torch.equal(weights.read(path).tensors["net.w"], own["w"])


def test_all_that_a_file_may_call_beside_torchs_own_list_is_a_stand_in_of_ours():
    assert {thing.__module__ for thing, _ in torch_file.ALLOWED} == {torch_file.__name__}
    assert len({name for _, name in torch_file.ALLOWED}) == len(torch_file.ALLOWED)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Every hostile file, and the word that its refusal must have."""
    folder, found = tmp_path_factory.mktemp("hostile"), {}
    for i, (name, (raw, word)) in enumerate(hostile(folder / HERE).items()):
        found[name] = stored(folder, raw, f"{i}.pt"), word
    return found


def test_hostile_files_are_not_harmless_and_what_they_import_is_named(places):
    unreadable = {"deflate bomb", "false dtype", "tar"}
    for name, (path, word) in places.items():
        report = inspect.inspect(path, path.with_suffix(".safetensors"))
        assert report["status"] == (UNREADABLE if name in unreadable else SUSPICIOUS), (name, report["verdict"])
        assert word in report["verdict"] and inspect.text(report).splitlines()[-1] == report["verdict"], name
        assert not (path.parent / HERE).exists() and not path.with_suffix(".safetensors").exists(), name
    assert "posix.system" in inspect.inspect(places["os.system"][0])["verdict"]


def test_nothing_runs_by_the_audit_hook_and_the_canary(places):
    """No program, no socket, no file written, by any of three ways to open the hostile files."""
    paths = [path for path, _ in places.values()]
    honest = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])\nopen(sys.argv[1], 'w').close()\n"
    argv = [sys.executable, "-c", watched(paths) + honest, str(paths[0].parent / "mark")]
    env = environment(PYTHONPATH=str(REPOSITORY))
    env = {name: value for name, value in env.items() if not name.startswith("COV")}  # measuring writes files
    done = subprocess.run(argv, capture_output=True, text=True, env=env, timeout=250)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    events = [line for line in lines if line.startswith("event")]
    assert len(events) >= 2 and all("mark" in line or "python" in line or sys.executable in line for line in events)
    assert sum("subprocess.Popen" in line for line in events) == 1  # ours: the hook sees such things
    assert sum(line.startswith("refused") for line in lines) == 2 * len(paths)
    assert not (paths[0].parent / HERE).exists()


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_a_file_is_opened_once(name, tmp_path, monkeypatch):
    """One that changes in between cannot show one content to the checks and another one to the reader."""
    path, opened, really = tmp_path / name, [], os.open
    torch.save(small(), path) if name == "net.pt" else save_file(small(), path)
    monkeypatch.setattr(os, "open", lambda place, *how: opened.append(place) or really(place, *how))
    report = inspect.inspect(path)
    assert opened == [path] and report["status"] == HARMLESS and report["format"] in (ZIP, SAFE)


INSTEAD = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "saved web page": b"\n<!DOCTYPE html><html>sign in</html>",
    "empty (0 bytes)": b"",
}


@pytest.mark.parametrize("word", INSTEAD)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_pointer_a_web_page_and_an_empty_file_are_named(word, name, tmp_path):
    path = stored(tmp_path, INSTEAD[word], name)
    with refuses(RecordError, word, str(path)):
        weights.read(path)


def test_pipes_devices_and_folders_are_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecordError, match=str(path)):
            weights.read(path)


def test_a_result_folder_is_its_weights(tmp_path):
    save_file(small(), tmp_path / "model.safetensors")
    assert inspect.inspect(tmp_path)["status"] == HARMLESS


def test_files_that_hold_themselves_come_to_an_end(tmp_path):
    itself = in_zip(b"}q\x01" + text("") + b"h\x01s")
    assert weights.read(stored(tmp_path, itself)).tensors == {}
    value: Any = {"w": torch.zeros(2)}
    for _ in range(40):
        value = [value, value]
    assert len(weights.read(stored(tmp_path, value)).tensors) == 1
    assert weights.read(stored(tmp_path, in_zip(b"]" * 3000 + b"a" * 2999))).tensors == {}  # lists in lists


def test_names_from_a_file_move_no_cursor_and_forge_no_line(tmp_path):
    own = small()
    shown = {f"{EVIL}.{name}": value for name, value in own.items()}
    wrong = {**shown, f"{EVIL}.conv1.weight": torch.zeros(4, 3, 5, 5)}
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, wrong)).of(own)
    assert str(refusal.value).isprintable()
    twice = {f"{EVIL}{i}.{name}": own[name] for i in range(9) for name in own}
    for content in (shown, twice):
        report = inspect.inspect(stored(tmp_path, content))
        lines = inspect.text(report).split("\n")
        assert all(line.isprintable() and len(line) < 1000 for line in lines) and len(lines) == len(content) + 7


def test_verdicts_and_conversion_on_the_command_line(script, places, tmp_path):
    own = small()
    honest, evil = stored(tmp_path, lightning(own), "their.ckpt"), places["os.system"][0]
    for path, status in ((honest, HARMLESS), (evil, SUSPICIOUS), (stored(tmp_path, b"text", "y"), UNREADABLE)):
        found, out, _ = script("inspect_checkpoint.py", str(path), "--json")
        assert found == status and json.loads(out) == inspect.inspect(path)
    for path in (evil, stored(tmp_path, {"x": torch.zeros(2).cdouble()})):  # safetensors holds no complex numbers
        assert script("inspect_checkpoint.py", str(path), "--to", str(tmp_path / "new"))[0] != HARMLESS
        assert not (tmp_path / "new").exists()
    assert script("inspect_checkpoint.py", str(honest), "--to", "out.safetensors")[0] == HARMLESS
    converted = load_file(tmp_path / "out.safetensors")
    assert converted.keys() == own.keys() and all(torch.equal(converted[name], value) for name, value in own.items())
    status, _, err = script("inspect_checkpoint.py", str(honest), "--to", str(honest))
    assert status == 2 and "exists" in the_error(err)
