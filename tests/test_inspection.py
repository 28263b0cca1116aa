"""Files of other people's networks: what is in them, hostile ones, six honest layouts, and the way to safetensors."""

import hashlib
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import HERE, Call, deflated, hostile, in_zip, saved, tarred, text, watched
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor
from toys import REPOSITORY, environment, the_error

from sau.errors import RecordError
from sau.foreign import inspection, pickles, weights
from sau.foreign.formats import OLD, ONNX, SAFE, ZIP
from sau.foreign.guess import guess
from sau.foreign.inspection import HARMLESS, SUSPICIOUS, UNREADABLE, look
from sau.models import build

NET = "preactresnet18"
STORAGE = torch.zeros(1 << 20)


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
    import numpy as np

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
    assert 0 < len(names := {*pickles.imports(path.read_bytes())}) and names <= pickles.allowed()
    assert all(torch.equal(value, own[name]) for name, value in found.of(own).items()) and list(found.of(own)) == [*own]
    assert guess(found).name == NET
    lost = {name: value for name, value in own.items() if name != "layer2.0.bn1.bias"}
    broken = weights.read(stored(tmp_path, LAYOUTS[layout](lost)))
    with pytest.raises(RecordError) as refusal:
        broken.of(own)
    assert "lacks" in str(refusal.value) and "layer2.0.bn1.bias" in one_line(refusal.value)


def test_names_decide_and_never_positions(tmp_path, one_line):
    """100 of 100 exchanges of names are refused, whatever the layout."""
    import random

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
    assert "torch._utils._rebuild_tensor_v2" in report["imports"] and report["refused"] == []
    assert "1 of them hold NaN" in report["verdict"] and "\n" not in report["verdict"]
    lines = inspection.text(report).splitlines()
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
    assert inspection.normalisation(weights.Weights(tmp_path, ZIP, "", *NONE_OF_IT[what])) is None


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


def test_hostile_files_are_suspicious_and_their_imports_named(places):
    whole = {"deflate bomb": "compressed", "false dtype": "dtype", "TorchScript": "TorchScript"}
    named = dict.fromkeys(("object array", "legacy", "tar", "os.system"), "posix.system")
    said: dict[str, str | None] = {}
    for name, (path, word) in places.items():
        report, found, _ = look(path)
        assert found is None and report["status"] != HARMLESS and not (path.parent / HERE).exists(), name
        assert whole.get(name) or report["status"] == SUSPICIOUS, (name, report["verdict"])
        wanted = whole.get(name) or named.get(name, word)
        assert wanted in report["verdict"] + " ".join(report["refused"]), (name, report["verdict"])
        said[name] = report["format"]
    assert said.pop("legacy") == OLD and said.pop("tar") is None and set(said.values()) == {ZIP}


def test_nothing_runs_by_the_audit_hook_and_the_canary(places):
    """No program, no socket, no file written, by any of three ways to open 15 hostile files."""
    paths = [path for path, _ in places.values()]
    calls = "torchfile.load(path, old=True)", "weights.read(path)", "inspection.look(path)"
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


def test_names_that_are_put_together_are_not_harmless():
    def zipped(code: bytes) -> list[str]:
        return pickles.imports(in_zip(code))

    assert zipped(text("os") + text("system") + b"\x93") == ["os.system"]
    assert zipped(text("os") + b"\x94" + text("system") + b"\x94" + b"\x93") == ["os.system"]
    assert zipped(text("os") + b"q\x050" + text("system") + b"q\x060" + b"h\x05h\x06\x93") == ["os.system"]
    assert zipped(text("os") + text("system") + b"N0\x93") == [pickles.UNKNOWN]
    assert zipped(text("os") + text("x") + b"0" + text("system") + b"\x93") == [pickles.UNKNOWN]
    assert zipped(b"\x82\x01") == [pickles.UNKNOWN]
    assert zipped(b"(ios\nsystem\n") == ["os.system"]
    hexed = b"\x80\x02I0x10\n0cos\nsystem\n(tR."  # a number that the unpickler in C reads, and pickletools does not
    assert zipped(hexed) == pickles.imports(hexed) == [pickles.MALFORMED]
    braced = b"\x80\x02U\x05abcd{0" + hexed[2:]  # the ninth byte is that of safetensors
    assert pickles.imports(braced) == [pickles.MALFORMED]
    assert pickles.imports(b"\x80\x02I0x10") == [] and zipped(b"\x80\x02X\x09\0\0\0cos") == []  # cut off: no more of it
    assert pickles.imports(b"cbuiltins\nprint\n(S'x'\ntR.") == ["builtins.print"]  # protocol 0
    assert pickles.imports(b"class Foo:\n    pass\n") == pickles.imports(b"import os\nprint(1)\n") == []  # texts
    assert pickles.imports(save({"c": torch.full((99,), 1e-9)})) == []
    assert pickles.imports(b"PK\x03\x04" + b"junk") == [] and pickles.imports(b"") == []


