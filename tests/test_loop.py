"""Time: epochs, means, forecasts, and runs that go on after an interruption as if there had been none."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checkpoints import ALWAYS, NEVER, Tape
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, TensorDataset
from toys import TinyNet, quiet, refuses, same_weights, toy_images

from sau import loop
from sau.data.batches import clean_batches
from sau.data.images import Augment, to_float
from sau.errors import TrainingError
from sau.loop import Limit, RunContext
from sau.optim import Training

EPOCHS, SIZE = 3, 8


class Experiment:
    """A training run with everything that must survive: momentum, a schedule, batch norm, noise from torch's generator.
    `stop` names the place of an interruption: ("before", n) or ("after", n) the n-th update, ("end_epoch", e) or
    ("on_epoch", e)."""

    def __init__(
        self, kind: str, tape: Tape | None = None, save_every: float = NEVER, stop: tuple | None = None
    ) -> None:
        torch.manual_seed(1)
        self.net = TinyNet().train()
        self.batches = batches(kind)
        recipe = Training(lr=0.05, lr_scheduler="CosineAnnealingLR", epochs=EPOCHS)
        self.descent = recipe.descent(self.net.parameters(), len(self.batches))
        self.stop, self.updates, self.epochs, self.said = stop, 0, 0, []
        self.rows: dict[int, dict[str, float]] = {}
        self.session = RunContext(checkpoint=tape, on_epoch=self.on_epoch, say=self.said.append, save_every=save_every)

    def interrupt(self, *place: Any) -> None:
        if self.stop == place:
            raise KeyboardInterrupt

    def step(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.updates += 1
        self.interrupt("before", self.updates)
        logits = self.net(x + 0.1 * torch.randn_like(x))
        loss = F.cross_entropy(logits, y)
        self.descent(loss)
        self.interrupt("after", self.updates)
        return {"loss": loss, "right": (logits.argmax(1) == y).sum()}

    def end_epoch(self, losses: dict[str, float]) -> None:
        self.epochs += 1
        self.interrupt("end_epoch", self.epochs)
        self.descent.end_epoch(losses["loss"])

    def on_epoch(self, epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float | None]:
        self.rows[epoch] = losses
        self.interrupt("on_epoch", epoch)
        return {"noise": float(torch.rand(())), "none": None}  # an evaluation may draw too

    def run(self) -> "Experiment":
        state = {"model": self.net, "descent": self.descent, "a number": 3}
        how = {"state": state, "end_epoch": self.end_epoch, "session": self.session, "label": "round"}
        loop.run(self.step, self.batches, EPOCHS, **how)
        return self


class Augmented(TensorDataset):
    """Draws from torch's generator for every image, as the transforms of torchvision do."""

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(index)
        return x * (0.8 + 0.2 * torch.rand(())), y


def batches(kind: str) -> Any:
    images = toy_images(27)
    if kind == "ours":
        return images.batches(SIZE, seed=5, augment=Augment())
    dataset = Augmented if kind == "augmenting loader" else TensorDataset
    loader = DataLoader(dataset(to_float(images.pixels), images.labels), SIZE, shuffle=kind != "loader")
    return clean_batches(loader, SIZE, torch.device("cpu"), (None, None), 5)


KINDS = ("ours", "loader", "shuffling loader", "augmenting loader")
PER_EPOCH = 3  # 27 images in batches of 8, 8 and 11


def numbers(state: dict) -> list:
    return [leaf.tolist() if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(state)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bits(kind):
    """Interrupted before and after every single update, and around the ends of epochs; resumed; equal to the
    undisturbed run in weights, in the optimiser's state and in the figures of every epoch."""
    whole = Experiment(kind).run()
    assert whole.updates == EPOCHS * PER_EPOCH and sorted(whole.rows) == [1, 2, 3]
    stops: list[tuple] = [(when, n) for when in ("before", "after") for n in range(1, EPOCHS * PER_EPOCH + 1)]
    stops += [(when, epoch) for when in ("end_epoch", "on_epoch") for epoch in range(1, EPOCHS + 1)]
    for save_every in (ALWAYS, NEVER):
        for stop in stops:
            tape = Tape()
            first = Experiment(kind, tape, save_every, stop)
            with pytest.raises(KeyboardInterrupt):
                first.run()
            second = Experiment(kind, tape, save_every).run()
            where = f"{kind}, stopped {stop}, save_every {save_every}"
            assert same_weights(second.net, whole.net), where
            assert numbers(second.descent.state_dict()) == numbers(whole.descent.state_dict()), where
            assert {**first.rows, **second.rows} == whole.rows, where
            lost = first.updates + second.updates - EPOCHS * PER_EPOCH
            assert lost <= (1 if save_every == ALWAYS else PER_EPOCH), where
            began = tape.content is not None and any(text.startswith("resuming after round") for text in second.said)
            assert began == (first.updates > (1 if save_every == ALWAYS else PER_EPOCH)), where


@pytest.mark.parametrize(("large", "save_every", "wanted"), [
    (False, 1e9, [(1, 0), (2, 0), (3, 0), (4, 0)]),
    (True, 1e9, [(4, 0)]),  # the last epoch's, without which a result that is being measured would be lost
    (True, 6.5, [(1, 2), (2, 4), (4, 0)]),  # after 7 seconds, inside an epoch, and as many after that
    (True, 4.5, [(1, 0), (2, 0), (3, 0), (4, 0)]),  # epochs of 5 seconds
    (True, 9.5, [(2, 0), (4, 0)]),
])  # fmt: skip
def test_a_large_checkpoint_is_written_once_in_save_every_seconds(large, save_every, wanted, monkeypatch):
    """Epochs of five updates of a second each; what is written takes no time on this clock."""
    monkeypatch.setattr(loop, "LARGE", 4 if large else 5)
    now, places = [0.0], list[tuple[int, int]]()
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Tape, "save", lambda self, at: places.append((at["place"]["epoch"], at["place"]["batch"])))

    def step(x, y):
        now[0] += 1.0
        return {"loss": torch.tensor(1.0)}

    state = {"model": nn.Linear(1, 1, bias=False)}  # 4 bytes
    run(step, Plain([2] * 5), 4, state=state, checkpoint=Tape(), save_every=save_every)
    assert places == wanted


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reached", range(2, EPOCHS * PER_EPOCH + 1))
def test_a_deadline_leaves_the_very_place(kind, reached, monkeypatch):
    """Large checkpoints, none written yet: the one that the deadline writes loses no update, and goes on to the same
    bits, though the next batch was drawn already."""
    monkeypatch.setattr(loop, "LARGE", 0)
    whole, tape, calls = Experiment(kind).run(), Tape(), iter(range(100))
    first = Experiment(kind, tape)
    first.session.limit = Limit(1e9, whole=True)
    really = Limit.reached

    def at_last(self) -> bool:
        self.end = 0.0 if next(calls) == reached - 1 else 1e9
        return really(self)

    monkeypatch.setattr(Limit, "reached", at_last)
    with pytest.raises(TrainingError):
        first.run()
    second = Experiment(kind, tape).run()
    assert first.updates + second.updates == EPOCHS * PER_EPOCH and first.updates == reached - 1
    assert same_weights(second.net, whole.net) and {**first.rows, **second.rows} == whole.rows


