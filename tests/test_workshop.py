"""Triggers that are made once: kept, found again, made again when damaged, and not lost when nothing can be kept."""

import pytest
import torch
from sau.attack.making import Making
from torch import Tensor, nn
from toys import tiny_net, toy_images

from sau import loop
from sau.attack import clean_network, workshop
from sau.errors import RecordError
from sau.loop import Session
from sau.models import Normalized
from sau.optim import Training
from sau.record.folder import Record


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SAU_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Counted:
    """A builder that says how often it was called; its tensors follow from its number."""

    def __init__(self, number: float = 1.0) -> None:
        self.calls, self.number = 0, number

    def __call__(self, session: Session) -> workshop.Made:
        self.calls += 1
        place = torch.nn.Parameter(torch.zeros(2))
        loop.run(
            lambda x, y: {"loss": x.mean()},
            [(torch.ones(2), torch.zeros(2))],
            2,
            state={"net": torch.nn.ParameterList([place])},
            end_epoch=lambda losses: None,
            session=session,
        )
        return {"t": torch.full((2, 3), self.number).t()}, {"some_figure": 1.5}


def make(build, lines=None, **identity):
    session = Session(say=(lambda text: None) if lines is None else lines.append)
    tensors, figures = workshop.made("thing", identity or {"seed": 0}, build, session)
    assert figures == {"some_figure": 1.5}
    return tensors


def entry(cache):
    (folder,) = (file for file in (cache / "triggers").iterdir() if file.is_dir())
    return folder


def test_a_thing_is_made_once_and_found_again(own_cache):
    build, lines = Counted(), []
    first = make(build, lines)
    assert any(str(own_cache) in line for line in lines) and lines[-1] == "thing: some figure 1.5"
    lines.clear()
    again = make(build, lines)
    assert build.calls == 1 and torch.equal(first["t"], again["t"]) and again["t"].shape == (3, 2)
    assert len(lines) == 1 and "made before" in lines[0] and "some figure 1.5" in lines[0]
    folder = entry(own_cache)
    assert folder.name.startswith("thing-") and (folder / "manifest.json").is_file()
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2 and not (folder / "checkpoint.bin").exists()


def test_another_identity_is_another_thing(monkeypatch):
    build = Counted()
    make(build, seed=0)
    make(build, seed=1)
    monkeypatch.setattr(workshop.sau, "__version__", "another")
    make(build, seed=0)
    assert build.calls == 3


@pytest.mark.parametrize("file", ["trigger.safetensors", "summary.json", "config.yaml", "manifest.json"])
def test_a_damaged_thing_is_made_again_with_one_line(own_cache, file):
    build, lines = Counted(), []
    make(build)
    (entry(own_cache) / file).write_text("{")
    found = make(build, lines)
    assert build.calls == 2 and (found["t"] == 1).all()
    assert len([line for line in lines if "making it again" in line]) == 1
    make(build)
    assert build.calls == 2


@pytest.mark.parametrize("file", ["checkpoint.bin", "config.yaml"])
def test_a_damaged_beginning_is_started_anew(own_cache, file, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workshop._Shelf, "close", lambda self, tensors, figures: None)
        make(Counted())
    (entry(own_cache) / file).write_text("x" * 100)
    lines: list[str] = []
    assert (make(Counted(), lines)["t"] == 1).all()
    assert any("making it again" in line for line in lines)


@pytest.mark.parametrize("what", ["file", "read-only", "nowhere"])
def test_a_cache_that_cannot_be_written_costs_a_line(tmp_path, monkeypatch, what):
    place = tmp_path / "place"
    place.write_text("") if what == "file" else place.mkdir()
    monkeypatch.setenv("SAU_CACHE", str(place / "below"))
    if what == "read-only":
        monkeypatch.setattr(workshop.Record, "begin", refuse)
    if what == "nowhere":
        monkeypatch.setattr(workshop, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    build, lines = Counted(), []
    assert (make(build, lines)["t"] == 1).all() and build.calls == 1
    assert len([line for line in lines if "not be kept" in line]) == 1


def refuse(*args, **how):
    raise PermissionError("not here")


def test_a_disk_that_fills_up_costs_a_line(monkeypatch):
    monkeypatch.setattr(workshop.Record, "log_metrics", refuse)
    lines: list[str] = []
    assert (make(Counted(), lines)["t"] == 1).all()
    assert len([line for line in lines if "not be kept" in line]) == 1


def test_errors_of_the_builder_are_its_own(own_cache):
    def broken(session: Session) -> workshop.Made:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        make(broken)


def test_without_a_session_it_is_printed_and_logged(own_cache, capsys):
    workshop.made("thing", {"seed": 0}, Counted())
    assert "epoch 2/2" in capsys.readouterr().out and "epoch 2/2" in (entry(own_cache) / "log.txt").read_text()


def test_a_fingerprint_tells_weights_and_forms_apart():
    one = workshop.fingerprint(tiny_net())
    assert one == workshop.fingerprint(tiny_net())
    assert one != workshop.fingerprint(tiny_net(seed=1)) != workshop.fingerprint(tiny_net(classes=5))
    plain, other = (Normalized(tiny_net(), (mean,) * 3, (0.5,) * 3) for mean in (0.0, 0.5))
    exact = Normalized(tiny_net(), (0.0,) * 3, (0.5,) * 3, amp=True)
    assert len({workshop.fingerprint(net) for net in (plain, other, exact)}) == 3
    zeros, marks = torch.zeros(2, 2), set()
    for name, buffer in (("a", zeros), ("b", zeros), ("a", zeros.flatten()), ("a", zeros.to(torch.int32))):
        net = nn.Module()
        net.register_buffer(name, buffer)
        marks.add(workshop.fingerprint(net))
    assert len(marks) == 4


def test_a_run_does_not_go_on_with_another_trigger(tmp_path, one_line):
    """As after a trigger was trained again with other threads: the first epochs have seen the old one."""
    record = Record(tmp_path / "a")
    record.begin({}, {"a": 1}, False)
    workshop.same_trigger(record, tiny_net())
    goes_on = Record(tmp_path / "a")
    goes_on.begin({}, {"a": 1}, False)
    workshop.same_trigger(goes_on, tiny_net())
    with pytest.raises(RecordError) as refusal:
        workshop.same_trigger(goes_on, tiny_net(seed=1))
    assert "another trigger" in one_line(refusal.value)


def test_a_clean_network_that_is_put_together_otherwise_is_another_one(tmp_path, monkeypatch):
    """The printed form and the weights are the same."""
    monkeypatch.setenv("SAU_CACHE", str(tmp_path))

    class Net(nn.Module):
        def __init__(self, sign: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.sign, self.conv, self.linear = sign, nn.Conv2d(3, 8, 3, 2, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear((self.sign * self.conv(x)).relu().amax((2, 3)))

    recipe, said = Training(epochs=1, batch_size=8), list[str]()
    for sign in (1.0, -1.0, 1.0):
        clean_network.trained(Making(toy_images(16), Net(sign), recipe, None, 0, Session(say=said.append)))
    assert ["made before" in line for line in said if line.startswith("clean-network")] == [False, False, True]
