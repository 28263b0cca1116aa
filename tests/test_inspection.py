"""Files of other people's networks: what is in them, hostile ones, six honest layouts, and the way to safetensors."""

import argparse
import collections
import datetime
import decimal
import fractions
import hashlib
import io
import json
import os
import pickle
import random
import subprocess
import sys
import types
import uuid
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import torch
from hostile import HERE, Call, deflated, hostile, in_zip, saved, text, watched
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from toys import REPOSITORY, environment, the_error

from sau.compat import inspect, torch_file, weights
from sau.compat.inspect import HARMLESS, SUSPICIOUS, UNREADABLE, look
from sau.compat.weights import ONNX, SAFE, guess
from sau.data.decode import read_image
from sau.errors import RecordError, SauError
from sau.models import build

NET = "preactresnet18"
ZIP, OLD = "torch zip archive", "torch before 1.6"


def small(width: int = 4, classes: int = 7) -> dict[str, Tensor]:
    """A state dict of the library's network."""
    torch.manual_seed(0)
    return build(NET, classes, width=width, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()


def stored(tmp_path: Path, content: Any, name: str = "net.pt", **options: Any) -> Path:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else saved(content, **options))
    return tmp_path / name


def lightning(own: dict[str, Tensor]) -> dict[str, Any]:
    adam = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "epoch": 3,
        "global_step": 12,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": OrderedDict({f"model.{name}": value for name, value in own.items()}),
        "optimizer_states": [adam],
        "lr_schedulers": [{"last_epoch": 3}],
        "hyper_parameters": {"lr": 0.1, "name": "cifar"},
    }


LAYOUTS = {
    "plain": lambda own: saved(OrderedDict(own)),
    "several GPUs": lambda own: saved(OrderedDict({f"module.{name}": value for name, value in own.items()})),
    "Lightning": lambda own: saved(lightning(own)),
    "BackdoorBox": lambda own: saved(OrderedDict(own), _use_new_zipfile_serialization=False),
    "BackdoorBench, numpy 2": lambda own: in_benchmark(own, b"numpy._core"),
    "BackdoorBench, numpy 1": lambda own: in_benchmark(own, b"numpy.core"),
}


def in_benchmark(own: dict[str, Tensor], core: bytes) -> bytes:
    """A zip file with the weights below `model` beside an array in numpy's words; `hostile.in_zip` has one tensor."""
    raw = saved({"model": OrderedDict(own), "clean_data": "cifar10", "bd_test": {"indices": np.arange(3)}})
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(out, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            new.writestr(member.filename, content.replace(b"numpy._core", core).replace(b"numpy.core", core))
    return out.getvalue()


# Harmless files


@pytest.mark.parametrize("layout", LAYOUTS)
def test_six_honest_layouts_load_or_say_which_key_is_missing(layout, tmp_path, one_line):
    own = small()
    found = weights.read(path := stored(tmp_path, LAYOUTS[layout](own)))
    assert found.kind == (OLD if layout == "BackdoorBox" else ZIP)
    assert "torch._utils._rebuild_tensor_v2" in torch_file.imports(path.read_bytes())
    assert all(torch.equal(value, own[name]) for name, value in found.of(own).items()) and list(found.of(own)) == [*own]
    assert guess(found).name == NET
    lost = {name: value for name, value in own.items() if name != "layer2.0.bn1.bias"}
    broken = weights.read(stored(tmp_path, LAYOUTS[layout](lost)))
    with pytest.raises(RecordError) as refusal:
        broken.of(own)
    assert "lacks" in str(refusal.value) and "layer2.0.bn1.bias" in one_line(refusal.value)


def test_names_decide_and_never_positions(tmp_path, one_line):
    """100 of 100 exchanges of names are refused, whatever the layout."""
    own = {f"{a}.{b}": torch.full((4,), float(i)) for i, (a, b) in enumerate((a, b) for a in "xyz" for b in "abcd")}
    for seed in range(100):
        names = random.Random(seed).sample(sorted(own), len(own))
        other = {f"m.{name[::-1]}": own[name] for name in names}
        with pytest.raises(RecordError) as refusal:
            weights.Weights(tmp_path, ZIP, "", other, {}).of(own)
        one_line(refusal.value)


def test_a_name_that_only_ends_like_a_weight_is_another_one(tmp_path, one_line):
    glued = {f"x{name}": torch.zeros(2) for name in ("fc.weight", "fc.bias")}
    with pytest.raises(RecordError) as refusal:
        weights.Weights(tmp_path, ZIP, "", glued, {}).under(["fc.weight", "fc.bias"])
    assert "has no 'fc.weight'" in one_line(refusal.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda own: {**own, "conv1.weight": torch.zeros(4, 3, 5, 5)}, "shape [4, 3, 5, 5]"),
        (lambda own: {**own, "conv2.weight": torch.zeros(1)}, "unknown 'conv2.weight'"),
        (lambda own: {"a": own, "b": own}, "2 times"),
        (lambda own: {"x": torch.zeros(3)}, "no 'conv1.weight'"),
    ],
)
def test_weights_of_another_network(change, word, tmp_path, one_line):
    own = small()
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, change(own))).of(own)
    assert word in one_line(refusal.value)