class Plain:
    """Batches without `epoch`."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = list(sizes)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self):
        return iter([(torch.zeros(n, 3, 4, 4), torch.zeros(n, dtype=torch.long)) for n in self.sizes])


def run(step, batches, epochs: int, state=None, end_epoch=lambda losses: None, **how) -> list[str]:
    said: list[str] = []
    loop.run(step, batches, epochs, state=state or {}, end_epoch=end_epoch, session=RunContext(say=said.append, **how))
    return said


def test_floats_are_averaged_over_images_and_counts_summed():
    """Batches of 3, 3 and 1 with the loss 1, 2, 8: (3 * 1 + 3 * 2 + 1 * 8) / 7 = 17/7; counts 3 + 3 + 1."""
    losses, seen = iter([1.0, 2.0, 8.0] * 2), []
    reports = []

    def step(x, y):
        seen.append(len(x))
        return {"loss": torch.tensor(next(losses)), "count": torch.tensor(len(x))}

    run(step, Plain([3, 3, 1]), 2, on_epoch=lambda epoch, losses, state: reports.append((epoch, losses)))
    assert seen == [3, 3, 1] * 2 and [epoch for epoch, _ in reports] == [1, 2]
    for _, report in reports:
        assert report["loss"] == pytest.approx(17 / 7) and report["count"] == 7


@pytest.mark.parametrize("save_every", [NEVER, ALWAYS, None, "in time"])
@pytest.mark.parametrize(("broken", "name", "value"), [
    ("loss", "model", torch.nan), ("loss", "model", torch.inf), ("weight", "model", torch.inf),
    ("weight", "masks", torch.nan),
])  # fmt: skip
def test_what_is_not_finite_stops_a_run_and_leaves_the_last_finite_checkpoint(broken, name, value, save_every):
    """Batch 4 of epoch 2 breaks the loss or, once it is measured, a weight. The checkpoint is from the end of epoch 1,
    or from batch 3 of epoch 2; without checkpoints, or where the time ends there, it is seen all the same."""
    weight, tape, count, limit = nn.Linear(1, 1), Tape(), [0], Limit(1e18)

    def step(x, y):
        count[0] += 1
        number = value if count[0] >= 9 else float(count[0])
        limit.end = 0.0 if count[0] == 9 else 1e18
        with torch.no_grad():
            weight.bias.fill_(number if broken == "weight" else count[0])
        return {"loss": torch.tensor(number if broken == "loss" else 1.0)}

    kept = {"checkpoint": tape, "save_every": save_every} if isinstance(save_every, float) else {}
    how = {"limit": limit} if save_every == "in time" else kept
    with refuses(TrainingError, f"{broken} is not finite", "--warm_lr"):
        loop.run(step, Plain([2] * 5), 3, state={name: weight}, end_epoch=lambda losses: None,
                 session=quiet(**how), rate="warm_lr")  # fmt: skip
    assert count[0] == (9 if save_every in (ALWAYS, "in time") else 10)
    if kept:
        last = tape.load()
        found = last["place"]["epoch"], last["place"]["batch"], float(last["objects"][name]["bias"])
        assert found == ((1, 3, 8.0) if save_every == ALWAYS else (1, 0, 5.0))


def test_end_epoch_may_end_a_run_and_a_resumed_one_stays_ended():
    tape, batches = Tape(), Plain([1])
    said = [run(lambda x, y: {"loss": torch.ones(())}, batches, 5, checkpoint=tape, end_epoch=lambda losses: True)
            for _ in "12"]  # fmt: skip
    assert [len(lines) for lines in said] == [1, 1] and said[1][0].startswith("resuming")


def test_buffers_that_are_broken_end_a_run_and_those_of_a_mask_do_not():
    """Of attention: -inf where a place must not be looked at."""
    net = nn.BatchNorm1d(2)
    net.register_buffer("mask", torch.full((2, 2), -torch.inf))

    def step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": x.mean()}

    run(step, Plain([2]), 1, state={"model": net})
    net.running_mean.fill_(torch.nan)
    with refuses(TrainingError, "not finite"):
        run(step, Plain([2]), 1, state={"model": net})