def test_a_file_may_hide_no_second_pickle(tmp_path):
    """Beside honest weights, where another reader may come to it."""
    raw = io.BytesIO(saved({"x": torch.zeros(2)}))
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr("archive/more.pkl", b"\x80\x02cos\nsystem\n.")
    report, found, _ = look(stored(tmp_path, raw.getvalue()))
    assert found is not None and report["status"] == SUSPICIOUS and "os.system" in report["verdict"]


@pytest.mark.parametrize("name", ["archive/data/1", "archive/more.pkl"])
@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_is_found_by_its_name_or_by_its_beginning(name, protocol):
    """One of protocol 0 or 1 begins with any letter, and counts where it is called a pickle."""
    raw = io.BytesIO(saved({"x": torch.zeros(2)}))
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr(name, pickle.dumps(Call(os.system, "true"), protocol))
    called = name.endswith(".pkl")
    assert ("posix.system" in pickles.imports(raw.getvalue())) == (protocol > 1 or called)
    cut = pickle.dumps(Call(os.system, "true"), protocol)[:-1] + b"\xff."
    assert (pickles.imports(cut) == ["posix.system", pickles.MALFORMED]) == (protocol > 1)


@pytest.mark.parametrize("place", range(5))
def test_each_of_the_pickles_in_an_old_file_is_followed_to_its_end(place):
    """By opcodes that the unpickler in C reads, and pickletools does not."""
    raw = saved({"x": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    stream, ends = io.BytesIO(raw), [0]
    for _ in range(5):
        list(pickletools.genops(stream))
        ends.append(stream.tell())
    assert pickles.MALFORMED not in pickles.imports(raw)
    evil = raw[: ends[place]] + b"\x80\x02I0x10\n0cos\nsystem\n(tR." + raw[ends[place + 1] :]
    assert pickles.MALFORMED in pickles.imports(evil)


def test_a_pickle_of_more_opcodes_than_are_read_is_not_harmless(monkeypatch):
    raw = saved({"x": torch.zeros(2)})
    assert pickles.UNKNOWN not in pickles.imports(raw)
    monkeypatch.setattr(pickles, "OPCODES", 10)
    assert pickles.imports(raw)[-1] == pickles.UNKNOWN


def test_the_bad_name_may_come_late(tmp_path):
    """Behind a thousand that may pass, and where there are more names than are looked at."""
    late = b"ccollections\nOrderedDict\n0" * 1000 + b"cos\nsystem\n."
    raw = io.BytesIO(saved({"x": torch.zeros(2)}))
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr("archive/more.pkl", b"\x80\x02" + late)
    report, found, _ = look(stored(tmp_path, raw.getvalue()))
    assert found is not None and report["status"] == SUSPICIOUS and "os.system" in report["verdict"]
    many = pickles.imports(b"\x80\x02" + b"".join(b"ca\nb%d\n0" % i for i in range(2000)) + b"N.")
    assert len(many) == pickles.MOST + 2 and many[-1] == pickles.UNKNOWN


def both(code: bytes) -> bytes:
    """A file of safetensors that is also a pickle: its length begins with U, the opcode of a short string; such strings
    lead through a text in its header to `code` among the content of its tensor.
    """
    head, tail = b'{"__metadata__":{"a":"', b'"},"w":{"dtype":"U8","shape":[400],"data_offsets":[0,400]}}'
    for skipped in range(28, 120):
        size = ord("U") | skipped << 8
        filled = head + b"A" * (size - len(head) - len(tail)) + tail
        raw, place, end = bytearray(struct.pack("<Q", size) + filled + bytes(400)), 2 + skipped, 8 + size + 5
        while (left := end - place - 2) > 125:
            raw[place : place + 2] = b"U`"
            place += 2 + ord("`")
        if left > len(tail) + 10 and left != ord("\\"):
            raw[place : place + 2] = b"U" + bytes([left])
            raw[end : end + len(code)] = code
            return bytes(raw)
    raise AssertionError


def test_safetensors_that_are_also_a_pickle_are_suspicious(tmp_path):
    """Whether the pickle ends or not: an ordinary reader has run the call by then."""
    for code in (b"cos\nsystem\n(S'true'\ntR.", b"cos\nsystem\n(S'true'\ntR\xff"):
        raw = both(code)
        assert load(raw)["w"].shape == (400,)
        report, _, _ = look(stored(tmp_path, raw))
        assert report["status"] == SUSPICIOUS and "os.system" in report["verdict"]
    assert pickles.imports(save({"w": torch.arange(400)})) == []


BOMBS: dict[str, tuple[Any, str]] = {
    "bytes by number": (lambda: saved(Call(bytearray, 3 << 30)), "memory that it has no content for"),
    "a tensor by number": (lambda: saved({"w": Call(torch.FloatTensor, 64, 64)}), "memory that it has no content for"),
    "a tensor of no type": (lambda: saved({"w": Call(torch.Tensor, 64, 64)}), "memory that it has no content for"),
    "a storage by number": (lambda: saved({"w": Call(torch.UntypedStorage, 1 << 40)}), "takes no arguments"),
    "doubled bytes": (
        lambda: in_zip(b"c_codecs\nencode\n" * 20 + text("a") + (text("hex_codec") + b"\x86R") * 20),
        "bytes by 'hex_codec', allowed is latin1",
    ),
    "copied bytes": (
        lambda: in_zip(
            b"(c_codecs\nencode\nq\x00" + text("a" * 4000) + text("latin1") + b"\x86q\x01" + b"h\x00h\x01R" * 999 + b"t"
        ),
        "more of its content than there is",
    ),
    "copied sets": (
        lambda: in_zip(b"(c__builtin__\nset\nq\x00(" + b"K\x01" * 2000 + b"t\x85q\x01" + b"h\x00h\x01R" * 999 + b"t"),
        "more of its content than there is",
    ),
    **{
        f"copied by {name.decode()!r}": (
            lambda name=name, part=part: in_zip(
                b"(c" + name + b"\nq\x00" + part + b"q\x01" + b"h\x00h\x01R" * 999 + b"t"
            ),
            "more of its content than there is",
        )
        for name, part in (
            (b"collections\nOrderedDict", b"(" + b"K\x01K\x01\x86" * 2000 + b"t\x85"),
            (b"collections\nCounter", b"(" + b"K\x01" * 2000 + b"t\x85"),
            (b"torch\nSize", b"(" + b"K\x01" * 2000 + b"t\x85"),
            (b"__builtin__\nbytearray", text("a" * 4000) + text("latin1") + b"\x86"),
        )
    },
    "a storage of a type by number": (lambda: saved({"w": Call(torch.TypedStorage, 1 << 40)}), "takes no arguments"),
    "a storage by number, in the old format": (
        lambda: saved({"w": Call(torch.UntypedStorage, 1 << 40)}, _use_new_zipfile_serialization=False),
        "takes no arguments",
    ),
    "a tensor by a number, with attributes": (
        lambda: saved({"w": Call(torch._tensor._rebuild_from_type_v2, torch.Tensor, torch.Tensor, (64, 64), {})}),
        "not built from a storage",
    ),
    "a function that is long to write": (
        lambda: in_zip(b"(K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b")Rt"),
        "it calls a tuple, which is no function",
    ),
    "a codec that is long to write": (
        lambda: in_zip(
            b"(K\x01q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"c_codecs\nencode\n" + text("a") + b"h\x00\x86Rt"
        ),
        "bytes by a tuple, allowed is latin1",
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_little_files_do_not_make_much(name, tmp_path, one_line):
    """Nothing is made before the refusal: each would take gigabytes, or show what lay in memory."""
    make, words = BOMBS[name]
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, make()))
    assert words in one_line(refusal.value)


def test_plain_things_beside_the_weights_are_read(tmp_path):
    """What schedules and lists leave in a checkpoint."""
    own = small()
    named = torch.zeros(3)
    named.about = "a tensor with an attribute"  # type: ignore[attr-defined]
    more = {"milestones": Counter([3, 3, 6]), "seen": {1, 2}, "size": torch.Size([2, 3]), "raw": b"ab\xff", "z": 1j}
    more |= {"bytes": bytearray(b"ab\xff"), "named": named, "random": os.urandom(100_000)}
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        found = weights.read(stored(tmp_path, {"net": OrderedDict(own), **more}, **options))
        assert all(torch.equal(value, own[name]) for name, value in found.of(own).items())


@pytest.mark.parametrize("old", [False, True])
def test_many_weights_are_read(old, tmp_path):
    """torch keeps a dictionary of hooks for each tensor, and two for each parameter."""
    own = {f"w{i}": torch.nn.Parameter(torch.zeros(1)) for i in range(1500)}
    content = {"net": OrderedDict(own), "ema": OrderedDict(own)}
    found = weights.read(stored(tmp_path, content, _use_new_zipfile_serialization=not old))
    assert len(found.tensors) == 3000


def test_honest_safetensors_of_any_length_of_header_import_nothing():
    """Two bytes of it are a length, which may look like an opcode."""
    for size in range(64, 60_000, 8):
        raw = struct.pack("<Q", size) + b'{"__metadata__":{"a":"'.ljust(size, b"a") + bytes(8)
        assert pickles.imports(raw) == [], size


@pytest.mark.parametrize("name", ["conv1.weight", "linear.bias"])
def test_a_first_or_last_weight_without_a_dimension_is_no_network_of_ours(name, tmp_path, monkeypatch):
    monkeypatch.setattr("sau.foreign.guess.torchvision_names", tuple)
    found = weights.read(stored(tmp_path, {**small(), name: torch.tensor(1.0)}))
    assert guess(found) is None


def test_a_network_wider_than_any_of_ours_is_not_built(tmp_path, monkeypatch):
    monkeypatch.setattr("sau.foreign.guess.torchvision_names", tuple)
    for width in (1024, 1025):
        with torch.device("meta"):
            own = build(NET, 2, width=width, mean=(0.0,) * 3, std=(1.0,) * 3).net.state_dict()
        found = guess(weights.Weights(tmp_path, ZIP, "", dict(own), {}))
        assert (found and found.width) == (1024 if width == 1024 else None)


def bombs() -> dict[str, bytes]:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
    rebuild = b"(ctorch._utils\n_rebuild_tensor_v2\nq\x00(" + storage + b"K\x00(K\x01t(K\x01t\x89N"
    huge = struct.pack("<Q", 1 << 62) + b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' + bytes(4)
    return {
        "deflate": deflated(200),
        "header": huge,
        "expanded view": saved({"x": torch.zeros(1).expand(1 << 40)}),
        "a million tensors": in_zip(rebuild + b"tq\x01R" + b"h\x00h\x01R" * 10**6 + b"t"),
        "lists in lists, each twice": saved(doubled("text", 40)),
        "tensors in lists, each twice": saved(doubled(torch.zeros(1), 40)),
        "a storage of 3,000 names": saved({str(i): STORAGE for i in range(3000)}),
        "itself": in_zip(b"}q\x01" + text("") + b"h\x01s"),
    }


def doubled(value: Any, times: int) -> Any:
    """2^times values in a few bytes."""
    for _ in range(times):
        value = [value, value]
    return value


@pytest.mark.parametrize(("limit", "most"), [("TENSORS", 2), ("VALUES", 3), ("DEEPEST", 0), (None, None)])
def test_every_limit_of_what_a_file_holds_is_kept(limit, most, tmp_path, monkeypatch, one_line):
    path = stored(tmp_path, {"x" * (1001 if limit is None else 1000): torch.zeros(2), "b": torch.ones(2), "c": "text"})
    if limit is not None:
        assert len(weights.read(path).tensors) == 2
        monkeypatch.setattr(weights, limit, most - (limit == "TENSORS"))
    with pytest.raises(RecordError) as refusal:
        weights.read(path)
    assert "holds too much" in one_line(refusal.value)


def test_of_the_texts_in_a_file_the_first_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "TEXTS", 2)
    found = weights.read(stored(tmp_path, {"a": "x" * 300, "b": "y", "c": "z", "w": torch.zeros(2)}))
    assert found.texts == {"a": "x" * 200, "b": "y"} and [*found.tensors] == ["w"]


def test_a_tensor_that_repeats_its_values_is_refused(tmp_path, one_line):
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, {"w": torch.zeros(1).expand(4)}))
    assert "'w' claims shape [4], but holds fewer values" in one_line(refusal.value)


