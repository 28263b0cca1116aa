"""Settings that follow from the clean set and the network, and the verdict at the end."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset
from toys import planted, quiet, tiny_net, toy_images

from sau import pgd
from sau.data.batches import Batches
from sau.defense import AT, DEFENSES, FT, NAD, SAU, SAUSAM, checks
from sau.defense.checks import lines, verdict_of
from sau.loop import RunContext
from sau.models import PreActResNet18
from sau.pgd import SharedPatches, SharedWarps, likely_classes


@pytest.mark.parametrize("defense", [SAU, AT])
def test_published_settings_hold_where_they_were_published(defense: type) -> None:
    assert defense().adapted(PreActResNet18(10, 4), 2500) == defense()
    assert defense().adapted(tiny_net(), 2500) != defense()
    assert defense().adapted(PreActResNet18(10, 4), 500) != defense()


@pytest.mark.parametrize("name", [name for name, defense in DEFENSES.items() if defense.lengths])
@pytest.mark.parametrize("images", [60, 100, 500, 1500])
def test_few_images_make_about_as_many_updates_as_published_ones(name: str, images: int) -> None:
    method = DEFENSES[name]()
    fitting = method.adapted(PreActResNet18(10, 4), images)
    assert 32 <= fitting.batch_size <= method.batch_size
    if isinstance(method, SAU | AT):
        return
    published, net, usual = -(-2500 // method.batch_size), PreActResNet18(10, 4), {"batch_size": method.batch_size}
    given = [replace(method, batch_size=size).fitted(usual, net, images, print) for size in (32, 64)]
    for each in (fitting, *given):
        now = len(Batches(torch.zeros(images, 1), (), each.batch_size))  # 100 images make 3, of 32, 32 and 36
        for length in method.lengths:
            updates = (20 if name == "sau-sam" else getattr(method, length)) * published
            assert updates <= getattr(each, length) * now < updates + now, length
    assert [each.batch_size for each in given] == [32, 64]
    assert method.adapted(PreActResNet18(10, 4), 1900) == method


def test_the_rate_follows_from_the_weights() -> None:
    large, small = nn.Linear(10, 10), nn.Linear(10, 10)
    nn.init.constant_(large.weight, 1.0), nn.init.constant_(small.weight, 0.01)
    assert [SAU().adapted(nn.Sequential(net), 100).lr for net in (large, small)] == [1.5e-3, 4e-4]
    assert [SAUSAM().adapted(PreActResNet18(10, width), 100).lr for width in (4, 16)] == [0.0025, 0.01]
    without = SAUSAM().adapted(nn.Sequential(large), 2500)
    assert (without.client_optimizer, without.lr, without.epochs) == ("adam", 3e-3, 20)
    found = [DEFENSES["rnp"]().adapted(nn.Sequential(large), images) for images in (100, 500, 2500)]  # 500 as published
    assert [(method.batch_size, method.unlearning_lr) for method in found] == [(52, 0.01), (256, 0.01), (256, 0.001)]


def test_most_images_get_a_patch_where_published_settings_do_not_hold() -> None:
    plain = nn.Conv2d(3, 4, 3)
    for count, expected in ((1899, (0.65, 0.2, 0.8, 0.3)), (1900, (0.8, 0, 0, 0.3)), (100, (0.8, 0, 0, 0))):
        found = SAU().adapted(nn.Sequential(plain, *[nn.BatchNorm2d(4)] * (count > 100)), count)
        assert (found.patches, found.warps, found.distill, found.weight_adv, found.pgd_init) == (*expected, "max")
    few, enough = (SAU().adapted(PreActResNet18(10, 4), count) for count in (1899, 1900))
    assert (few.patches, few.epochs, few.lr, few.weight_shared, few.clamp_loss) == (0.5, 7, 7.5e-4, 2.0, False)
    assert enough == SAU()


def test_shared_patches_are_as_small_as_a_trigger_and_lead_both_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgd, "STEPS", 60)
    net, _, (x, y), _ = planted()
    torch.manual_seed(0)
    patches = SharedPatches(net.requires_grad_(False), x, y)
    descent, other, sizes, first = patches.descent(), planted()[0], [], patches.first_masks.clone()
    for _ in range(60):
        patches.ascend((net, other), descent, x)
        sizes.append((masks := patches.patches()[0].detach()).flatten(1).sum(1))
    _, moving, whole = (torch.stack([sizes[-1], torch.stack(sizes[30:]).mean(0)]) < 1.5 * patches.limits).chunk(3, 1)
    assert patches.limits[0] < 3 and bool(moving[0].all() and whole[1].all()) and torch.equal(first, masks.chunk(3)[0])
    assert bool((masks.chunk(3)[2] == masks.chunk(3)[2][..., :1, :1]).all())  # one value for all pixels
    for number in (0, len(first), 2 * len(first)):
        led = [each(patches.stamp(x, 0 * y + number)).argmax(1) == 0 for each in (net, other)]
        assert min(float(one.float().mean()) for one in led) > 0.45 > 1.5 * float((y == 0).float().mean())
    shares = patches.ends.diff(prepend=torch.zeros(1)).view(3, -1)
    assert shares.sum(1).allclose(torch.tensor(1 / 3)) and shares[0][patches.classes[: len(first)] == 0].sum() > 1 / 6


def test_the_shared_warp_of_a_class_moves_pixels_as_far_as_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second class is that of bright images: on a ramp each pixel comes from the one to its right."""
    monkeypatch.setattr(pgd, "STEPS", 60)
    net, ramp = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), (torch.arange(8) / 8).expand(12, 3, 8, 8)
    nn.init.constant_(net[1].weight[0], 0.0), nn.init.constant_(net[1].weight[1], 1.0)
    net[1].bias = nn.Parameter(torch.tensor([0.0, -2 * ramp[0].sum()]))  # no image is bright enough
    warps = SharedWarps(net.requires_grad_(False), ramp, torch.zeros(12, dtype=torch.long))
    assert (warps.fields[1, 0] == 1).all() and warps.fields.abs().max() == 1 and warps.ends[0] > 0.99
    moved = warps.warp(ramp, torch.ones(12, dtype=torch.long))
    assert torch.allclose(moved, torch.cat([ramp[..., 1:], ramp[..., -1:]], 3))


