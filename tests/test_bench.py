"""The benchmark: its rival does the same work as ours, its figures are what they say, and every part runs."""

import argparse
import gc
import json
import os
import subprocess
import sys
import weakref

import bench
import gpu_checklist
import pytest
import torch
from bench_parts import evaluation, everything, growth, measure, pil, profile, roofline, setting
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toys import REPOSITORY, environment, the_error, tiny_net, toy_images

from sau.attack import BadNet
from sau.data.augment import Augment
from sau.data.images import to_float
from sau.data.sources import SOURCES, Source
from sau.defense import SAU
from sau.errors import ConfigError
from sau.evaluate import score
from sau.loop import Session
from sau.models import Normalized

CPU = torch.device("cpu")
ORIGIN = Source(16, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), Augment(2), lambda root, size: (toy_images(), toy_images()))


def args(**more: object) -> argparse.Namespace:
    return argparse.Namespace(**{"repeats": 2, "device": CPU, "clock": "cpu", **more})


def test_the_released_evaluation_finds_the_same_shares(tmp_path):
    """One picture after the other through PNG files, normalised by the loader, in three passes instead of two."""
    test = toy_images(30, seed=3)
    triggered = BadNet().poison_test(test)
    net = tiny_net()
    sets = pil.evaluations(test, triggered, ORIGIN, tmp_path, 8, 0, CPU)
    found = score(Normalized(net, ORIGIN.mean, ORIGIN.std), test, triggered)
    wanted = [share.hits / share.total for share in (found.acc, found.asr, found.racc) if share]
    assert pil.evaluate(net, sets, CPU) == pytest.approx(wanted, abs=1e-9)


def test_operations_are_counted_as_torch_counts_them_and_nothing_is_kept():
    """Its own counter keeps what a backward hook holds, of every batch until the end."""
    net, x = Normalized(tiny_net()), toy_images(6).pixels.float().div(255).requires_grad_()

    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            ctx.held = torch.ones(1)
            kept.append(weakref.ref(ctx.held))
            return z.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def work() -> None:
        for _ in range(3):
            net(Marked.apply(x)).logsumexp(1).mean().backward()
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))

    kept, alive = [], []
    with FlopCounterMode(display=False) as counter:
        work()
    kept.clear()
    assert measure.flops(work) == counter.get_total_flops() > 0 and alive[1] == 0 < alive[0]


FAULTS = """
import platform, resource, sys
import torch
from bench_parts.measure import heap_of
counts = []
for name in ("bf16", "released", "fp32", "fp32 reference", "bf16"):
    heap_of(name)
    for piece in range(40):
        if piece == 20:  # small objects may have taken the places of the first few
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(platform.libc_ver()[0], *counts)
"""


def test_ours_keeps_its_memory_and_the_reference_does_not():
    shown = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    library, *counts = shown.stdout.split()
    if library != "glibc":
        pytest.skip("another C library than glibc")
    ours, released, again, reference, last = map(int, counts)
    assert max(ours, again, last) < min(released, reference) / 4


def test_the_rival_computes_in_fp32_and_nchw_whatever_ours_does():
    """A copy of a network of ours in bf16 once ran under autocast itself, which made the rival faster than it is."""
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


def test_the_released_loader_gives_the_same_pictures(tmp_path):
    """Poisoned ones come from files, clean ones from memory; in training they are cropped."""
    poisoned = BadNet(pratio=0.5).poison_train(toy_images(20), 0)
    files = pil.Files(poisoned, poisoned.labels, pil.transform(ORIGIN, False, normalise=False), tmp_path)
    assert len(list(tmp_path.iterdir())) == len(files.files) == 10
    x, y = next(iter(pil.loader(files, 20, train=False, workers=0, device=CPU)))
    assert torch.equal(x, to_float(poisoned.pixels)) and torch.equal(y, poisoned.labels)
    cropped = pil.Files(poisoned, poisoned.labels, pil.transform(ORIGIN, True), tmp_path)
    batches = list(pil.loader(cropped, 8, train=True, workers=0, device=CPU))
    assert [len(y) for _, y in batches] == [8, 8] and batches[0][0].shape == (8, 3, 16, 16)