def test_a_sparse_member_of_a_tar_takes_no_memory_and_hides_no_other():
    """It may claim any size, here a quarter of a GB in three blocks."""
    info = tarfile.TarInfo("storages")
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    head = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    for place, value in ((386, 0), (398, 512), (483, 1 << 28)):
        head[place : place + 12] = b"%011o\0" % value
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    tracemalloc.start()
    assert pickles.imports(bytes(head) + bytes(512) + tarred("true")) == ["posix.system"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


@pytest.mark.parametrize("spoiled", [b"archive/a" + b"wrong", b"posix\nsystem"])
def test_a_wrong_sum_hides_no_name(spoiled):
    """Neither of another member nor of the pickle itself, which readers that check no sums would run."""
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, "w") as archive:
        archive.writestr("archive/a", b"wrong")
        archive.writestr("archive/data.pkl", b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R.")
    damaged = raw.getvalue().replace(spoiled, spoiled.replace(b"w", b"v").replace(b"system", b"sysxem"))
    assert damaged != raw.getvalue()
    assert pickles.imports(damaged) == ["posix.sysxem" if b"system" in spoiled else "posix.system"]


def test_a_bomb_is_not_unpacked_to_look_for_names(monkeypatch):
    seen, really = [], zipfile.ZipFile.read

    def read(self: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        seen.append(member.file_size)
        return really(self, member)

    monkeypatch.setattr(zipfile.ZipFile, "read", read)
    pickles.imports(deflated(2))
    assert len(seen) > 2 and max(seen) < 2 << 20


def test_bombs_take_64_megabytes_at_most(tmp_path):
    paths = [str(stored(tmp_path, raw, f"{i}.pt")) for i, raw in enumerate(bombs().values())]
    code = f"""
from pathlib import Path
from sau.foreign import weights
from sau.errors import RecordError
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
for path in map(Path, {paths!r}):
    before = peak()
    try:
        weights.read(path)
    except RecordError as error:
        print(peak() - before, error)
"""
    env = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == len(paths) == 8, (done.stdout, done.stderr)
    for line in lines:
        assert int(line.split()[0]) < 64 << 20, line


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


def test_verdicts_on_the_command_line(script, places, tmp_path, monkeypatch):
    made: dict[Path, inspection.Report] = {}

    def here(path: Path, to: Path | None) -> inspection.Report:  # the process is tried above and below
        made[path], _, _ = look(path)
        return made[path]

    monkeypatch.setattr("sau.command.inspect_checkpoint.inspect", here)
    honest, evil = stored(tmp_path, {"x": torch.zeros(2)}), places["os.system"][0]
    for path, status in ((honest, HARMLESS), (evil, SUSPICIOUS), (stored(tmp_path, b"text", "y"), UNREADABLE)):
        found, out, _ = script("inspect_checkpoint.py", str(path), "--json")
        assert found == status and json.loads(out) == made[path]
    found, _, err = script("inspect_checkpoint.py", str(evil), "--to", str(tmp_path / "new"))
    assert found == SUSPICIOUS and "was not written" in err


AWKWARD = {
    "statistics that are complex": ({"x.mean": torch.tensor([1j]), "x.std": torch.tensor([1j])}, HARMLESS),
    "complex128": ({"x": torch.zeros(2, dtype=torch.complex128)}, UNREADABLE),
    "half a character": ({"\ud800": torch.zeros(2)}, UNREADABLE),
    "one storage, many names": ({str(i): STORAGE for i in range(4)}, UNREADABLE),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_what_cannot_be_converted_is_said_in_the_verdict(name, tmp_path, monkeypatch):
    content, status = AWKWARD[name]
    monkeypatch.setattr(inspection, "confine", lambda memory, seconds: None)  # this process goes on
    report, file = asked(stored(tmp_path, content))
    assert report["status"] == status and "\n" not in report["verdict"] and report["verdict"].isascii()
    assert (file is not None) == (status == HARMLESS) and (file or "converted" in report["verdict"])
    inspection.text(report).encode()


def asked(path: Path) -> tuple[inspection.Report, bytes | None]:
    """What the process of its own answers, with --to."""
    here, there = multiprocessing.Pipe(duplex=False)
    with ThreadPoolExecutor() as pool:  # a pipe holds little
        done = pool.submit(inspection._work, there, path, True)
        report = json.loads(here.recv_bytes())
        content = here.recv_bytes() if report["status"] == HARMLESS else None
        done.result()
    return report, content


def test_the_process_is_confined_before_it_opens_the_file(tmp_path, monkeypatch):
    path, order, really = stored(tmp_path, {"x": torch.zeros(2)}), [], inspection.look
    monkeypatch.setattr(inspection, "confine", lambda *limits: order.append(limits))
    monkeypatch.setattr(inspection, "look", lambda path: order.append("looked") or really(path))
    asked(path)
    assert order == [(inspection.MEMORY + 8 * path.stat().st_size, inspection.SECONDS), "looked"]


def test_of_a_suspicious_file_nothing_is_converted(tmp_path, monkeypatch):
    raw = io.BytesIO(saved({"x": torch.zeros(2)}))
    with zipfile.ZipFile(raw, "a") as archive:
        archive.writestr("archive/more.pkl", b"\x80\x02cos\nsystem\n.")
    monkeypatch.setattr(inspection, "confine", lambda memory, seconds: None)
    here, there = multiprocessing.Pipe(duplex=False)
    inspection._work(there, stored(tmp_path, raw.getvalue()), True)
    assert json.loads(here.recv_bytes())["status"] == SUSPICIOUS and not here.poll()


def test_want_of_memory_ends_the_process_by_a_status_that_is_no_fault_of_the_program(tmp_path, monkeypatch):
    def greedy(path: Path) -> None:
        raise MemoryError

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(inspection, "confine", lambda memory, seconds: None)
    monkeypatch.setattr(inspection, "look", greedy)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        inspection._work(multiprocessing.Pipe(duplex=False)[1], stored(tmp_path, b"x"), False)
    assert left.value.code not in (0, 1)


def test_a_process_that_ends_by_a_fault_is_said_at_once(tmp_path, monkeypatch):
    """As one does that raises; `os._exit` is called with a connection, which is no status."""
    monkeypatch.setattr(inspection, "_work", os._exit)
    monkeypatch.setattr(inspection, "SECONDS", 60)
    with pytest.raises(RuntimeError, match="by a fault of the program"):  # else the verdict is "more than 60 seconds"
        inspection.inspect(stored(tmp_path, {"x": torch.zeros(2)}))


def test_whatever_a_file_makes_the_reader_raise_is_a_verdict(tmp_path, monkeypatch):
    def fails(path: Path) -> None:
        raise RecursionError("a\x1b[2Jb\nc")

    monkeypatch.setattr(inspection, "confine", lambda memory, seconds: None)
    monkeypatch.setattr(inspection, "look", fails)
    report, _ = asked(stored(tmp_path, {"x": torch.zeros(2)}))
    assert report["status"] == UNREADABLE
    assert report["verdict"] == "unreadable: RecursionError: a\\x1b[2Jb\\nc"


def test_a_process_that_dies_is_no_process_that_takes_too_long(tmp_path, monkeypatch):
    def dies(here: Any, deadline: float) -> bytes:
        raise EOFError

    monkeypatch.setattr(inspection, "_receive", dies)
    report = inspection.inspect(stored(tmp_path, {"x": torch.zeros(2)}))
    assert report["status"] == SUSPICIOUS and "too much memory or time" in report["verdict"]


def test_what_is_no_plain_file_is_refused_at_once(tmp_path, one_line):
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/zero"), tmp_path):
        with pytest.raises(RecordError) as refusal:
            weights.read(path)
        assert str(path) in one_line(refusal.value)
    assert look(tmp_path)[0]["status"] == UNREADABLE


@pytest.mark.parametrize(
    "how", ["none is named", "one is not named", "more than there is", "together more than there is"]
)
def test_an_old_file_without_content_for_its_weights_is_refused(how, tmp_path, one_line):
    """torch would hand out what was in memory before, another thing at each reading."""
    names, content = [], {"a": torch.ones(7), "b": torch.zeros(2, 3).t(), "c": torch.ones(3)[:0]}
    raw = saved(content, _use_new_zipfile_serialization=False)
    found = weights.read(stored(tmp_path, raw)).tensors
    assert all(torch.equal(found[name], value) for name, value in content.items())
    stream, ends = io.BytesIO(raw), []
    for _ in range(5):
        names = [argument for opcode, argument, _ in pickletools.genops(stream) if opcode.name == "BINUNICODE"]
        ends.append(stream.tell())
    kept = names[: {"none is named": 0, "one is not named": 2}.get(how, 3)]
    evil = raw[: ends[3]] + pickle.dumps(kept, protocol=2) + raw[ends[4] :]
    if how == "more than there is":
        evil = evil[: ends[3]].replace(b"K\x07", b"J\xff\xff\xff\x7f") + evil[ends[3] :]
    if how == "together more than there is":
        evil = evil[: ends[3]].replace(b"K\x07", b"M" + struct.pack("<H", len(raw) // 4)) + evil[ends[3] :]
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, evil))
    words = "storage" if how == "more than there is" else "some of its storages have no content"
    assert words in one_line(refusal.value)


EVIL = "\x1b[2J\nharmless to open\ud800\u202e" + "x" * 200


def test_names_from_a_file_move_no_cursor_and_forge_no_line(tmp_path, one_line):
    own = {f"{EVIL}.{name}": value for name, value in small().items()}
    shown = {**own, f"{EVIL}.mean": torch.zeros(3), f"{EVIL}.std": torch.zeros(3)}
    with pytest.raises(RecordError) as refusal:
        weights.read(stored(tmp_path, {**own, f"{EVIL}.conv1.weight": torch.zeros(4, 3, 5, 5)})).of(small())
    assert one_line(refusal.value).isprintable()
    for content in (own, shown):
        report, _, _ = look(stored(tmp_path, content))
        lines = inspection.text(report).split("\n")
        assert all(line.isprintable() and len(line) < 250 for line in lines) and lines[-1] == report["verdict"]
        assert len(lines) == len(content) + len(report["imports"]) + 7


def test_a_network_that_is_there_twice_is_said_to_be(tmp_path, monkeypatch, one_line):
    """Its tensors are converted as they are, for nobody has said which is meant."""
    own = small()
    path = stored(tmp_path, {"model": own, "ema": own})
    report, found, known = look(path)
    assert (report["status"], report["network"], known) == (HARMLESS, None, None)
    assert report["verdict"].endswith("a known network more than once: under 'ema.', 'model.'")
    assert "network   more than once, under 'ema.', 'model.'" in inspection.text(report).split("\n")
    with pytest.raises(weights.SeveralError) as refusal:
        guess(found)
    assert f"{path} holds the network 2 times" in one_line(refusal.value) and "--model_prefix" in str(refusal.value)
    monkeypatch.setattr(inspection, "confine", lambda memory, seconds: None)
    assert len(load(asked(path)[1])) == 2 * len(own)


def test_prefixes_from_a_file_move_no_cursor_and_forge_no_line(tmp_path, one_line):
    own = small()
    report, found, _ = look(stored(tmp_path, {f"{EVIL}{i}.{name}": own[name] for i in range(9) for name in own}))
    assert report["verdict"].isprintable() and report["verdict"].isascii() and len(report["verdict"]) < 1000
    assert all(line.isprintable() for line in inspection.text(report).split("\n"))
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


def test_mistakes_in_the_command(script, tmp_path):
    honest = stored(tmp_path, {"x": torch.zeros(2)})
    for argv, word in (([str(tmp_path / "none")], "no file"), ([str(honest), "--to", str(honest)], "exists")):
        status, _, err = script("inspect_checkpoint.py", *argv)
        assert status == 2 and word in the_error(err)


def asleep(*given: object) -> None:
    time.sleep(60)


def test_a_process_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SECONDS", 0)
    monkeypatch.setattr(inspection, "_work", asleep)
    report = inspection.inspect(stored(tmp_path, {"x": torch.zeros(2)}))
    assert report["status"] == SUSPICIOUS and "more than 0 seconds" in report["verdict"]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count memory")
def test_a_confined_process_has_neither_memory_nor_files(tmp_path):
    code = f"""
from pathlib import Path
import signal
from sau.foreign.confinement import confine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
confine(64 << 20, 1)
for attempt in (lambda: bytearray(128 << 20), lambda: Path({str(tmp_path / "x")!r}).write_text("x")):
    try:
        attempt()
    except (MemoryError, OSError) as error:
        print(type(error).__name__, flush=True)
while True:
    pass
"""
    env = environment(PYTHONPATH=str(REPOSITORY))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=240)
    assert done.stdout.split() == ["MemoryError", "OSError"] and done.returncode < 0, (done.stdout, done.stderr)
