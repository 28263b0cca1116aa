"""NAD: attention maps by hand, the layers that it finds, the teacher's ways in, and what the student learns."""

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import pair, quiet, refuses, said, same_weights, tiny_net

from sau.defense import FT, NAD
from sau.defense.nad import attention, attention_layers, features
from sau.errors import RecordError
from sau.models import Normalized, PreActResNet18, unwrapped
from sau.record.folder import Record

SMALL = {"batch_size": 8, "lr": 0.01, "augment": False}


def test_attention_by_hand():
    """p = 2: 1 + 9 and 4 + 1, length sqrt(125); p = 1: 1 + 3 and 2 + 1, length 5."""
    f = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, -1.0]]]], dtype=torch.float64)
    assert attention(f, 1.0).flatten().tolist() == pytest.approx([0.8, 0.0, 0.0, 0.6], abs=1e-6)
    assert attention(f, 2.0).flatten().tolist() == pytest.approx([10 / 125**0.5, 0, 0, 5 / 125**0.5], abs=1e-6)
    assert attention(f, 2.0).tolist() == attention(-f, 2.0).tolist()  # signs do not matter
    shorter = attention(1e-3 * f, 2.0).flatten()[0].item()  # 1e-6 is added to the length: 1e-5 / (125**0.5 e-6 + e-6)
    assert shorter == pytest.approx(10 / (125**0.5 + 1))


def test_the_loss_of_a_step_by_hand():
    """Two convolutions in float64; the maps and their distances are computed anew, image by picture."""
    torch.manual_seed(0)
    parts = ((nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(32, 3)) for _ in range(2))
    nets = [nn.Sequential(*layers).double() for layers in parts]
    x, y = torch.rand(5, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    defense = NAD(beta1=7.0, beta2=11.0, p=3.0, lr=1e-9, wd=0.0)
    state = {**defense.prepare(nets[0], range(1)), "teacher": nets[1].eval(), "weights": {"0": 7.0, "1": 11.0}}
    wanted = [0.0, 0.0]
    for picture in x:
        for level, part in enumerate((lambda net: net[0], lambda net: net[:2])):
            maps = [(part(net)(picture[None])[0].abs() ** 3).sum(0) for net in nets]
            student, teacher = (m / (m.square().sum().sqrt() + 1e-6) for m in maps)
            wanted[level] += (student - teacher).square().mean().item() / 5
    clean = F.cross_entropy(nets[0](x), y).item()
    report = defense.step(state, x, y)
    assert report["attention_loss"].item() == pytest.approx(7 * wanted[0] + 11 * wanted[1], rel=1e-9)
    assert report["loss"].item() == pytest.approx(clean + 7 * wanted[0] + 11 * wanted[1], rel=1e-9)


def test_features_are_taken_before_a_relu_in_place():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(F.relu(self.conv(x), inplace=True).mean((2, 3)))

    net, x = Net(), torch.rand(2, 3, 6, 6)
    logits, found = features(net, ["conv"], x)
    assert torch.equal(found["conv"], net.conv(x))
    torch.autograd.grad(logits.sum() + found["conv"].square().sum(), net.conv.weight)  # nothing was overwritten
    assert not net.conv._forward_hooks


def test_the_layers_of_networks():
    x = torch.rand(1, 3, 32, 32)
    assert attention_layers(PreActResNet18(width=4), x) == ["layer3", "layer4"]
    assert attention_layers(Normalized(PreActResNet18(width=4)), x) == ["net.layer3", "net.layer4"]
    resnet = unwrapped("resnet18", 10)
    assert attention_layers(resnet, torch.rand(1, 3, 64, 64)) == ["layer3", "layer4"]
    assert attention_layers(resnet, x) == ["layer2", "layer3"]  # layer4 has a single position left
    # As in torchvision's VGG: what is pooled to 1x1 and then blown up to 7x7 does not count.
    vgg = nn.Sequential(tiny_net().features[:5], nn.AdaptiveMaxPool2d(1), nn.AdaptiveAvgPool2d(7), nn.Flatten())
    assert attention_layers(vgg, x) == ["0.2", "0"]
    assert attention_layers(tiny_net(), x) == ["features.2", "features.4"]
    assert attention_layers(nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Flatten()), x) == ["0"]


def test_the_user_names_layers():
    model, x = Normalized(PreActResNet18(width=4)), torch.rand(1, 3, 32, 32)
    found = attention_layers(model, x, ("layer2", "net.layer4", "avgpool"))
    assert found == ["net.layer2", "net.layer4", "net.avgpool"]
    inside = nn.Sequential(nn.Identity(), PreActResNet18(width=4))  # as a wrapper of the user's has it
    assert attention_layers(inside, x, ("layer4",)) == ["1.layer4"]


def test_without_attention_the_student_is_fine_tuned():
    """It starts from the given network, not from the teacher; and attention changes it."""
    net, data = tiny_net(), pair()
    tuned = FT(epochs=2, lr_scheduler="constant", **SMALL).purify(net, data, session=quiet())
    off = NAD(te_epochs=3, epochs=2, beta1=0.0, beta2=0.0, **SMALL).purify(net, data, session=quiet())
    on = NAD(te_epochs=3, epochs=2, **SMALL).purify(net, data, session=quiet())
    assert same_weights(off, tuned) and not same_weights(on, tuned)
    assert int(on.features[1].num_batches_tracked) == 6  # three batches an epoch, each of them once
    assert all(not module._forward_hooks for module in on.modules())


def test_a_teacher_is_read_from_a_file_or_a_folder(tmp_path):
    """It is the teacher that would have been trained, so the student is the same."""
    whole = NAD(te_epochs=2, epochs=1, **SMALL).purify(tiny_net(), pair(), session=quiet())
    teacher = FT(epochs=2, lr_scheduler="constant", **SMALL).purify(tiny_net(), pair(), session=quiet())
    record = Record(tmp_path / "run")
    record.begin({}, {}, False)
    record.save_tensors("model", teacher.state_dict())
    record.finish({})
    for place in (record.path, record.path / "model.safetensors"):
        fixed, lines, _ = said(NAD(epochs=1, teacher_model_loc=str(place), **SMALL), tiny_net(), pair())
        assert same_weights(fixed, whole) and not any(line.startswith("teacher") for line in lines)


def test_a_teacher_that_is_none_is_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file(tiny_net(7).state_dict(), other)
    for place, words in {tmp_path: "not a result folder", other: "linear.weight has (7, 6)"}.items():
        with refuses(RecordError, words):
            NAD(teacher_model_loc=str(place)).purify(tiny_net(), pair(), session=quiet())
