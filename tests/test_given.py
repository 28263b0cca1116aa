"""What a user gives: pixels in other units than [0, 1], test images in a clean set, small clean sets, links."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.utils.checkpoint import checkpoint
from toys import QUICK, pair, quiet, refuses, same_weights, the_error, tiny_net, toy_images, triples

from sau.data.batches import in_range
from sau.data.sources import check_clean_set
from sau.defense import CLP, EP, FT, SAU, checks
from sau.errors import DataError
from sau.evaluate import score
from sau.loop import RunContext
from sau.models import Normalized, PreActResNet18

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)
TUNE = FT(epochs=1, batch_size=8, lr=0.01)


def normalised(x, mean=MEAN, std=STD):
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


@pytest.mark.parametrize("give", [lambda x, y: (x, y), triples], ids=["pair", "loader"])
@pytest.mark.parametrize(("mean", "std"), [(MEAN, STD), ((0.5,), (0.5,)), ((0.1307,), (0.3081,))])
def test_mean_and_std_of_images_that_are_not_normalised_are_refused(give, mean, std):
    x, y = pair()
    with refuses(DataError, "so they are not normalised; leave mean and std out"):
        TUNE.purify(tiny_net(), give(x, y), mean=mean, std=std, session=quiet())


def test_images_that_are_normalised_are_taken():
    """Also a batch without dark pixels, bytes, which are never normalised, and statistics that change nothing."""
    x, y = pair()
    x[8:16] = x[8:16].clamp_min(0.5)  # the second batch of the loader
    TUNE.purify(tiny_net(), triples(normalised(x), y), mean=MEAN, std=STD, session=quiet())
    TUNE.purify(tiny_net(), (normalised(x), y), mean=MEAN, std=STD, session=quiet())
    bytes_of = (255 * x.clamp(0.5, 0.7)).to(torch.uint8)
    TUNE.purify(tiny_net(), triples(bytes_of, y), mean=MEAN, std=STD, session=quiet())
    plain = TUNE.purify(tiny_net(), (x, y), session=quiet())
    assert same_weights(plain, TUNE.purify(tiny_net(), (x, y), mean=(0.0,), std=(1.0,), session=quiet()))


def test_statistics_that_were_forgotten_or_are_others_are_told():
    """With those of the images a network that was trained on normalised ones is right more often."""
    (x, _), said, net = pair(40), list[str](), nn.Sequential(nn.Flatten(), nn.Linear(768, 4, bias=False)).eval()
    own = {"mean": x.mean((0, 2, 3)).tolist(), "std": x.std((0, 2, 3)).tolist()}
    y = net(normalised(x, **own)).argmax(1)
    for how in ({}, own):
        given, session = normalised(x, **how) if how else x, RunContext(say=said.append)
        TUNE.purify(net, (given, y), session=session, progress=False, **how)
    wanted = "warning: on normalised images it classifies 40 of 40 correctly; give the mean and std that the network "
    assert [line for line in said if " normalised images " in line] == [f"{wanted}was trained with"]
    with refuses(DataError, "or other mean and std"):
        TUNE.purify(tiny_net(), (normalised(x), y), mean=(0.5,) * 3, std=(0.5,) * 3, session=quiet())


def test_rounding_is_clamped():
    x, y = pair()
    x[0, 0, 0, 0], x[0, 0, 0, 1] = -3e-8, 1 + 2e-7
    plain = TUNE.purify(tiny_net(), (x.clamp(0, 1), y), session=quiet())
    assert same_weights(TUNE.purify(tiny_net(), (x, y), session=quiet()), plain)
    assert same_weights(*(TUNE.purify(tiny_net(), [(z, y)], session=quiet()) for z in (x, x.clamp(0, 1))))
    assert score(tiny_net(), (x, y), None) == score(tiny_net(), (x.clamp(0, 1), y), None)
    inside = in_range(x)
    assert (inside.min(), inside.max()) == (0, 1) and in_range(inside) is inside  # no copy of what is right


def test_a_network_that_owns_its_normalisation_takes_normalised_images_too():
    x, y = pair()
    net = Normalized(tiny_net(), MEAN, STD).eval()
    TUNE.purify(net, (normalised(x), y), mean=MEAN, std=STD, session=quiet())


def test_results_that_would_go_through_a_link_are_not_written(victim, tmp_path, here, script):
    """A record that was downloaded may have links in the places of what is made from it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("defense", "audit", "figures"):
        (victim / name).symlink_to(outside)
    status, _, err = here("defense", "ft", "--result_file", "victim", "--epochs", "1", *QUICK)
    assert status == 2 and "is a link that leads out" in the_error(err)
    small = "--samples 20 --threads 1 --device cpu --parts relearn --epochs 1 --shots 1".split()
    for argv in (("audit.py", "--result_file", "victim", *small), ("figures.py", "victim")):
        status, _, err = script(*argv)
        assert status == 2 and "is a link that leads out" in err.splitlines()[-1]
    assert not any(outside.iterdir())