def test_the_released_training_learns(tmp_path):
    images = toy_images(40)
    net = tiny_net()
    files = pil.Files(images, images.labels, pil.transform(ORIGIN, False), tmp_path)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    batches = pil.loader(files, 8, train=True, workers=0, device=CPU)
    losses = [pil.train_epoch(net, sgd, batches, CPU) for _ in range(8)]
    assert losses[-1] < 0.7 * losses[0]


def test_passes_and_the_share_of_the_peak_are_counted_by_operations():
    """A linear layer of 8 x 4 on one picture is 64 operations; with both gradients a step is three passes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 4))
    x = torch.rand(5, 2, 2, 2)
    assert measure.forward_flops(net, x) == 64

    def step() -> None:
        net(x.clone().requires_grad_()).sum().backward()

    def forward() -> None:
        net(x)

    assert measure.passes(step, net, x) == 15 and measure.passes(forward, net, x) == 5
    task = measure.Task(5, net, x, 3.0, {"fp32": 1e6})
    rows = measure.compare("title", {"fp32": lambda: step, "fp32 slow": lambda: forward}, task, args(), "s")
    assert [row["name"] for row in rows] == ["title, fp32"]
    ours = rows[0]["details"]["ours"]
    assert ours["passes_per_image"] == 3 and ours["passes_needed"] == 3
    assert ours["share_of_peak"] == pytest.approx(960 * ours["images_per_second"] / 5 / 1e6)
    assert rows[0]["details"]["reference"]["passes_per_image"] == 1


def test_growth_in_proportion_is_one(monkeypatch):
    """Work that doubles and takes twice as long; and work that doubles and takes the same time."""
    for power, ratio in ((1, 1.0), (0, 4.0)):
        monkeypatch.setattr(growth, "flops", lambda work: work())
        monkeypatch.setattr(growth, "peak_mb", lambda work, device: 1.0)
        monkeypatch.setattr(
            growth, "interleaved",
            lambda makers, args, power=power: {name: [0.5 * int(name) ** power] for name in makers},
        )  # fmt: skip
        found = growth._grown("x", {n: lambda n=n: lambda: 10 * n for n in (1, 2, 4)}, args())
        assert found["ratio"] == ratio and [point["work"] for point in found["points"]] == [1, 2, 4]


def test_the_peak_is_positive_and_pictures_repeat(monkeypatch, capsys):
    monkeypatch.setattr(roofline, "PRECISIONS", {"fp32": torch.float32})
    assert roofline.peaks(args())["fp32"] > 1e8 and "GFLOP/s" in capsys.readouterr().out
    assert setting.first(toy_images(4), 10).index.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert set(SOURCES) >= {"digits", "cifar10"}


# flags: parts that have them; the others would not heed them
FLAGS = {
    "steps": {"train", "sau", "data", "attacks", "risks"},
    "workers": {"train", "eval", "data", "runs"},
    "batch_size": {"train", "sau", "eval", "data", "runs", "growth", "stacked", "attacks"},
    "amp": {"growth", "stacked", "attacks", "risks"},
    "clock": {*bench.PARTS} - {"risks"},
    "device": {*bench.PARTS},
}


@pytest.mark.parametrize("part", bench.PARTS)
def test_no_part_has_a_flag_without_effect(part):
    known = vars(bench.command_line().parse_args([part, *(("x", "y") if part == "risks" else ())]))
    assert {flag for flag in FLAGS if flag in known} == {flag for flag, parts in FLAGS.items() if part in parts}


ROW = {"name": "a row", "ratio": 2.0, "low": 2.0, "high": 2.0, "ours": 1.0, "reference": 2.0, "unit": "s"}


def test_the_setting_of_the_json_is_what_the_part_heeds(monkeypatch, script, tmp_path):
    monkeypatch.setattr(evaluation, "run", lambda args: [ROW])
    flags = ("--device", "cpu", "--threads", "1", "--json", str(tmp_path / "new" / "out.json"))
    assert script("bench.py", "eval", *flags)[0] == 0
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found["rows"] == [ROW] and {"width", "workers", "pictures", "clock", "threads"} <= {*found["setting"]}
    assert {"steps", "json", "dataset_path"}.isdisjoint(found["setting"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("train", "--device", "foo"), "device is 'foo'"),
        (("train", "--repeats", "0"), "--repeats is 0, allowed is 1 and more"),
        (("sau", "--batch_size", "5000"), "batch_size is 5000, allowed are up to 1437"),
        (("runs", "--precisions", "int8"), "--precisions names 'int8'; allowed are bf16, fp32"),
        (("defenses", "--only", "ft,nonsense"), "--only names 'nonsense'; allowed are sau, ft"),
        (("all", "--only", "nonsense"), "--only names 'nonsense'; allowed are data, train"),
        (("risks", "NOSUCH", "x"), "there is no folder NOSUCH"),
    ],
)
def test_the_benchmark_says_mistakes_in_one_line(script, monkeypatch, flags, words):
    status, _, err = script("bench.py", *flags, "--threads", "1")
    assert status == 2 and words in the_error(err)


def test_the_networks_of_the_parts_have_one_home(capsys):
    """A network with a backdoor for SAU's part and for that of the defenses, and the flags of all."""
    model = setting.backdoored(args(dataset="digits", width=4), toy_images(40), 3, 16)
    assert isinstance(model, Normalized) and not model.training and "on target" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="up to 40"):
        next(setting.endless(toy_images(40), 64, 0))
    for text in ('"--dataset"', '"--width"', '"--amp"', "build(", "BadNet("):
        places = [
            file.name for file in (REPOSITORY / "scripts" / "bench_parts").glob("*.py") if text in file.read_text()
        ]
        assert places == ["setting.py"], text