@pytest.mark.parametrize(("width", "classes"), [(1, 2), (4, 7), (16, 10), (64, 43)])
def test_the_librarys_network_is_recognised_in_any_width(width, classes, tmp_path):
    with torch.device("meta"):
        own = build(NET, classes, width=width, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()
    found = guess(weights.Weights(tmp_path, ZIP, "", {f"net.{name}": value for name, value in own.items()}, {}))
    assert (found.name, found.width, found.classes, found.prefix) == (NET, width, classes, "net.")


@pytest.mark.parametrize("name", ["resnet18", "vgg19_bn"])
def test_torchvisions_networks_are_recognised(name, tmp_path):
    from torchvision import models

    with torch.device("meta"):
        own = models.get_model(name, weights=None, num_classes=12).state_dict()
    found = guess(weights.Weights(tmp_path, ZIP, "", dict(own), {}))
    assert (found.name, found.width, found.classes) == (name, None, 12)


def test_the_report_of_a_harmless_file(tmp_path):
    own = small()
    own["linear.bias"][1] = float("nan")
    report, _, known = look(stored(tmp_path, {"net": own, "clean_data": "gtsrb"}))
    assert report["status"] == HARMLESS and report["format"] == ZIP and known.prefix == "net."
    assert report["network"] == {"name": NET, "width": 4, "classes": 7, "prefix": "net."}
    assert len(report["tensors"]) == len(own) and sum(t["values"] for t in report["tensors"]) == sum(
        value.numel() for value in own.values()
    )
    assert {t["name"]: t["nan"] for t in report["tensors"] if t["nan"]} == {"net.linear.bias": 1}
    assert report["normalisation"] == {"mean": [0.0] * 3, "std": [1.0] * 3, "from": "clean_data, gtsrb"}
    assert "torch._utils._rebuild_tensor_v2" in report["imports"]
    assert "1 of them hold NaN" in report["verdict"] and "\n" not in report["verdict"]
    lines = inspect.text(report).splitlines()
    assert lines[-1] == report["verdict"] and "tensor    net.linear.bias  [7]  float32  1 NaN" in lines


def test_statistics_among_the_tensors_are_found(tmp_path):
    content = {"norm.mean": torch.tensor([0.5, 0.25, 0.125]).view(1, 3, 1, 1), "norm.std": torch.full((3,), 0.5)}
    content |= {"bn.running_mean": torch.zeros(3)}
    save_file(content, tmp_path / "x.safetensors")
    report, _, known = look(tmp_path / "x.safetensors")
    assert report["format"] == SAFE and known is None
    assert report["normalisation"] == {"mean": [0.5, 0.25, 0.125], "std": [0.5] * 3, "from": "norm.mean"}


NONE_OF_IT = {
    "not finite": ({"x.mean": torch.tensor([float("nan")]), "x.std": torch.ones(1)}, {}),
    "of a batch norm": ({"x.running_mean": torch.zeros(3), "x.running_std": torch.ones(3)}, {}),
    "of two lengths": ({"x.mean": torch.zeros(3), "x.std": torch.ones(1)}, {}),
    "of two channels": ({"x.mean": torch.zeros(2), "x.std": torch.ones(2)}, {}),
    "of unknown pictures": ({}, {"clean_data": "imagenet"}),
}


@pytest.mark.parametrize("what", NONE_OF_IT)
def test_what_is_no_normalisation_is_not_taken_for_one(what, tmp_path):
    assert inspect.normalisation(weights.Weights(tmp_path, ZIP, "", *NONE_OF_IT[what])) is None


def test_an_onnx_file_is_read(tmp_path):
    onnx = pytest.importorskip("onnx")
    weight = onnx.numpy_helper.from_array(torch.arange(6.0).view(2, 3).numpy(), "fc.weight")
    graph = onnx.helper.make_graph([], "g", [], [], [weight])
    model = onnx.helper.make_model(graph)
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    found = weights.read(tmp_path / "x.onnx")
    assert found.digest == hashlib.sha256((tmp_path / "x.onnx").read_bytes()).hexdigest()
    assert found.kind == ONNX and torch.equal(found.tensors["fc.weight"], torch.arange(6.0).view(2, 3))
    weight.external_data.add(key="location", value="../../secret")
    (tmp_path / "x.onnx").write_bytes(
        onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], [weight])).SerializeToString()
    )
    with pytest.raises(RecordError, match="another file"):
        weights.read(tmp_path / "x.onnx")