@pytest.mark.parametrize("shared", [2, 3, 200])
def test_up_to_a_hundredth_of_a_clean_set_may_be_test_images(shared):
    clean, test = toy_images(200, seed=1), toy_images(200)
    pixels = torch.cat([test.pixels[:shared], clean.pixels[shared:]])
    if shared == 2:
        notes = check_clean_set(replace(clean, pixels=pixels), test)
        assert notes == ["2 of 200 clean images are test images, too"]
    else:
        with pytest.raises(DataError, match=f"{shared} of 200"):
            check_clean_set(replace(clean, pixels=pixels), test)


@pytest.mark.parametrize(("rows", "words"), [
    (range(40), []),
    ([2], ["none of 3 of 4 classes: 0, 1, 3"]),
    ([0, 1, 2, 3, 3, 2], ["2 of 6 clean images are copies of others"]),
])  # fmt: skip
def test_small_and_lopsided_clean_sets_are_noted(rows, words):
    notes = check_clean_set(toy_images(40, seed=6)[torch.tensor([*rows])], toy_images(8, seed=5))
    assert len(notes) == len(words) and all(word in note for word, note in zip(words, notes, strict=True))


@pytest.mark.parametrize(("defense", "count", "wanted"), [
    (FT(epochs=0, batch_size=8), 1, ["warning: the clean images have none of 3 of 4 classes: 0, 1, 3; the network"]),
    (EP(batch_size=8), 2, ["note: the poisoned images have none of 2"]),
    (CLP(batch_size=8), 1, []),  # looks at no images
], ids=["clean", "poisoned", "blind"])  # fmt: skip
def test_a_notebook_is_told_what_a_command_says_of_the_clean_set(defense, count, wanted):
    some, said = toy_images(40, seed=6)[torch.arange(2, 2 + count)], list[str]()
    for data, progress in (((some.pixels, some.labels), True), ([(some.pixels, some.labels)], False)):
        said.clear()
        defense.purify(tiny_net(), data, session=RunContext(say=said.append), progress=progress)
        notes = [line for line in said if " images have none of " in line]
        assert len(notes) == len([line for line in wanted if progress or line.startswith("warning: ")])
        assert all(note.startswith(text) for text, note in zip(wanted, notes, strict=False))


def test_the_record_keeps_what_was_said_of_the_clean_set(victim, tmp_path, here):
    (tmp_path / "one.txt").write_text("5\n")
    flags = ("--result_file", "victim", "--index", "one.txt", "--epochs", "1", *QUICK)
    status, out, err = here("defense", "ft", *flags)
    assert status == 0 and out.count("note: the clean images have none of 9 of 10 classes") == 1, err
    notes = yaml.safe_load((victim / "defense" / "ft" / "config.yaml").read_text())["notes"]
    assert len(notes) == 1 and "9 of 10 classes" in notes[0]


def peak_over_forecast() -> float:
    """Run by itself: the memory that SAU takes, as Linux counts it, over what is said before."""

    def peak() -> float:
        (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * float(line.split()[1])

    model = Normalized(PreActResNet18(10, width=16), MEAN, STD).eval()
    x, y = torch.rand(256, 3, 32, 32), torch.arange(256) % 10
    forecast, before, checks.verdict_of = checks.update_bytes(model, x, 256), peak(), lambda *_: {}
    SAU(epochs=1).purify(model, (x, y), settings="as_given", session=quiet())
    return (peak() - before) / forecast


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak of one process is not told")
def test_an_update_takes_about_the_memory_that_was_forecast():
    argv = [sys.executable, "-c", "import test_given; print(test_given.peak_over_forecast())"]
    done = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 2


class Blocks(nn.Module):
    """Layers that can be checkpointed as timm's can."""

    def __init__(self, grad_checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.grad_checkpointing = grad_checkpointing
        layers = [layer for _ in range(8) for layer in (nn.Linear(768, 768), nn.GELU())]
        self.blocks = nn.Sequential(nn.Flatten(), *layers)
        self.head = nn.Linear(768, 4)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward(self, x):
        return self.head(checkpoint(self.blocks, x, use_reentrant=False) if self.grad_checkpointing else self.blocks(x))


class Unsupported(nn.Linear):
    """A network whose library refuses."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        assert not enable, "gradient checkpointing not supported"


def test_where_memory_is_short_activations_are_computed_twice_or_a_warning_says_so(monkeypatch):
    x, y = pair()
    x, said = torch.nn.functional.interpolate(x, 16), list[str]()
    plain, kept = TUNE.purify(Blocks(), (x, y), session=quiet()), 3 * 8 * 768 * 4  # of a layer and 8 images
    weights = 6 * sum(weight.nbytes for weight in plain.parameters())
    assert checks.update_bytes(Blocks(), x, 8) >= weights + 17 * kept  # the inputs of 17 layers
    monkeypatch.setattr(checks, "free_memory", lambda device: weights + 5 * kept)
    result = TUNE.purify(Blocks(), (x, y), session=RunContext(say=said.append))
    assert "activation checkpointing" in " ".join(said) and "memory:" not in " ".join(said)
    assert same_weights(result, plain) and not result.grad_checkpointing
    assert not any(map(checks.checkpointed, (Unsupported(), Blocks(grad_checkpointing=True))))
    monkeypatch.setattr(checks, "free_memory", lambda device: 1.0)
    TUNE.purify(tiny_net(), (x, y), session=RunContext(say=said.append))
    assert any(line.startswith("warning: memory: an update on 8 images takes about 0.0 GB") for line in said)
