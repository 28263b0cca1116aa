"""The benchmark: its rival does the same work as ours, its figures are what they say, and every part runs."""

import gc
import json
import subprocess
import sys

import bench
import pytest
import torch
from bench_parts import measure, released, setting
from torch import nn
from toys import REPOSITORY, environment, quiet, tiny_net, toy_images

from sau.attack import BadNet
from sau.data.images import Augment, to_float
from sau.data.sources import SOURCES, Source
from sau.defense import SAU
from sau.evaluate import score
from sau.models import Normalized

ORIGIN = Source(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), Augment(2), lambda root, size: (toy_images(), toy_images()))


def test_the_released_evaluation_finds_the_same_shares(tmp_path, monkeypatch):
    """One image after the other through PNG files, normalised by the loader, in three passes instead of two."""
    test = toy_images(30, seed=3)
    triggered = BadNet().poison_test(test)
    net = tiny_net()
    monkeypatch.setitem(SOURCES, "toy", ORIGIN)
    sets = setting.Setting("toy", batch_size=8).tests(test, triggered, tmp_path)
    found = score(Normalized(net, ORIGIN.mean, ORIGIN.std), test, triggered)
    wanted = [share.hits / share.total for share in (found.acc, found.asr, found.racc) if share]
    assert released.evaluate(net, sets, torch.device("cpu")) == pytest.approx(wanted, abs=1e-9)


def test_the_released_loader_gives_the_same_images(tmp_path, monkeypatch):
    """Poisoned ones come from files, clean ones from memory; in training they are cropped."""
    poisoned = BadNet(pratio=0.5).poison_train(toy_images(20), 0)
    monkeypatch.setitem(SOURCES, "toy", ORIGIN)
    whole = setting.Setting("toy", batch_size=20).loader(poisoned, tmp_path, train=False, normalise=False)
    assert len(list(tmp_path.iterdir())) == len(whole.dataset.files) == 10
    ((x, y),) = whole
    assert torch.equal(x, to_float(poisoned.pixels)) and torch.equal(y, poisoned.labels)
    batches = list(setting.Setting("toy", batch_size=8).loader(poisoned, tmp_path, train=True))
    assert [len(y) for _, y in batches] == [8, 8] and batches[0][0].shape == (8, 3, 16, 16)


def test_the_rival_computes_in_fp32_and_nchw_whatever_ours_does():
    """A copy of a network in bf16 would run under autocast itself, which makes the rival faster than it is."""
    ours = Normalized(tiny_net(), ORIGIN.mean, ORIGIN.std, amp=True).to(memory_format=torch.channels_last)
    seen = []
    for copied, kind in ((setting.copied(ours, amp=True), torch.bfloat16), (setting.as_released(ours), torch.float32)):
        convolutions = [module for module in copied.modules() if isinstance(module, nn.Conv2d)]
        for module in convolutions:
            module.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        copied(torch.rand(2, 3, 16, 16))
        assert seen and set(seen) == {kind}
        seen.clear()
    assert all(module.weight.is_contiguous() for module in convolutions)


def test_passes_are_counted_by_operations():
    """A linear layer of 8 x 4 on one image is 64 operations; with both gradients a step is three passes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
    x = torch.rand(5, 2, 2, 2)
    assert measure.forward_flops(net, x) == 64
    step, forward = (lambda: net(x.clone().requires_grad_()).sum().backward()), (lambda: net(x))
    quick = setting.Setting(repeats=2)
    rows = measure.compare("title", {"fp32": lambda: step, "released": lambda: forward}, net, x, 5, quick, "s")
    assert [row["name"] for row in rows] == ["title, fp32"] and rows[0]["low"] <= rows[0]["ratio"] <= rows[0]["high"]
    passes = [rows[0]["details"][side]["passes_per_image"] for side in ("ours", "reference")]
    assert passes == [3, 1]


def test_memory_is_flat_in_rounds():
    """Eight rounds of SAU leave no more tensors alive than two: their sizes are summed up after each."""

    def alive() -> int:
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
        return sum(tensor.nbytes for tensor in tensors if not tensor.is_sparse)

    held: list[int] = []
    session = quiet(on_epoch=lambda *what: held.append(alive()))
    SAU(epochs=8, batch_size=16).purify(tiny_net(), toy_images(32), session=session)
    assert len(held) == 8 and held[-1] == held[1]


@pytest.mark.slow
def test_the_checklist_of_a_gpu_runs_in_miniature(tmp_path):
    argv = ["bash", str(REPOSITORY / "scripts" / "gpu_checklist.sh"), "", str(tmp_path / "out")]
    env = environment(PYTHON=sys.executable, SMOKE="1")
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=900)
    assert done.returncode == 0, done.stderr
    for part in bench.PARTS:
        rows = json.loads((tmp_path / "out" / f"bench_{part}.json").read_text())["rows"]
        assert rows and all(row["ours"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)
    assert done.stdout.count("\n| badnet ") == 4
