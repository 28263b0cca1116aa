"""Networks, pictures and statistics as callers hand them over: taken as they are meant, or refused in a line."""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from defense_rows import ROWS, each
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm
from toys import TinyNet, pair, quiet, same_weights, tiny_net, toy_images, triples

from sau.attack import BadNet
from sau.defense import CLP, FT, Defense
from sau.errors import ConfigError, DataError, SauError
from sau.evaluate import eval_mode
from sau.loop import Session
from sau.models import Normalized
from sau.optim import Training
from sau.pgd import Search
from sau.risk import measure

pytestmark = pytest.mark.usefixtures("no_chance")  # most networks here are untrained

QUICK = FT(epochs=1, batch_size=8, lr=0.01)


@cache
def purified(name: str) -> nn.Module:
    """What comes back where nothing is unusual."""
    return ROWS[name].defense.purify(tiny_net(), pair(), session=quiet())


def refusal_of(how: str, *given: Any, defense: Defense = QUICK, **more: Any) -> SauError:
    """What `purify` says, without the tests' check of types, which would come first; `how` is the kind of error."""
    with pytest.raises(SauError) as refusal:
        inspect.unwrap(type(defense).purify)(defense, *given, session=quiet(), **more)
    assert type(refusal.value).__name__ == how
    return refusal.value


# Where it is called from


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if hasattr(row.defense, "epochs")])
def test_in_bf16_what_is_learned_is_what_comes_back(name):
    """What the network answers in the last round it answers afterwards: nothing keeps weights of before an update."""
    answers: list[Tensor] = []
    x = pair()[0]

    def on_epoch(epoch: int, losses: dict[str, float], state: dict[str, Any]) -> dict[str, float]:
        if "model" in state:
            with torch.no_grad(), eval_mode(state["model"]):
                answers.append(state["model"](x))
        return {}

    session = Session(say=lambda text: None, on_epoch=on_epoch)
    fixed = ROWS[name].defense.purify(Normalized(tiny_net(), amp=True), pair(), session=session)
    assert bool(answers) is (name not in ("anp", "rnp", "ep", "bnp", "clp"))  # they train no weight of it
    with torch.no_grad():
        assert not answers or torch.allclose(fixed(x), answers[-1], atol=1e-6)


def test_a_victim_in_bf16_learns_in_any_context():
    """An outer autocast keeps what it made of a weight until it ends."""
    images = toy_images(32)
    trained = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            model = Normalized(tiny_net(), amp=True)
            BadNet().fit(model, images, Training(epochs=2, batch_size=8, lr=0.05), session=quiet())
        trained.append(model)
    assert same_weights(*trained)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
}


@pytest.mark.parametrize("context", CONTEXTS)
@each
def test_the_context_that_it_is_called_in_changes_no_bit(defense, context):
    """Also where network and pictures are made in it; what comes back can be trained outside."""
    with CONTEXTS[context]():
        fixed = defense.purify(tiny_net(), pair(), session=quiet())
    assert same_weights(fixed, purified(defense.name))
    fixed.train()(pair()[0]).sum().backward()
    assert fixed.linear.weight.grad is not None


@each
def test_a_loader_whose_batches_are_made_in_inference_mode_is_like_any(defense):
    with torch.inference_mode():
        fixed = defense.purify(tiny_net(), [pair()], session=quiet())
    assert same_weights(fixed, defense.purify(tiny_net(), [pair()], session=quiet()))


# Networks


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("compiled", [partial(torch.compile, backend="eager"), compiled_in_place], ids=["wrap", "call"])
@each
def test_a_compiled_network_comes_back_plain_and_with_the_same_bits(defense, compiled):
    fixed = defense.purify(compiled(tiny_net()), pair(), session=quiet())
    assert type(fixed) is TinyNet and fixed._compiled_call_impl is None
    assert same_weights(fixed, purified(defense.name))