MINIATURE = {
    "train": ("--steps", "1"),
    "sau": ("--train_updates", "2", "--purify_updates", "1", "--whole_batch", "true"),
    "eval": ("--pictures", "20"),
    "data": ("--steps", "1"),
    "runs": ("--pictures", "320", "--epochs", "1", "--rounds", "1"),
    "growth": (),
    "stacked": (),
}


@pytest.mark.slow
@pytest.mark.parametrize("part", MINIATURE)
def test_every_part_runs(part, tmp_path):
    flags = ("--width", "4", "--batch_size", "16", "--repeats", "1", "--threads", "1", "--json", "out.json")
    argv = [sys.executable, str(REPOSITORY / "scripts" / "bench.py"), part, *flags, *MINIATURE[part]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=500)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows and all(row["ours"] > 0 and row["low"] <= row["ratio"] <= row["high"] for row in rows)


def test_all_gives_every_part_its_own_settings(monkeypatch):
    """Each row has the name of its part; what the command line says goes to all."""
    seen: dict[str, argparse.Namespace] = {}
    for name, part in everything.PARTS.items():
        monkeypatch.setattr(part, "run", lambda own, name=name: seen.update({name: own}) or [{"name": "row"}])
    common = args(dataset="digits", dataset_path="x", threads=1, only=",".join(everything.PARTS))
    rows = everything.run(common)
    assert [row["part"] for row in rows] == list(everything.PARTS) == list(seen)
    assert all(own.dataset_path == "x" and own.repeats == 2 and own.device == CPU for own in seen.values())
    assert seen["train"].batch_size == 128 and seen["sau"].batch_size == 64