def test_without_onnx_its_line_of_installation_is_said(tmp_path, monkeypatch, one_line):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, b"\x08\x07" + b"x" * 20, "x.onnx"))
    assert "pip install -e '.[onnx]'" in one_line(refusal.value)


# Hostile files


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Every hostile file, and the word that its refusal must have."""
    folder = tmp_path_factory.mktemp("hostile")
    found = {}
    for i, (name, (raw, word)) in enumerate(hostile(folder / HERE).items()):
        (folder / f"{i}.pt").write_bytes(raw)
        found[name] = folder / f"{i}.pt", word
    return found


def test_hostile_files_are_suspicious_and_what_they_ask_for_is_named(places):
    unreadable = {"deflate bomb", "false dtype", "tar"}
    said: dict[str, str | None] = {}
    for name, (path, word) in places.items():
        report, found, _ = look(path)
        assert found is None and report["status"] != HARMLESS and not (path.parent / HERE).exists(), name
        assert report["status"] == (UNREADABLE if name in unreadable else SUSPICIOUS), (name, report["verdict"])
        assert word in report["verdict"], (name, report["verdict"])
        assert inspect.text(report).splitlines()[-1] == report["verdict"]
        said[name] = report["format"]
    assert said.pop("legacy") == OLD and said.pop("tar") is None and set(said.values()) == {ZIP}


def test_nothing_runs_by_the_audit_hook_and_the_canary(places):
    """No program, no socket, no file written, by any of three ways to open 15 hostile files."""
    paths = [path for path, _ in places.values()]
    calls = "torch_file.load(path)", "weights.read(path)", "inspect.look(path)"
    code = watched(calls[0], paths) + "".join(
        f"\nfor path in map(Path, {[str(path) for path in paths]!r}):\n    try:\n        {call}\n"
        "    except RecordError as error:\n        print('refused', error)\n"
        for call in calls[1:]
    )
    honest = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', ''])\nopen(sys.argv[1], 'w').close()\n"
    argv = [sys.executable, "-c", code + honest, str(paths[0].parent / "mark")]
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
def test_what_is_judged_is_what_is_read(name, tmp_path, monkeypatch):
    """Once: a file that changes in between cannot show one content to the checks and another one to the reader."""
    path, opened = tmp_path / name, []
    path.write_bytes(saved(small()) if name == "net.pt" else save(small()))
    really = os.open
    monkeypatch.setattr(os, "open", lambda place, *how: opened.append(place) or really(place, *how))
    report, found, _ = look(path)
    assert opened == [path] and found is not None and report["status"] == HARMLESS and report["sha256"] == found.digest


def ordinary() -> dict[str, Any]:
    """What trainers leave in a checkpoint beside the weights."""
    about = torch.zeros(3)
    about.about = "a tensor with an attribute"  # type: ignore[attr-defined]
    state = np.random.RandomState(0)
    counts: Any = collections.defaultdict(list)
    counts["loss"].append(0.5)
    return {
        "numpy scalars": [np.float32(98), np.float16(1), np.int64(3), np.bool_(True), np.uint8(7), np.str_("best")],
        "arrays": [np.zeros((3, 4)), np.asfortranarray(np.ones((2, 3))), np.arange(3, dtype=">i4"), np.array(["a"])],
        "an array of objects": np.array([None, "x", 3], dtype=object),
        "structured array": np.zeros(2, dtype=[("x", "f4"), ("y", "i8")]),
        "random states": [np.random.get_state(), state, np.random.default_rng(0), random.getstate(), random.Random(1)],
        "torch's random state": torch.get_rng_state(),
        "Namespace": argparse.Namespace(lr=0.1, inner=types.SimpleNamespace(epochs=3)),
        "defaultdict": counts,
        "deque": collections.deque([1, 2], maxlen=3),
        "paths": [Path("/x"), PureWindowsPath("c:/x"), PurePosixPath("a/b")],
        "times": [datetime.datetime(2026, 1, 2), datetime.timedelta(seconds=3), datetime.date(2026, 1, 2)],
        "numbers": [decimal.Decimal("0.1"), fractions.Fraction(1, 3), 1j, 1 << 80, range(3), slice(1, 2)],
        "sets": [{1, 2}, frozenset({3}), Counter([3, 3, 6]), torch.Size([2, 3])],
        "bytes": [b"ab\xff", bytearray(b"ab\xff"), os.urandom(1000)],
        "identifier": uuid.UUID(int=5),
        "tensor with an attribute": about,
        "version": torch.torch_version.TorchVersion("2.1"),
    }


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("what", ordinary())
def test_ordinary_things_beside_the_weights_are_read(what, old, tmp_path):
    own = small()
    content = {"net": OrderedDict(own), "more": ordinary()[what]}
    path = stored(tmp_path, content, _use_new_zipfile_serialization=not old)
    assert all(torch.equal(value, own[name]) for name, value in weights.read(path).of(own).items())
    assert look(path)[0]["status"] == HARMLESS


def test_values_of_stand_ins_are_those_of_the_file(tmp_path):
    arrays = [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3)), np.arange(3, dtype=">i4")]
    scalars = [np.float32(0.5), np.int64(-3), np.bool_(True), np.float16(2)]
    content = {"arrays": arrays, "scalars": scalars, "args": argparse.Namespace(lr=0.1), "dir": Path("/x/y")}
    found, _ = torch_file.load(stored(tmp_path, {**content, "objects": np.array([1, None], dtype=object)}))
    assert [array.values.tolist() for array in found["arrays"]] == [array.tolist() for array in arrays]
    assert found["scalars"] == [0.5, -3, True, 2.0] and found["args"] == {"lr": 0.1} and found["dir"] == "/x/y"
    assert found["objects"].values.tolist() is None


def test_all_that_a_file_may_call_beside_torchs_own_list_is_a_stand_in_of_ours():
    assert {thing.__module__ for thing, _ in torch_file.ALLOWED} == {torch_file.__name__}
    assert len({name for _, name in torch_file.ALLOWED}) == len(torch_file.ALLOWED)


class Config(dict[str, Any]):
    """As OmegaConf's and EasyDict's: a class that no reader knows."""


@pytest.mark.parametrize("key", ["state_dict", "model", None])
@pytest.mark.parametrize("whole", [False, True])
def test_a_class_that_is_not_known_gets_the_line_that_saves_the_weights_alone(key, whole, tmp_path, one_line):
    """The line is run, as a user would who trusts the file."""
    net = torch.nn.Linear(2, 3)
    content = net if whole else {**net.state_dict(), **({} if key else {"cfg": Config(a=1)})}
    path = stored(tmp_path, {key: content, "cfg": Config(a=1)} if key else content)
    with pytest.raises(torch_file.ProgramError) as refusal:
        weights.read(path)
    line = one_line(refusal.value)
    assert "nothing of it was run" in line and "Only if you trust" in line and "harmful" not in line
    if not key and not whole:  # its state dict and the rest lie side by side
        return
    command = line[line.index("torch.save(") : line.rindex('"')]
    code = f"import sys, torch; sys.path.insert(0, {str(REPOSITORY / 'tests')!r}); {command}"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment(), check=True, timeout=120)
    found = weights.read(tmp_path / "weights.pth").of(net.state_dict())
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())


@pytest.mark.parametrize("call", [Call(os.system, "true"), Call(eval, "1"), Call(subprocess.check_call, ["true"])])
def test_of_a_file_that_would_run_a_program_no_line_is_given_to_load_it(call, tmp_path, one_line):
    with pytest.raises(torch_file.ProgramError) as refusal:
        weights.read(stored(tmp_path, {"state_dict": small(), "x": call}))
    assert "it may be harmful" in one_line(refusal.value) and "weights_only" not in str(refusal.value)


INSTEAD = {
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "saved web page": b"\n<!DOCTYPE html><html>sign in</html>",
    "web page": b"<HTML><head>",
    "empty (0 bytes)": b"",
}


@pytest.mark.parametrize("word", INSTEAD)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors", "x.onnx", "x.png"])
def test_what_lies_there_instead_of_the_file_is_named(word, name, tmp_path, one_line):
    path = stored(tmp_path, INSTEAD[word], name)
    with pytest.raises(SauError) as refusal:
        (read_image if name == "x.png" else weights.read)(path)
    assert word in one_line(refusal.value) and str(path) in str(refusal.value)


def test_class_names_and_the_size_of_images_are_found(tmp_path):
    names = ["cat", "dog", "emu"]
    for content in (
        {"classes": names},
        {"meta": {"CLASSES": tuple(names)}},
        {"hyper_parameters": argparse.Namespace(class_names=names)},
        {"class_to_idx": {"emu": 2, "cat": 0, "dog": 1}},
        {"idx_to_class": {2: "emu", 0: "cat", 1: "dog"}},
        {"config": {"id2label": {"2": "emu", "0": "cat", "1": "dog"}}},
        {"classes": 3, "label2id": {"cat": np.int64(0), "dog": np.int64(1), "emu": np.int64(2)}},
    ):
        assert weights.read(stored(tmp_path, {"net": small(), **content})).classes == names, content
    for content in ({"classes": 3}, {"classes": ["a", "a"]}, {"class_to_idx": {"a": 1, "b": 2}}, {"classes": [1, 2]}):
        assert weights.read(stored(tmp_path, {"net": small(), **content})).classes is None, content
    for size, wanted in ((64, 64), ((3, 224, 224), 224), ([32, 32, 3], 32), ("64", None), ([], None), (None, None)):
        assert weights.read(stored(tmp_path, {"args": argparse.Namespace(img_size=size)})).input_size == wanted
    report, _, _ = look(stored(tmp_path, {"net": small(), "classes": [*names, "\x1b[2J\n", "x", "y"], "img_size": 24}))
    lines = inspect.text(report).splitlines()
    assert "classes   0 = cat, 1 = dog, 2 = emu, ..., 5 = y" in lines and "size      24" in lines


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_statistics_that_a_file_states_are_found(kind, tmp_path):
    found = weights.read(stored(tmp_path, {"cfg": {"mean": kind([0.5, 0.25, 0.125]), "std": kind([0.5, 0.5, 1.0])}}))
    wanted = {"mean": [0.5, 0.25, 0.125], "std": [0.5, 0.5, 1.0], "from": "cfg.mean"}
    assert inspect.normalisation(found) == wanted


def test_a_second_pickle_in_an_archive_is_refused(tmp_path, one_line):
    raw = io.BytesIO(saved({"x": torch.zeros(2)}))
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr("archive/more.pkl", b"\x80\x02cos\nsystem\n.")
    report, found, _ = look(path := stored(tmp_path, raw.getvalue()))
    assert found is None and report["status"] == SUSPICIOUS and "os.system" in report["imports"]
    with pytest.raises(RecordError) as refusal:
        inspect.inspect(path, tmp_path / "x.safetensors") and weights.read(path)
    assert "holds 2 pickles" in one_line(refusal.value) and not (tmp_path / "x.safetensors").exists()


def test_an_archive_that_declares_more_than_it_has_is_refused(tmp_path, one_line):
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, deflated(200)))
    assert "declares more bytes than the file has" in one_line(refusal.value)


@pytest.mark.parametrize("times", [2, 60])
def test_a_file_that_holds_itself_comes_to_an_end(times, tmp_path, monkeypatch, one_line):
    """By its depth, and by the number of its values where each list holds the one before twice."""
    monkeypatch.setattr(weights, "VALUES", 10_000)
    content: Any = in_zip(b"}q\x01" + text("") + b"h\x01s")
    if times == 60:
        value: Any = "text"
        for _ in range(40):
            value = [value, value]
        content = value
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, content))
    assert "parts of it hold themselves" in one_line(refusal.value)


def test_names_are_read_from_every_kind_of_pickle():
    call = {"x": Call(os.system, "true")}
    for raw in (saved(call), saved(call, _use_new_zipfile_serialization=False), pickle.dumps(call, 2)):
        assert "posix.system" in torch_file.imports(raw)
    assert torch_file.imports(pickle.dumps(call, 4)) == ["posix.system"]
    assert torch_file.imports(b"PK\x03\x04junk") == torch_file.imports(b"") == torch_file.imports(b"text") == []


@pytest.mark.parametrize("old", [False, True])
def test_many_weights_are_read(old, tmp_path):
    """torch keeps a dictionary of hooks for each tensor, and two for each parameter."""
    own = {f"w{i}": torch.nn.Parameter(torch.zeros(1)) for i in range(1500)}
    content = {"net": OrderedDict(own), "ema": OrderedDict(own)}
    found = weights.read(stored(tmp_path, content, _use_new_zipfile_serialization=not old))
    assert len(found.tensors) == 3000


@pytest.mark.parametrize("name", ["conv1.weight", "linear.bias"])
def test_a_first_or_last_weight_without_a_dimension_is_no_network_of_ours(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sau.compat.weights.torchvision_names", tuple)
    found = weights.read(stored(tmp_path, {**small(), name: torch.tensor(1.0)}))
    assert guess(found) is None


def test_a_network_wider_than_any_of_ours_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr("sau.compat.weights.torchvision_names", tuple)
    for width in (1024, 1025):
        with torch.device("meta"):
            own = build(NET, 2, width=width, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()
        found = guess(weights.Weights(tmp_path, ZIP, "", dict(own), {}))
        assert (found and found.width) == (1024 if width == 1024 else None)


def test_a_tensor_that_repeats_its_values_is_refused(tmp_path, one_line):
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, {"w": torch.zeros(1).expand(4)}))
    assert "'w' claims shape [4], but holds fewer values" in one_line(refusal.value)


# The process of its own, and the script


def test_conversion_from_the_command_line(tmp_path):
    own = small()
    path = stored(tmp_path, lightning(own), "their.ckpt")
    argv = [sys.executable, str(REPOSITORY / "scripts" / "inspect_checkpoint.py"), str(path), "--to", "out.safetensors"]
    done = subprocess.run(argv, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.splitlines()[-1].startswith("harmless")
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == own.keys() and all(torch.equal(out[name], value) for name, value in own.items())
    assert os.stat(tmp_path / "out.safetensors").st_mode & 0o777 == 0o644


def test_what_is_no_plain_file_is_refused_at_once(tmp_path, one_line):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecordError) as refusal:
            weights.read(path)
        assert str(path) in one_line(refusal.value)
    assert look(tmp_path)[0]["status"] == UNREADABLE


EVIL = "\x1b[2J\nharmless to open\ud800\u202e" + "x" * 200


def test_names_from_a_file_move_no_cursor_and_forge_no_line(tmp_path, one_line):
    own = {f"{EVIL}.{name}": value for name, value in small().items()}
    shown = {**own, f"{EVIL}.mean": torch.zeros(3), f"{EVIL}.std": torch.zeros(3)}
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, {**own, f"{EVIL}.conv1.weight": torch.zeros(4, 3, 5, 5)})).of(small())
    assert one_line(refusal.value).isprintable()
    for content in (own, shown):
        report, _, _ = look(stored(tmp_path, content))
        lines = inspect.text(report).split("\n")
        assert all(line.isprintable() and len(line) < 250 for line in lines) and lines[-1] == report["verdict"]
        assert len(lines) == len(content) + len(report["imports"]) + 9


def test_a_network_that_is_there_twice_is_said_to_be(tmp_path, one_line):
    """Its tensors are converted as they are, for nobody has said which is meant."""
    own = small()
    path = stored(tmp_path, {"model": own, "ema": own})
    report, found, known = look(path)
    assert (report["status"], report["network"], known) == (HARMLESS, None, None)
    assert report["verdict"].endswith("a known network more than once: under 'ema.', 'model.'")
    assert "network   more than once, under 'ema.', 'model.'" in inspect.text(report).split("\n")
    with pytest.raises(weights.SeveralError) as refusal:
        guess(found)
    assert f"{path} holds the network 2 times" in one_line(refusal.value) and "--model_prefix" in str(refusal.value)
    inspect.inspect(path, tmp_path / "both.safetensors")
    assert len(load_file(tmp_path / "both.safetensors")) == 2 * len(own)


def test_prefixes_from_a_file_move_no_cursor_and_forge_no_line(tmp_path, one_line):
    own = small()
    report, found, _ = look(stored(tmp_path, {f"{EVIL}{i}.{name}": own[name] for i in range(9) for name in own}))
    assert report["verdict"].isprintable() and report["verdict"].isascii() and len(report["verdict"]) < 1000
    assert all(line.isprintable() for line in inspect.text(report).split("\n"))
    with pytest.raises(weights.SeveralError) as refusal:
        guess(found)
    assert one_line(refusal.value).isprintable() and "9 times" in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda own: {name: value.to(torch.int8) for name, value in own.items()}, "torch.int8"),
        (lambda own: {**own, "linear.weight": own["linear.weight"].to(torch.complex64)}, "torch.complex64"),
        (lambda own: {**own, "layer1.0.bn1.num_batches_tracked": torch.tensor(1, dtype=torch.int32)}, "torch.int32"),
        (lambda own: {**own, "linear.bias": own["linear.bias"] + float("nan")}, "not finite"),
        (lambda own: {**own, "linear.bias": own["linear.bias"].double() + 1e300}, "not finite"),
        (lambda own: {**own, "layer1.0.bn1.running_var": -own["layer1.0.bn1.running_var"]}, "negative variance"),
    ],
)
def test_weights_of_another_kind_are_refused_and_not_cast(change, word, tmp_path, one_line):
    own = small()
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, change(own))).of(own)
    assert word in one_line(refusal.value)
    doubles = {name: value.double() if value.is_floating_point() else value for name, value in own.items()}
    found = weights.read(stored(tmp_path, doubles)).of(own)
    assert all(torch.equal(found[name], own[name]) and found[name].dtype == own[name].dtype for name in own)


def test_verdicts_on_the_command_line(script, places, tmp_path):
    honest, evil = stored(tmp_path, {"x": torch.zeros(2)}), places["os.system"][0]
    for path, status in ((honest, HARMLESS), (evil, SUSPICIOUS), (stored(tmp_path, b"text", "y"), UNREADABLE)):
        found, out, _ = script("inspect_checkpoint.py", str(path), "--json")
        assert found == status and json.loads(out) == look(path)[0]
    for content, path in (("suspicious", evil), ("converted", stored(tmp_path, {"x": torch.zeros(2).cdouble()}))):
        found, out, err = script("inspect_checkpoint.py", str(path), "--to", str(tmp_path / "new"))
        assert found != HARMLESS and "was not written" in err and content in out.splitlines()[-1]
        assert not (tmp_path / "new").exists()


def test_mistakes_in_the_command(script, tmp_path):
    honest = stored(tmp_path, {"x": torch.zeros(2)})
    for argv, word in (([str(tmp_path / "none")], "no file"), ([str(honest), "--to", str(honest)], "exists")):
        status, _, err = script("inspect_checkpoint.py", *argv)
        assert status == 2 and word in the_error(err)
