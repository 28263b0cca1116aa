"""Networks: the layout that state dicts are exchanged in, and normalisation and precision inside the network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import tiny_net

from sau import models as zoo
from sau.errors import ConfigError
from sau.models import Normalized, PreActResNet18, build
from sau.models.normalized import to_channels_last

HALF = (0.5, 0.5, 0.5)


def batch_norm(name: str, n: int) -> list[tuple[str, tuple[int, ...]]]:
    entries = [(f"{name}.{part}", (n,)) for part in ("weight", "bias", "running_mean", "running_var")]
    return [*entries, (f"{name}.num_batches_tracked", ())]


def published(width: int, classes: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the benchmark's files."""
    found = [("conv1.weight", (width, 3, 3, 3))]
    inputs = width
    for stage in (1, 2, 3, 4):
        outputs = width * 2 ** (stage - 1)
        for block in (0, 1):
            name = f"layer{stage}.{block}"
            found += batch_norm(f"{name}.bn1", inputs)
            found += [(f"{name}.conv1.weight", (outputs, inputs, 3, 3))]
            found += batch_norm(f"{name}.bn2", outputs)
            found += [(f"{name}.conv2.weight", (outputs, outputs, 3, 3))]
            if stage > 1 and block == 0:
                found += [(f"{name}.shortcut.0.weight", (outputs, inputs, 1, 1))]
            inputs = outputs
    return [*found, ("linear.weight", (classes, 8 * width)), ("linear.bias", (classes,))]


@pytest.mark.parametrize(("width", "classes"), [(None, 10), (16, 10), (4, 43)])
def test_the_state_dict_has_the_published_names_shapes_and_order(width, classes):
    net = build("preactresnet18", classes, width=width, mean=HALF, std=HALF).net
    state = net.state_dict()  # neither mean nor std are among the exchanged weights
    assert [(name, tuple(tensor.shape)) for name, tensor in state.items()] == published(width or 64, classes)
    for name, tensor in state.items():
        assert tensor.dtype == (torch.int64 if name.endswith("tracked") else torch.float32)
    if width is None:
        assert sum(parameter.numel() for parameter in net.parameters()) == 11_171_146


def test_the_blocks_and_the_end_by_hand():
    """y = conv2(ReLU(bn2(conv1(a)))) + shortcut(a) with a = ReLU(bn1(x)), and + x where the shape stays; the logits are
    those of the mean of the last block's output, without a ReLU."""
    torch.manual_seed(0)
    net = PreActResNet18(num_classes=3, width=2)
    for block, inputs in ((net.layer1[0], 2), (net.layer2[0], 2)):
        x = torch.randn(4, inputs, 8, 8)
        before = x.clone()
        with torch.no_grad():
            a = F.relu(block.bn1(x))
            y = block.conv2(F.relu(block.bn2(block.conv1(a))))
            shortcut = block.shortcut(a) if inputs != y.shape[1] else x
            assert torch.allclose(block(x), y + shortcut, atol=1e-6)
        assert torch.equal(x, before)
    assert net.layer2[0].conv1.stride == (2, 2) and net.layer2[0].shortcut[0].stride == (2, 2)
    assert [stage[0].conv1.stride[0] for stage in (net.layer1, net.layer2, net.layer3, net.layer4)] == [1, 2, 2, 2]
    ends: list[torch.Tensor] = []
    net.layer4.register_forward_hook(lambda module, inputs, output: ends.append(output))
    with torch.no_grad():
        logits = net.eval()(torch.rand(3, 3, 32, 32))
    assert torch.allclose(logits, net.linear(ends[0].mean((2, 3))), atol=1e-6) and (ends[0] < 0).any()


def test_the_network_owns_its_normalisation():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    net, x = tiny_net(), torch.rand(5, 3, 16, 16)
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    model = Normalized(net, mean, std)
    assert torch.allclose(model(x), net(by_hand), atol=1e-6) and not {"mean", "std"} & set(model.state_dict())
    assert torch.equal(Normalized(net)(x), net(x))


def test_bf16_computes_in_bf16_and_answers_in_float32():
    torch.manual_seed(0)
    model = build("preactresnet18", 10, width=4, mean=HALF, std=HALF, amp=True).eval()
    inside = []
    model.net.linear.register_forward_hook(lambda module, inputs, output: inside.append(output.dtype))
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        rough = model(x)
        model.amp = False
        exact = model(x)
    assert inside == [torch.bfloat16, torch.float32] and rough.dtype == exact.dtype == torch.float32
    assert not torch.equal(rough, exact) and torch.allclose(rough, exact, atol=0.1)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


class Picky(nn.Module):
    """Takes images of 224x224 alone, and says so as one of torchvision's does."""

    def __init__(self, says: type[Exception]) -> None:
        super().__init__()
        self.says, self.norm = says, nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:] != (224, 224):
            raise self.says("wrong size")
        return self.norm(x)[:, :, ::56, ::56].flatten(1)


@pytest.mark.parametrize("says", [RuntimeError, AssertionError, ValueError])
def test_images_are_enlarged_for_networks_that_do_not_take_them_and_for_no_others(says, monkeypatch):
    net = Picky(says)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    monkeypatch.setattr(zoo, "unwrapped", lambda name, num_classes, width: net)
    assert build("any", 4, shape=(3, 224, 224), mean=HALF, std=HALF).net is net and net.training
    enlarged = build("any", 4, shape=(3, 32, 32), mean=HALF, std=HALF).net
    assert enlarged[1] is net and net.training and enlarged.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())  # the question moves none
    x = torch.rand(2, 3, 32, 32)
    large = F.interpolate(x, size=(224, 224), mode="bilinear", align_corners=False)
    assert torch.equal(enlarged[0](x), large) and torch.equal(enlarged.eval()(x), net(large))


@pytest.mark.parametrize(("wrong", "named"), [
    ({"std": (0.5, -0.1, 0.5)}, "std"),
    ({"mean": (0.5,)}, "each channel"),
    ({"name": "preactresnet19"}, "preactresnet18"),
    ({"width": 0}, "width"),
    ({"name": "resnet18", "width": 8}, "width"),
])  # fmt: skip
def test_wrong_settings_of_a_network_are_refused(wrong, named, unchecked):
    settings = {"name": "preactresnet18", "num_classes": 10, "mean": HALF, "std": HALF} | wrong
    with pytest.raises(ConfigError, match=named):
        build(settings.pop("name"), settings.pop("num_classes"), **settings)


@pytest.mark.parametrize(("inputs", "stride", "fast"), [(15, 2, False), (16, 2, True), (15, 1, True)])
def test_narrow_strided_shortcuts_keep_kernels_from_writing_past_their_memory(inputs, stride, fast):
    net = to_channels_last(nn.Sequential(nn.Conv2d(3, inputs, 3), nn.Conv2d(inputs, 4, 1, stride=stride)))
    assert net[0].weight.is_contiguous() is not fast


@pytest.mark.parametrize("stats", [(), (HALF, HALF)])
def test_a_network_that_changes_its_input_in_place_changes_nobodys_images(stats):
    x = torch.full((2, 3, 4, 4), -1.0)
    Normalized(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten()), *stats)(x)
    assert (x == -1).all()