def test_operations_are_told_apart_by_their_whole_names():
    for name, wanted in (
        ("aten::addmm", "matrix products"), ("aten::add_", "ReLU, addition, other arithmetic"),
        ("aten::to", "copies, change of precision"), ("aten::topk", "everything else"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", "convolution, backward"),
        ("Optimizer.step#SGD.step", "optimiser"), ("aten::convolution", "convolution, forward"),
    ):  # fmt: skip
        assert profile.kind(name) == wanted, name


def test_memory_is_flat_in_rounds():
    """Eight rounds of SAU leave no more tensors alive than two: their sizes are summed up after each."""

    def alive() -> int:
        gc.collect()
        return sum(thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    held: list[int] = []
    session = Session(say=lambda text: None, on_epoch=lambda *what: held.append(alive()) or {})
    SAU(epochs=8, batch_size=16).purify(tiny_net(), toy_images(32), session=session)
    assert len(held) == 8 and held[-1] == held[1]


@pytest.mark.slow
def test_the_checklist_of_a_gpu_runs_in_miniature(tmp_path):
    argv = ["bash", str(REPOSITORY / "scripts" / "gpu_checklist.sh"), "--smoke", "--device", "cpu", "--out", "out"]
    env = environment(PYTHON=sys.executable)
    done = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=900)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "table.md").read_text()
    whole = ("attack, 100 epochs", "SAU, 100 rounds, width 64", "fast recipe")
    for what in ("training step", "SAU update", *whole, "evaluation", "need a card"):
        assert what in text
    assert "failed" not in text and "no end in" not in text


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_checklist_of_a_gpu_says_that_there_is_none(device, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as refusal:
        gpu_checklist.main(["--device", device, "--out", str(tmp_path / "out")])
    assert refusal.value.code == 2 and not (tmp_path / "out").exists()
    assert "no CUDA device" in (line := capsys.readouterr().err) and "--smoke" in line and line.count("\n") == 1


def test_the_parts_of_the_checklist_of_a_gpu_fit_into_its_time(tmp_path, monkeypatch):
    """What is over at once leaves its time to the next; what takes all of its own leaves the next one theirs."""
    kept, now = gpu_checklist.KEPT, [0.0]
    assert sum(kept.values()) < 600
    monkeypatch.setattr(gpu_checklist.time, "monotonic", lambda: now[0])
    for minutes in (10, 5):
        share, now[0] = minutes / 10, 0.0
        work = gpu_checklist.Checklist(tmp_path, 60.0 * minutes, (), "cuda", False, share)
        spare = share * (600 - sum(kept.values()))
        for name, seconds in kept.items():
            assert work.left(name) == pytest.approx(share * seconds + spare)
            now[0] += work.left(name)
            spare = 0.0
        now[0] = 0.0
        assert work.left(list(kept)[-1]) == 60.0 * minutes


def test_whole_runs_on_a_gpu_are_kept_more_than_their_targets():
    """In seconds, beside those before a command counts its own; a run that ends early is told at its pace."""
    for name, target in {"attack": 150, "SAU": 60, "fast": 60}.items():
        assert gpu_checklist.KEPT[name] - gpu_checklist.STARTS >= target


def test_a_run_that_ended_early_is_told_at_its_pace(tmp_path):
    """Two epochs and a half of ten in 50 s; so 250 of 1,000 pictures have been seen, at 3 x 1 GFLOP each."""
    step = {"passes_per_image": 3.0, "forward_flops": 1e9, "peak_flops": 1e11}
    measured = [{"name": "step, bf16", "details": {"ours": step}}]
    work = gpu_checklist.Checklist(tmp_path, 1e9, (), "cuda", False, 1.0)
    told = {"seconds": 50.0, "acc": 90.0, "asr": 95.0, "peak_memory_mb": 1.0}
    early = {**told, "ended_early": "epoch 3 of 10, before batch 101 of 200"}
    for summary, share in ((early, "15 %"), (told, "60 %")):
        speed = gpu_checklist._row(work, "attack", summary, "")
        gpu_checklist._share(work, "attack", 1000 * speed, measured)
        assert f"{share} of the measured" in work.rows[-1][1]
    assert "before batch 101 of 200, 200 s at that pace" in work.rows[0][1] and "pace" not in work.rows[2][1]
