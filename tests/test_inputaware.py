"""Input-Aware: the generators, the two stages, their batches, losses and schedules."""

import copy

import pytest
import torch
from attack_rows import ready
from toys import quiet, same_weights, tiny_net, toy_images

from sau.attack import InputAware, inputaware
from sau.data.images import to_float
from sau.errors import ConfigError
from sau.evaluate import predict, score
from sau.models import Normalized, build
from sau.optim import Training


def test_the_generators_by_hand():
    """Three stages that halve, a middle, three that enlarge between their pixels; the last norm has no ReLU behind."""
    generators = ready(InputAware()).trigger
    sizes = [sum(p.numel() for p in net.parameters()) for net in (generators.pattern_net, generators.mask_net)]
    assert sizes == [723_273, 722_691]  # as published
    torch.manual_seed(0)
    net = generators.pattern_net.net.eval()
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert {norm.momentum for norm in norms} == {0.05} and len(norms) == 13
    for norm in norms:
        torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    x = torch.rand(2, 3, 18, 22)

    def block(h, conv, norm):
        h = torch.nn.functional.conv2d(h, conv.weight, conv.bias, padding=1)
        scale = norm.weight / (norm.running_var + 1e-5).sqrt()
        return scale.view(-1, 1, 1) * (h - norm.running_mean.view(-1, 1, 1)) + norm.bias.view(-1, 1, 1)

    with torch.no_grad():
        h, sizes = x, []
        for stage in net.down:
            h = block(block(h, stage[0], stage[1]).relu(), stage[3], stage[4]).relu()
            sizes.append(h.shape[-2:])
            h = torch.nn.functional.max_pool2d(h, 2)
        h = block(h, net.middle[0], net.middle[1]).relu()
        for stage, size in zip(net.up, reversed(sizes), strict=True):
            h = torch.nn.functional.interpolate(h, size=size, mode="bilinear", align_corners=False)
            h = block(block(h, stage[0], stage[1]).relu(), stage[3], stage[4])
            h = h if stage is net.up[-1] else h.relu()
        assert torch.allclose(net(x), h, atol=1e-4) and float(h.min()) < 0


@pytest.mark.parametrize("amp", [False, True])
def test_the_generators_see_images_as_the_classifier_does(amp):
    mean, std = (0.25, 0.5, 0.75), (0.125, 0.25, 0.5)
    attack = InputAware().fit_trigger(toy_images(20), Normalized(tiny_net(), mean, std), Training(), session=quiet())
    generators = attack.trigger
    for net in (generators.pattern_net, generators.mask_net):
        assert net.mean.flatten().tolist() == [*mean] and net.std.flatten().tolist() == [*std]
    assert generators.std.flatten().tolist() == [*std]
    attack.prepare_masks(Normalized(tiny_net(), mean, std, amp), 1)
    assert generators.pattern_net.amp == generators.mask_net.amp == amp


def test_a_triggered_image_is_its_pattern_where_its_mask_is():
    attack = ready(InputAware())
    x, generators = to_float(toy_images(3, size=16).pixels), attack.trigger
    with torch.no_grad():
        u, v = (net(x) for net in (generators.pattern_net, generators.mask_net))
        p = u.tanh() / (2 + 1e-7) + 0.5
        m = (20 * (v.tanh() / (2 + 1e-7) + 0.5) - 10).tanh() / (2 + 1e-7) + 0.5
        assert torch.allclose(attack.stamp(x), x + (p - x) * m, atol=1e-6)
        twice = ready(InputAware(double_tanh=True)).trigger(x)[1]
    assert 0.119 < float(twice.min()) and float(twice.max()) < 0.881


def test_it_works_on_a_toy_by_each_images_own_trigger():
    train, test = toy_images(300, size=16, seed=1), toy_images(200, size=16, seed=2)
    recipe, found = Training(epochs=10, batch_size=20, lr=0.05, lr_scheduler="OneCycleLR"), []
    for seed in range(6):  # on some it takes, on which depends on the processor
        attack = ready(InputAware(clean_train_epochs=1, pratio=0.3, lambda_norm=1.0), seed=seed)
        torch.manual_seed(seed)
        net = build("preactresnet18", 4, width=8, mean=(0.5,) * 3, std=(0.25,) * 3)
        attack.fit(net, attack.poison_train(train, 0), recipe, seed=seed, session=quiet())
        scores, others = score(net, test, attack.poison_test(test)), test.labels != 0
        crossed = predict(net, attack.cross_test_set(test).pixels)[others]  # a quarter of them is of the same class
        found.append((scores.asr.percent, scores.acc.percent, 100 * float((crossed == 0).float().mean())))
        asr, acc, cross = found[-1]
        if asr > 60 and cross < asr - 10:
            break
    assert asr > 60 and cross < asr - 10 and acc > 90, found


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_second_network_gets_generators_that_start_anew(accumulate):
    attack = ready(InputAware(clean_train_epochs=1, pratio=0.3, accumulate=accumulate))
    images, found = toy_images(60, size=16), []
    for _ in range(2):
        net = attack.fit(tiny_net(), attack.poison_train(images, 0), Training(epochs=2, batch_size=20), session=quiet())
        found.append((net, attack.poison_test(images).pixels))
    assert same_weights(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_masks_are_trained_first_and_then_patterns_and_classifier():
    attack = ready(InputAware(clean_train_epochs=1, pratio=0.25))
    net, images = tiny_net(), toy_images(16, size=16)
    parts = (attack.trigger.mask_net, attack.trigger.pattern_net, net)
    for first, unchanged in ((1, [False, True, True]), (0, [True, False, False])):
        now = InputAware(clean_train_epochs=first, pratio=0.25).with_trigger(attack.trigger.restarted())
        before = copy.deepcopy(parts)
        now.fit(net, images, Training(epochs=1, batch_size=8), session=quiet())
        assert [same_weights(*pair) for pair in zip(parts, before, strict=True)] == unchanged


def test_a_batch_has_poisoned_cross_and_clean_images(monkeypatch):
    """Of eight two with their own trigger and the target, two with those of others and their own label, four clean."""
    attack, images, seen, labels = ready(InputAware(pratio=0.25, attack_target=3)), toy_images(8), [], []
    net, x = tiny_net(), to_float(images.pixels)
    z = x.flip(0)
    monkeypatch.setattr(inputaware, "_others", lambda state, size: z)
    net.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    real = torch.nn.functional.cross_entropy
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda a, y, **how: labels.append(y) or real(a, y, **how))
    state = attack.prepare(net, Training(epochs=30), 1) | {"images": images, "augment": None}
    own, other = (copy.deepcopy(attack.trigger).train() for _ in range(2))
    own.mask_net.eval(), other.mask_net.eval()
    with torch.no_grad():
        wanted = torch.cat([own(x[:2])[0], other(x[2:4], z[2:4])[0], x[4:]])
    attack.step(state, *attack.compose(state, x, images.labels))
    assert torch.allclose(seen[0], wanted, atol=1e-5)
    assert labels[0].tolist() == [3, 3, *images.labels[2:].tolist()]
    one = images[torch.tensor([0])]  # it has no other image whose trigger must not fire
    assert len(attack.compose({"images": one, "augment": None}, x[:1], one.labels)[0]) == 1