@each
def test_no_gradient_comes_back(defense):
    """Neither the caller's nor that of the last step, which an optimiser of the caller's would take again."""
    net = tiny_net()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    fixed = defense.purify(net, pair(), session=quiet())
    assert all(parameter.grad is None for parameter in fixed.parameters())
    assert all((parameter.grad == 1).all() for parameter in net.parameters())
    assert same_weights(fixed, purified(defense.name))


def pruned() -> nn.Module:
    net = tiny_net()
    prune.l1_unstructured(net.linear, "weight", 0.3)
    return net


def weight_normed() -> nn.Module:
    net = tiny_net()
    weight_norm(net.linear)
    return net


class Keeping(TinyNet):
    """A network that keeps its activations, as some do for pictures of them."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def keeping() -> nn.Module:
    net = Keeping().eval()
    net(pair()[0])
    return net


def without_gradient(net: nn.Module) -> None:
    with torch.no_grad():
        net(pair()[0])


def counting() -> nn.Module:
    net = tiny_net()
    net.count = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)
    return net


def locked() -> nn.Module:
    net = tiny_net()
    net.lock = threading.Lock()
    return net


LESS = {
    str(kind): (lambda kind=kind: tiny_net().to(kind), [str(kind), "give model.float()"], nn.Module.float)
    for kind in (torch.float16, torch.bfloat16)
}
NETWORKS: dict[str, tuple[Callable[[], Any], list[str], Callable[[Any], Any] | None]] = {  # words, and what mends it
    **LESS,
    "scripted": (lambda: torch.jit.script(tiny_net()), ["ScriptModule", "load its weights into one"], None),
    "traced": (lambda: torch.jit.trace(tiny_net(), pair()[0]), ["ScriptModule", "load its weights into one"], None),
    "a path": (lambda: "net.pt", ["model is str", "load weights into one"], None),
    "meta": (lambda: tiny_net().to("meta"), ["`meta`", "load some into it"], None),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), ["lazy layer", "run it once"], without_gradient),
    "whole numbers": (counting, ["weights are torch.int64", "make them buffers"], lambda net: delattr(net, "count")),
    "no weights": (lambda: nn.Flatten(), ["no weights (parameters)"], None),
    "pruned": (pruned, ["cannot be copied", "prune.remove"], lambda net: prune.remove(net.linear, "weight")),
    "weight norm": (weight_normed, ["remove_weight_norm"], lambda net: remove_weight_norm(net.linear)),
    "activations": (keeping, ["cannot be copied", "under torch.no_grad()"], without_gradient),
    "a lock": (locked, ["_thread.lock", "take that out"], lambda net: delattr(net, "lock")),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("which", NETWORKS)
def test_a_network_that_cannot_be_purified_is_refused_with_what_helps(which, one_line):
    make, words, mend = NETWORKS[which]
    net = make()
    said = one_line(refusal_of("ConfigError", net, pair()))
    assert all(word in said for word in words)
    if mend is not None:
        mend(net)
        assert QUICK.purify(net, pair(), session=quiet())(pair()[0]).isfinite().all()


class Deaf(TinyNet):
    """Answers without gradients, like a network that is wrapped for use."""

    forward = torch.no_grad()(TinyNet.forward)


class Cut(TinyNet):
    """Prepares its pictures without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach())


@pytest.mark.parametrize("name", ROWS)
def test_a_network_without_gradients_is_refused_by_those_who_need_them(name, one_line):
    defense = ROWS[name].defense
    asked = {"clp": "none", "bnp": "none", "ep": "none", **dict.fromkeys(("sau", "at", "i-bau", "nc", "npd"), "images")}
    assert defense.gradients == asked.get(name, "weights")
    for kind, needed, what in (
        (Deaf, defense.gradients != "none", "weights"),
        (Cut, defense.gradients == "images", "images"),
    ):
        net = kind().eval()
        if needed:
            said = one_line(refusal_of("ConfigError", net, pair(), defense=defense))
            assert f"have no gradient to the {what}, as {name} needs; take no_grad" in said
        else:
            defense.purify(net, pair(), session=quiet())


class Odd(TinyNet):
    """Keeps more than tensors, and calls its layers by name."""

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.features:
            x = layer(input=x)
        return self.linear(input=x.flatten(1))