def test_some_images_get_a_patch_or_a_warp_and_the_others_a_change_within_the_ball() -> None:
    x, y = torch.rand(20, 3, 8, 8), torch.arange(20) % 4
    net = tiny_net().eval()
    method = SAU(patches=0.3, warps=0.2, eps=0.01, adv_lr=0.01)
    state = method.prepare(net, [(x, y)])
    first = [state["patches"].masks.clone(), state["warps"].fields.clone()]
    delta, s = method.search(state, x, y, net(x).argmax(1), net(x).argmax(1))
    assert (delta[:10].abs().flatten(1).amax(1) > 0.02).all() and delta[10:].abs().max() <= 0.0101
    assert torch.equal(s, net(x + delta).argmax(1))
    assert not any(map(torch.equal, first, (state["patches"].masks, state["warps"].fields)))


def test_a_loader_s_own_batches_are_counted() -> None:
    assert SAU().adapted(tiny_net(), 40, 3).epochs == 168 and NAD().adapted(tiny_net(), 40, 3).te_epochs == 34
    x, y = torch.rand(100, 3, 8, 8), torch.arange(100) % 4
    some = DataLoader(TensorDataset(x, y), batch_size=16, sampler=SubsetRandomSampler(range(40)))
    assert first_line(SAU(), some).startswith("504 updates at 0.0015 (OneCycleLR): 40 images")


def first_line(method: Any, images: Any = None, **how: Any) -> str:
    lines: list[str] = []
    images = toy_images(40) if images is None else images
    with pytest.raises(KeyboardInterrupt):
        method.purify(tiny_net(), images, session=RunContext(say=lines.append, on_epoch=stop), **how)
    return next(line for line in lines if " updates at " in line)


@pytest.mark.parametrize(("method", "images", "right", "few"), [
    (AT(), 100, 0.97, False), (AT(), 99, 0.97, True), (AT(), 143, 0.9, True), (AT(), 2500, 0.9, False),
    (FT(), 143, 0.97, True), (SAU(), 143, 0.97, True),
])  # fmt: skip
def test_the_first_line_says_that_images_are_few(method: Any, images: int, right: float, few: bool) -> None:
    """100 to 1,000 images of CIFAR-10 cost other networks up to 15 points of ACC (docs/results/own_networks.md)."""
    assert ("which are few" in method.plan(images, [None], right)) == few


def stop(*_: Any) -> dict[str, float]:
    raise KeyboardInterrupt