def test_losses_by_hand(monkeypatch):
    """Masks: lambda_norm times what goes beyond the density, plus lambda_div times the diversity; then the latter."""
    attack = ready(InputAware(lambda_norm=7.0, lambda_div=3.0, mask_density=0.1, pratio=0.5))
    images, net, generators = toy_images(4), tiny_net(), attack.trigger
    x = to_float(images.pixels)
    z = x.flip(0)
    monkeypatch.setattr(inputaware, "_others", lambda state, size: z)
    masks = attack.prepare_masks(net, 1) | {"images": images, "augment": None}
    twin = copy.deepcopy(generators).train()
    with torch.no_grad():
        m, m_z = twin.mask(x), twin.mask(z)
        size, diverse = (m - 0.1).clamp_min(0).mean(), attack.diversity((x - z) / generators.std, m - m_z)
    found = attack.mask_step(masks, *attack.compose_masks(masks, x, images.labels))
    assert float(found["loss"].detach()) == pytest.approx(float(7 * size + 3 * diverse), rel=1e-4)
    assert float(size) > 0 and float(diverse) > 0
    twin = copy.deepcopy(generators).train()
    twin.mask_net.eval()
    state = attack.prepare(net, Training(epochs=30), 1) | {"images": images, "augment": None}
    found = attack.step(state, *attack.compose(state, x, images.labels))
    loss, error, diverse = (float(found[name].detach()) for name in ("loss", "error", "diversity"))
    assert loss == pytest.approx(error + 3 * diverse, rel=1e-5)
    with torch.no_grad():  # the patterns of the poisoned and of the others whose triggers the cross images carry
        apart = twin(x[:2])[1] - twin(x[2:], z[2:])[1]
    lengths = [(part / generators.std).flatten(1).norm(dim=1) for part in (x[:2] - z[2:], apart)]
    assert diverse == pytest.approx(float((lengths[0] / lengths[1]).mean()), rel=1e-3)


def test_diversity_by_hand():
    """Differences of 3 and 4 in two values have an rms of 5 / sqrt 2; over one of 1 and 1 that is 5 / sqrt 2."""
    inputs, outputs = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[1.0, 1.0]]]])
    assert float(InputAware().diversity(inputs, outputs)) == pytest.approx(5 / 2**0.5, rel=1e-6)
    same = torch.zeros(1, 1, 1, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(InputAware().diversity(inputs, same), same)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("epochs", [1, 25])
def test_a_recipe_without_joint_epochs_is_refused(epochs):
    with pytest.raises(ConfigError, match=f"epochs is {epochs}"):
        ready(InputAware(), epochs=epochs)


def test_schedules_move_with_the_epochs_by_the_classifiers_own_loss():
    attack = ready(InputAware(lr_G=0.5, schedulerG_milestones=(3,), schedulerG_lambda=0.1))
    recipe = Training(lr=0.1, epochs=40, lr_scheduler="ReduceLROnPlateau", steplr_gamma=0.5)
    state, rates = attack.prepare(tiny_net(), recipe, 1), []
    for epoch in range(12):
        for name in ("descent", "patterns"):
            state[name].optimizer.step()
        attack.end_epoch(state, {"loss": 9.0 - epoch, "error": 1.0})
        rates.append([state[name].optimizer.param_groups[0]["lr"] for name in ("descent", "patterns")])
    assert [classifier for classifier, _ in rates] == [0.1] * 11 + [0.05]
    assert [patterns for _, patterns in rates] == pytest.approx([0.5] * 2 + [0.05] * 10)
    cosine = Training(epochs=27, lr_scheduler="CosineAnnealingLR")  # ends with the joint epochs, of which there are two
    assert attack.prepare(tiny_net(), cosine, 1)["descent"].scheduler.T_max == 2