@pytest.mark.parametrize("name", ROWS)
def test_what_else_a_network_keeps_and_how_it_calls_its_layers_changes_no_bit(name):
    odd = Odd()
    odd.load_state_dict(tiny_net().state_dict() | {"_extra_state": {}})
    fixed, wanted = ROWS[name].defense.purify(odd.eval(), pair(), session=quiet()), purified(name)
    assert all(torch.equal(value, fixed.state_dict()[key]) for key, value in wanted.state_dict().items())


@pytest.mark.parametrize("name", ["anp", "rnp", "clp", "bnp", "ep"])
def test_batch_norms_that_share_weights_are_refused_by_those_who_prune_each(name, one_line):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), *tail())
    net[3].weight = net[1].weight
    said = one_line(refusal_of("ConfigError", net.eval(), pair(), defense=ROWS[name].defense))
    assert f"share weights, but {name} prunes each of them; try ft or sau" in said


def tail() -> list[nn.Module]:
    """From 4 maps to 4 logits."""
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)]


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", torch.device("meta")])
def test_a_device_that_is_not_there_is_refused(device, one_line):
    said = one_line(refusal_of("ConfigError", tiny_net(), pair(), device=device))
    assert f"device is {str(device)!r}, which torch cannot use here: " in said


@pytest.mark.filterwarnings("ignore::FutureWarning")
@each
def test_spectral_norm_of_old_is_refused_by_those_who_set_the_weight(defense, one_line):
    """torch.nn.utils.spectral_norm makes it anew before each pass, so that what is set would be lost."""
    net = tiny_net()
    spectral_norm(net.linear)
    if defense.name in ("d3", "fst", "fp"):
        said = one_line(refusal_of("ConfigError", net, pair(), defense=defense))
        assert f"a weight that {defense.name} sets" in said and "remove_spectral_norm first" in said
        remove_spectral_norm(net.linear)
    fixed = defense.purify(net, pair(), session=quiet())
    assert fixed(pair()[0]).isfinite().all() and not torch.equal(fixed(pair()[0]), net.eval()(pair()[0]))


# Mean and standard deviation