def test_what_the_user_gives_stands() -> None:
    assert first_line(SAU()).startswith("500 updates at 0.0015 (OneCycleLR): 40 images")
    assert first_line(SAU(eps=0.1)).startswith("500 updates")
    assert first_line(SAU(batch_size=64)).startswith("500 updates at 0.0015")  # the rest adapts to it
    assert first_line(SAU(epochs=7)).startswith("7 updates at 0.0001 (constant)")
    assert first_line(SAU(lr=0.01, lr_scheduler="CosineAnnealingLR", min_lr=5e-3)).startswith("100 updates at 0.01")
    assert first_line(SAU(min_lr=5e-5)).startswith("100 updates at 0.0001")
    assert first_line(SAU(), settings="as_given").startswith("100 updates at 0.0001")
    searched = [first_line(method, **how).endswith("patches are searched")
                for method in (SAU(), SAUSAM()) for how in ({}, {"settings": "as_given"})]  # fmt: skip
    assert searched == [True, False, True, True] and first_line(FT()).startswith("1,000 updates at 0.01")
    said, few = list[str](), PreActResNet18(10, 4)
    small = SAU(batch_size=64).fitted({"batch_size": 256}, few, 150, said.append)
    assert (small.batch_size, small.epochs, small.patches) == (64, 84, 0.5) and "epochs 84, lr " in said[0]
    for count in (150, 2500):  # the published count has nothing to adapt and to say
        assert SAU(lr=0.01).fitted({"lr": 1e-4}, few, count, said.append) == SAU(lr=0.01)
        assert said[1].startswith("warning: ") and said[1].endswith("because you gave lr") and len(said) == 2


def test_the_verdict_tells_a_backdoor_that_stayed_from_one_that_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pgd, "STEPS", 60)
    net, _, (x, y), _ = planted()
    kept = verdict_of(planted()[0], net, x, y, print)
    assert kept["doubts"] and lines(kept)[0].startswith("warning: the backdoor may stay: a small patch")
    fixed = planted()[0]
    with torch.no_grad():
        fixed[0].weight[5] = 0.0  # the channel that answers to the red corner
    gone = verdict_of(planted()[0], fixed, x, y, print)
    assert gone["after"] > 1.5 * kept["after"] and not gone["doubts"]
    assert min(gone["before"], kept["before"]) < 9.5  # the corner has 9 pixels
    two = (torch.arange(2), torch.ones(2), torch.ones(2), torch.tensor([1.0, 40.0]))  # classes, masks, patterns, sizes
    monkeypatch.setattr(checks, "patch_of_each_class", lambda *given: two)
    monkeypatch.setattr(checks, "smallest_patches", lambda *given: (None, None, torch.tensor([19.0])))
    assert (found := verdict_of(net, fixed, x, y, print))["doubts"] and found["typical"] == 40.0


@pytest.mark.parametrize(("given", "holds", "searched"), [
    (64, 240, [160, 60]), (16, 64, [64, 16]), (16, 32, [64, 32, 32, 16]), (16, 9, [64, 32, 16]),
])  # fmt: skip
def test_the_verdict_looks_at_few_images(given: int, holds: int, searched: list[int], monkeypatch: Any) -> None:
    """Of all classes at once, or of half of them at a time where memory `holds` fewer, or there is no verdict."""
    counts, said, search = list[int](), list[str](), pgd.smallest_patches

    def counted(networks: Any, share: float, x: torch.Tensor, y: Any, classes: torch.Tensor, *more: Any) -> Any:
        counts.append(len(x) * len(classes))
        if counts[-1] > holds:
            raise torch.OutOfMemoryError("out of memory")
        return search(networks, share, x, y, classes, *more)

    for module in (pgd, checks):
        monkeypatch.setattr(module, "smallest_patches", counted)
    found = verdict_of(tiny_net(), tiny_net(), torch.rand(given, 3, 8, 8), torch.arange(given) % 4, said.append)
    assert counts == searched and [*found.get("sizes", "")] == ["0", "1", "2", "3"] * (holds > 9)
    assert said[-1].startswith("warning: no verdict") == (holds == 9)


def test_the_verdict_is_recorded_and_does_not_move_the_result() -> None:
    images, session = toy_images(40), quiet()
    one = FT(epochs=1).purify(tiny_net(), images, session=session)
    torch.rand(3)
    other = FT(epochs=1).purify(tiny_net(), images, session=quiet())
    assert {"before", "after", "typical", "doubts", "sizes"} == session.findings["verdict"].keys()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_many_classes_are_searched_where_images_lead() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 30)).eval()
    with torch.no_grad():
        net[1].bias[7] = 0.5
    classes = likely_classes(net, torch.rand(12, 3, 4, 4), torch.zeros(12, dtype=torch.long))
    assert len(classes) == pgd.CLASSES and 7 in classes
