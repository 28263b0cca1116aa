"""What makes runs fast or ends them in time: no waiting for the device, compiled networks, limits."""

import time
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import QUICK, VICTIM, pair, quiet, rows, tiny_net, toy_images

from sau import loop
from sau.attack import ATTACKS, Attack, BadNet
from sau.data.images import Augment
from sau.defense import AT, DEFENSES, FT, FTSAM, NC, SAU
from sau.loop import Limit, RunContext
from sau.models import Normalized, PreActResNet18
from sau.optim import Training
from sau.record.folder import Record, digest
from sau.verify import verify


class Reads(TorchDispatchMode):
    """Collects the operations that hand a tensor's content to Python, which on CUDA waits for everything before."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if by_mask or func.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "masked_select"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", [FT(), FTSAM(), AT(), NC(), SAU(), SAU(outer_steps=2, norm="L2"), BadNet()])
def test_a_step_reads_nothing_from_the_device(method, monkeypatch):
    """SAU as it is on CUDA: on the CPU, where reading costs nothing, it does, to compact the batch."""
    model = Normalized(PreActResNet18(4, width=4), (0.5,) * 3, (0.25,) * 3)
    if isinstance(method, BadNet):
        state = method.prepare(model.train(), Training(lr_scheduler="OneCycleLR"), 10)
    else:
        state = method.prepare(model, range(10))
    if isinstance(method, SAU):
        monkeypatch.setattr(state["_reference"], "compiled", "default")
        monkeypatch.setattr(state["_reference"], "_compiled_net", id(state["_reference"].net))
    x, y = pair(16)
    place, images = loop._Place(), toy_images(20).batches(8, seed=0, augment=Augment(flip=True))
    method.step(state, x, y)  # optimisers make their state in the first one
    with Reads() as reads:
        place.add(method.step(state, x, y), len(y))
        list(images)
    assert reads.found == []
    with Reads() as reads:
        place.means("lr")
    assert reads.found != []


def test_a_limit_ends_a_run_between_two_updates():
    """An update takes 10 s by this clock: the third one would end at 30 s, beyond the limit of 25 s."""
    now, said, ended, net = [0.0], list[str](), list[dict[str, float]](), tiny_net()

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        now[0] += 10
        return {"loss": net(x).sum()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now[0])
        session = RunContext(say=said.append, limit=(limit := Limit(25.0)))
        for label, place in (("epoch", session), ("second", session.for_stage(1))):
            loop.run(step, toy_images(12).batches(4), 2, state={}, end_epoch=ended.append, session=place, label=label)
    assert now == [20.0] and limit.ended == "epoch 1 of 2, before batch 3 of 3" and ended == []
    ends = [line for line in said if line.startswith("--max_minutes")]
    assert said[-1] == "warning: no second made an update; give more --max_minutes"
    assert ends == [f"--max_minutes is reached: ended in {where} of 3" for where in
                    ("epoch 1 of 2, before batch 3", "second 1 of 2, before batch 1")]  # fmt: skip


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are taken and guarded as always, and run by torch itself, which spares the minute of a compiler."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    original = torch.compile
    how = {"backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda net, mode=None, dynamic=None: original(net, dynamic=dynamic, **how))


LITTLE = {"epochs": 1, "batch_size": 16, "clean_train_epochs": 0}
METHODS = [*DEFENSES.values(), *(ATTACKS[name] for name in ("badnet", "wanet", "inputaware"))]


def result(method: type, compiled: bool) -> nn.Module:
    """What an epoch of a method makes of a small network."""
    model, images = Normalized(tiny_net(), (0.5,) * 3, (0.25,) * 3).double(), toy_images(32)
    made = method(**{field.name: LITTLE[field.name] for field in fields(method) if field.name in LITTLE})
    model.compiled = compiled
    if isinstance(made, Attack):
        recipe = Training(epochs=1, batch_size=16, lr=1e-3)
        attack = made.fit_trigger(images, model, recipe, session=quiet())
        return attack.fit(model, attack.poison_train(images, 0), recipe, session=quiet())
    return made.purify(model, (images.pixels.double() / 255, images.labels), session=quiet())


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("method", [method for method in METHODS if method.compiles], ids=lambda m: m.name)
def test_a_method_does_the_same_with_a_compiled_network(method, quick_compiler):
    plain, compiled = result(method, False), result(method, True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch looks at its own while it takes a graph
def test_a_run_ends_in_time_and_its_record_says_so(here, tmp_path, monkeypatch):
    """Exit status 0, a network that verifies, a digest of its own; and a defense of it that is ended too."""
    calls = iter(range(1000))
    monkeypatch.setattr(Limit, "reached", lambda self: next(calls) == 15)
    status, out, _ = here("attack", "badnet", *VICTIM, "--save_folder_name", "a", "--max_minutes", "60")
    assert status == 0 and "--max_minutes is reached: ended in epoch 2 of 4, before batch 5 of 11" in out
    folder = tmp_path / "record" / "a"
    config = Record(folder).check()
    assert Record(folder).summary()["ended_early"] == "epoch 2 of 4, before batch 5 of 11"
    assert config["notes"][-1] == "ended early, epoch 2 of 4, before batch 5 of 11"
    assert config["digest"] == digest(config["identity"]) and "ended_early" in config["identity"]
    assert [row["epoch"] for row in rows(folder)] == [1]
    calls = iter(range(1000))
    monkeypatch.setattr(Limit, "reached", lambda self: next(calls) == 4)
    flags = ("--result_file", "a", *QUICK, "--ratio", "0.5", "--batch_size", "512", "--epochs", "7")
    assert here("defense", "ft", *flags, "--max_minutes", "60")[0] == 0
    summary = Record(folder / "defense" / "ft").summary()
    assert summary["ended_early"] == "round 2 of 7, before batch 2 of 2"
    assert {check.state for check in verify(folder)} == {"ok"}


def test_two_updates_that_compile_do_not_count(monkeypatch):
    """They take 45 s and the others 1 s: the run ends in time, not 45 s before."""
    now, limit, seconds = [0.0], Limit(100.0), iter([45, *[1] * 8, 45, *[1] * 99])
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    while not limit.reached():
        now[0] += next(seconds)
    assert now == [100.0]


def test_a_trigger_that_is_not_made_in_time_ends_the_attack(refused, tmp_path):
    line = refused("attack", "lf", *VICTIM, "--lf_optimise", "true", "--max_minutes", "1e-9")
    assert line.startswith("error: max_minutes are over before the trigger is made")
    assert not [*tmp_path.glob("record/[!.]*")]
