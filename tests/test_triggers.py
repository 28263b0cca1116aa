"""The cache of triggers that take long to make: kept, found again, resumed, made again when damaged."""

import pytest
import torch
from toys import Enough, quiet, tiny_net, toy_images

from sau import loop
from sau.attack import LF, SSBA, triggers
from sau.attack import lf as lf_search
from sau.attack.triggers import TriggerContext, cached_trigger, network_digest, same_trigger
from sau.data import decode
from sau.errors import RecordError
from sau.loop import RunContext
from sau.models import Normalized
from sau.optim import Training
from sau.record.folder import Record

pytestmark = pytest.mark.usefixtures("own_cache")


class Build:
    """A trigger of two epochs that counts how often it is made."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls, self.error = 0, error

    def __call__(self, session: RunContext) -> triggers.Made:
        self.calls += 1
        state = {"net": torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(2))])}
        batches = [(torch.ones(2), torch.zeros(2))]
        how = {"state": state, "end_epoch": lambda losses: None, "session": session}
        loop.run(lambda x, y: {"loss": x.mean()}, batches, 2, **how)
        if self.error:
            raise self.error
        return {"t": torch.ones(2, 3).t()}, {"some_figure": 1.5}


def make(build, **identity):
    lines: list[str] = []
    context = TriggerContext(toy_images(2), tiny_net(), Training(), None, 0, RunContext(say=lines.append))
    tensors, figures = cached_trigger("thing", identity, build, context)
    assert figures == {"some_figure": 1.5} and torch.equal(tensors["t"], torch.ones(3, 2))
    return lines


def entry(own_cache):
    (file,) = own_cache.glob("*.safetensors")
    return file


def test_a_trigger_is_made_once(own_cache):
    build = Build()
    assert make(build)[-1] == "thing: some figure 1.5"
    assert make(build) == ["thing: some figure 1.5; from the cache"]
    assert build.calls == 1 and entry(own_cache).is_file() and not list(own_cache.glob("unfinished/*"))


def test_another_identity_version_or_number_of_threads_is_another_trigger(monkeypatch):
    build = Build()
    make(build, seed=0), make(build, seed=1)
    monkeypatch.setattr(triggers.sau, "__version__", "another")
    make(build, seed=0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    make(build, seed=0), make(build, seed=0)
    assert build.calls == 4


def test_a_damaged_trigger_is_made_again(own_cache):
    build = Build()
    make(build)
    entry(own_cache).write_text("{")
    assert any("made again" in line for line in make(build))
    make(build)
    assert build.calls == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_an_interrupted_trigger_resumes_unless_its_checkpoint_is_damaged(own_cache, damaged):
    with pytest.raises(KeyboardInterrupt):
        make(Build(KeyboardInterrupt()))
    (file,) = own_cache.glob("unfinished/thing-*/checkpoint.bin")
    if damaged:
        file.write_text("x" * 100)
    lines = make(Build())
    assert any("epoch 1/2" in line for line in lines) == damaged == any("made again" in line for line in lines)


@pytest.mark.parametrize("what", ["a file", "no home"])
def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch, what):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SAU_CACHE", str(tmp_path / "file/below"))
    if what == "no home":
        for module in (triggers, decode):
            monkeypatch.setattr(module, "cache_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    build = Build()
    warnings = [line for line in make(build) if line.startswith("warning:")]
    assert len(warnings) == 1 and "SAU_CACHE" in warnings[0] and build.calls == 1


def test_network_digests_tell_weights_forms_and_precision_apart():
    plain, other = (Normalized(tiny_net(), (mean,) * 3, (0.5,) * 3) for mean in (0.0, 0.5))
    bf16 = Normalized(tiny_net(), (0.0,) * 3, (0.5,) * 3, amp=True)
    nets = [tiny_net(), tiny_net(seed=1), tiny_net(classes=5), plain, other, bf16]
    assert len({network_digest(net) for net in nets}) == len(nets)
    assert network_digest(tiny_net()) == network_digest(tiny_net())


def test_a_record_does_not_go_on_with_another_trigger(tmp_path):
    """As after a trigger was trained again with other threads: the first epochs have seen the old one."""
    for seed in (0, 0):
        record = Record(tmp_path / "a")
        record.begin({}, {"a": 1}, False)
        record.update_config(trigger_digest=same_trigger(record, tiny_net(seed=seed)))
        record.save({"stage": 0, "place": {"epoch": 0}})
    with pytest.raises(RecordError, match="another trigger"):
        same_trigger(record, tiny_net(seed=1))


LF_SETTINGS = dict(zip(("attack_target", *lf_search.SETTINGS), (1, 7, 9, 0.5, 11, 0.25, 0.125), strict=True))
SSBA_SETTINGS = {
    "ssba_bits": 2, "ssba_residual": True, "ssba_epochs": 3, "ssba_batch_size": 4, "ssba_lr": 0.5, "ssba_weight": 2.0,
    "trigger_seed": 1,
}  # fmt: skip


@pytest.mark.parametrize(("attack", "settings"), [(LF(lf_optimise=True), LF_SETTINGS), (SSBA(), SSBA_SETTINGS)])
def test_whatever_changes_a_trigger_makes_it_another_one(attack, settings, monkeypatch):
    """Or one that was made for other settings would be taken from the cache; what comes after it changes nothing."""
    keys, clean = list[str](), [tiny_net()]

    def found(identity):
        keys.append(str(sorted(identity.items())))
        raise Enough

    monkeypatch.setattr(triggers, "digest", found)
    monkeypatch.setattr(lf_search, "train_clean", lambda context: clean[0])

    def key(images: int = 0, seed: int = 0, **changed: object) -> str:
        made = type(attack)(**{**attack.params(), **changed})
        with pytest.raises(Enough):
            made.fit_trigger(toy_images(16, seed=images), tiny_net(), Training(), seed=seed, session=quiet())
        return keys[-1]

    wanted = key()
    assert "('device', 'cpu')" in wanted and key(pratio=0.5) == wanted
    others = [*(key(**{name: value}) for name, value in settings.items()), key(images=1)]
    if isinstance(attack, LF):
        others.append(key(seed=1))
        clean[0] = tiny_net(seed=1)
        others.append(key())
    assert len({wanted, *others}) == 1 + len(others)