GREY, SPREAD = [0.5] * 3, [0.25] * 3
STATISTICS = {
    "a number": (0.5, 0.25, "mean is 0.5, allowed are numbers, one for each channel"),
    "a tensor of one": (torch.tensor(0.5), torch.tensor(0.25), "mean is tensor(0.5000), allowed are"),
    "a batch of them": (torch.full((1, 3, 1, 1), 0.5), SPREAD, "allowed are numbers, one for each channel"),
    "a text": ("0.5", "0.25", "mean is 0.5, allowed are"),
    "unequal lengths": (GREY, [0.25], "mean has 3 values and std 1; give both for each channel"),
    "of bytes": ([125] * 3, [63] * 3, "allowed is 0 to 1, as of pixels in [0, 1]; divide by 255"),
    "below 0": ([-0.5] * 3, SPREAD, "mean is (-0.5, -0.5, -0.5), allowed is 0 to 1"),
    "no number": ([float("nan")] * 3, SPREAD, "mean is (nan, nan, nan), allowed is"),
    "no spread": (GREY, [0.25, 0.0, 0.25], "std is (0.25, 0.0, 0.25), allowed are values above 0"),
    "spread of no number": (GREY, [float("nan")] * 3, "allowed are values above 0"),
    "one of them": (GREY, None, "mean and std belong together"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", STATISTICS)
def test_statistics_that_cannot_be_are_refused_by_networks_and_defenses(which, one_line):
    mean, std, words = STATISTICS[which]
    assert words in one_line(refusal_of("ConfigError", tiny_net(), pair(), mean=mean, std=std))
    with pytest.raises(ConfigError) as refusal:
        Normalized(tiny_net(), mean, std)
    assert words in one_line(refusal.value)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", [torch.tensor, np.array, tuple, lambda values: torch.tensor(values).view(3, 1, 1)])
def test_statistics_may_come_in_whatever_holds_numbers(kind):
    x, y = pair()
    data = ((x - 0.5) / 0.25, y)
    fixed = [QUICK.purify(tiny_net(), data, mean=to(GREY), std=to(SPREAD), session=quiet()) for to in (list, kind)]
    assert same_weights(*fixed)
    assert torch.equal(Normalized(tiny_net(), kind(GREY), kind(SPREAD))(x), Normalized(tiny_net(), GREY, SPREAD)(x))


@pytest.mark.parametrize("give", [lambda *data: data, triples], ids=["pair", "loader"])
def test_there_are_as_many_statistics_as_channels_or_one_for_all(give, one_line):
    x, y = pair()
    data = give((x - 0.5) / 0.25, y)
    for count, channels, given in ((2, 3, data), (3, 1, give(x[:, :1], y))):
        mean, std = [0.5] * count, [0.25] * count
        said = one_line(refusal_of("DataError", tiny_net(channels=channels), given, mean=mean, std=std))
        assert f"mean and std have {count} values, pictures {channels} channels; give one for each" in said
    fixed = [QUICK.purify(tiny_net(), data, mean=[0.5] * n, std=[0.25] * n, session=quiet()) for n in (1, 3)]
    assert same_weights(*fixed)


# Pictures


class Measured:
    """An iterator that knows how long it is, and has nothing left after one walk."""

    def __init__(self) -> None:
        self.left = iter([pair()])

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> "Measured":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        return next(self.left)


class Once:
    """Batches that are gone after one walk, like those of a data set over a stream that is open."""

    def __init__(self, batches: list[Any]) -> None:
        self.stream = iter(batches)

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Any:
        yield from self.stream


class Short(list):
    """A list of batches that understates its length."""

    def __len__(self) -> int:
        return 1


def sized(side: int) -> tuple[Tensor, Tensor]:
    """Pictures of another height and width."""
    x, y = pair()
    return nn.functional.interpolate(x, size=side), y


def four(n: int = 20) -> tuple[Tensor, Tensor]:
    """Pictures with an alpha channel."""
    x, y = pair(n)
    return torch.cat([x, x[:, :1]], 1), y


PICTURES: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "an iterator": (lambda: iter([pair()]), ["list_iterator", "give a DataLoader with a length"]),
    "an iterator with a length": (Measured, ["Measured is walked through once", "give the DataLoader itself"]),
    "that of a loader": (lambda: iter(triples(*pair())), ["walked through once", "give the DataLoader itself"]),
    "pairs one by one": (lambda: zip(*pair(), strict=True), ["zip", "give a DataLoader with a length"]),
    "dictionaries": (
        lambda: [dict(zip(("image", "label"), pair(), strict=True))],
        ["dictionary (image, label)", "allowed is (pictures, labels)"],
    ),
    "no labels": (lambda: [pair()[:1]], ["tuple of length 1", "allowed is (pictures, labels)"]),
    "only pictures": (lambda: [pair()[0]], ["a batch is Tensor;", "allowed is (pictures, labels)"]),
    "numbers": (lambda: [3, 4], ["a batch is int;", "allowed is (pictures, labels)"]),
    "nothing": (lambda: Once([]), ["gives no batch, or none again"]),
    "all at the first walk": (lambda: Once([pair()]), ["gives no batch, or none again"]),
    "more than the length": (lambda: Short([pair(), pair()]), ["more batches than 1, its length"]),
    "two sizes": (lambda: [pair(), sized(24)], ["batch 2 has pictures [3, 24, 24], the first one [3, 16, 16]"]),
    "alpha": (four, ["(20, 4, 16, 16)", "C 1 or 3"]),
    "alpha in a loader": (lambda: triples(*four()), ["(8, 4, 16, 16)", "C 1 or 3"]),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("which", PICTURES)
def test_pictures_that_are_none_are_refused_before_anything_is_trained(which, one_line):
    make, words = PICTURES[which]
    said = one_line(refusal_of("DataError", tiny_net(channels=4 if "alpha" in which else 3), make()))
    assert all(word in said for word in words)


@pytest.mark.parametrize("error", [RuntimeError, AssertionError, ValueError, TypeError])
def test_a_network_that_does_not_take_pictures_of_this_size_is_told(error, one_line):
    """torchvision's transformers assert it, those of others raise errors of their own."""

    class Choosy(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            raise error("Wrong image height! Expected 224 but got 16!")

    with pytest.raises(DataError) as refusal:
        QUICK.purify(Choosy(), pair(), session=quiet())
    assert "(8, 3, 16, 16): Wrong image height!" in one_line(refusal.value)


def borrowed() -> TinyNet:
    """A network whose forward is a function that goes by another one's weights; copies share it."""
    net, other = tiny_net(), tiny_net()
    net.forward = lambda x: other(x)  # type: ignore[method-assign]
    return net


@each
def test_a_network_that_answers_by_other_weights_is_refused(defense, one_line):
    assert "does not depend on its weights" in one_line(refusal_of("ConfigError", borrowed(), pair(), defense=defense))


class Auto(nn.Module):
    """It turns autocast on by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.net(x) * 20  # sure of itself: 1 - p is 0 in bf16


@pytest.mark.parametrize("name", ["sau", "npd"])
def test_logits_of_few_bits_are_widened(name):
    fixed = ROWS[name].defense.purify(nn.Sequential(Auto()), pair(), session=quiet())
    assert all(parameter.isfinite().all() for parameter in fixed.parameters())
    measure(fixed, nn.Sequential(Auto()), toy_images(8), search=Search(steps=2, restarts=1))


def test_a_mask_of_attention_is_sound_and_nan_is_not(one_line):
    net = tiny_net()
    net.register_buffer("mask", torch.triu(torch.full((4, 4), -torch.inf), 1))
    QUICK.purify(net, pair(), session=quiet())
    net.mask[0] = torch.nan
    assert "mask of the network holds NaN" in one_line(refusal_of("TrainingError", net, pair()))


@pytest.mark.parametrize("keep", ["drop", "copy"])
def test_weights_that_a_state_dict_does_not_show_come_back_as_they_were(keep):
    """It may leave out a part that is never saved, or answer with copies."""
    net = tiny_net()

    def hook(module: nn.Module, state: dict[str, Tensor], prefix: str, meta: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}linear.")]:
            state[name] = state[name].clone()
            if keep == "drop":
                del state[name]

    net._register_state_dict_hook(hook)
    assert torch.equal(FT(epochs=0).purify(net, pair(), session=quiet()).linear.weight, net.linear.weight)


def test_a_compiled_layer_is_unwrapped_by_all_of_its_names():
    net = tiny_net()
    net.features = net.again = torch.compile(net.features, backend="eager")
    fixed = FT(epochs=0).purify(net, pair(), session=quiet())
    assert type(fixed.features) is nn.Sequential and fixed.again is fixed.features


class Long(list):
    """A list of batches that overstates its length."""

    def __len__(self) -> int:
        return 3


class Refilled(list):
    """Batches whose labels all come in the same tensor."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.empty_like(self[0][1])
        for place in range(len(self)):
            x, y = self[place]
            yield x, labels.copy_(y)


def test_labels_that_a_loader_fills_anew_are_those_of_their_batch():
    x, y = pair(32)
    order, said = y.argsort(stable=True), list[str]()
    FT(epochs=0).purify(tiny_net(), Refilled((x[i], y[i]) for i in order.split(4)), session=Session(say=said.append))
    assert any("class by class" in line for line in said) and not any("have none of" in line for line in said)


def test_a_loader_that_gives_fewer_batches_than_it_says_is_told():
    said: list[str] = []
    FT(epochs=1).purify(tiny_net(), Long([pair(), pair()]), session=Session(say=said.append))
    assert "warning: the loader gives 2 batches, but says 3, by which rates fall" in said
    said.clear()
    FT(epochs=1).purify(tiny_net(), [pair(), pair()], session=Session(say=said.append))
    CLP().purify(tiny_net(), Long([pair(), pair()]), session=Session(say=said.append))  # which makes no updates
    assert not any("but says" in line for line in said)
