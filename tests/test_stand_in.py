"""Every method on CUDA, which a stand-in plays: nothing is left behind on the CPU, nothing comes out different."""

import contextlib
import copy
import json

import pytest
import torch
from attack_rows import each_poison
from defense_rows import each
from stand_in import stand_in
from torch import nn
from toys import quiet, same_weights, tiny_net, toy_images

from sau.attack import SSBA, Attack, BadNet
from sau.evaluate import Score, score
from sau.optim import Training
from sau.report.results import COST

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="plays a card where there is none")
DEVICES = {"cpu": contextlib.nullcontext, "cuda": stand_in}


def test_the_stand_in_refuses_what_cuda_refuses():
    here, net = torch.rand(2, 3), nn.Linear(3, 3)
    with stand_in():
        there = here.to("cuda")
        assert there.device.type == (there + 1).device.type == torch.zeros(2, device="cuda").device.type == "cuda"
        assert there.is_cuda and not there.cpu().is_cuda and not here.is_cuda
        assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2)  # a number may come from anywhere
        assert there[torch.tensor([0])].is_cuda  # and so may an index
        for refused in (
            lambda: there + here,
            lambda: net(there),
            lambda: here[there.argmax(1)],
            lambda: torch.cat([here, there]),
            lambda: torch.rand(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError):
                refused()
        with pytest.raises(TypeError):
            there.numpy()
        net.to("cuda")(there).sum().backward()
        assert net.weight.is_cuda and net.weight.grad.is_cuda
        assert copy.deepcopy(net).weight.is_cuda
    assert not torch.zeros(1).is_cuda


@each
def test_defenses_purify_on_the_device_of_the_network(defense):
    images, net = toy_images(40), tiny_net()
    given = BadNet(pratio=0.2).poison_train(images, 0) if defense.data_use == "poisoned" else images
    found = []
    for device, there in DEVICES.items():
        with there():
            purified = defense.purify(copy.deepcopy(net).to(device), given, seed=1, session=quiet())
            assert {value.device.type for value in purified.state_dict().values()} == {device}
            found.append(purified.to("cpu"))
    assert same_weights(*found)


@each_poison
def test_attacks_train_and_are_measured_on_their_device(attack):
    found = [trained(attack, device) for device in DEVICES]
    assert same_weights(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def trained(attack: Attack, device: str) -> tuple[nn.Module, Score]:
    """From the making of the trigger to the figures."""
    recipe = Training(epochs=2, batch_size=20, lr=0.05)
    more = {"ssba_epochs": 1, "ssba_batch_size": 8} if isinstance(attack, SSBA) else {}
    with DEVICES[device]():
        images, net = toy_images(40).to(torch.device(device)), tiny_net().to(device)
        attack = type(attack)(**{**attack.params(), **more}).fit_trigger(images, net, recipe, seed=0, session=quiet())
        net = attack.fit(net, attack.poison_train(images, 0), recipe, seed=0, session=quiet())
        figures = score(net, images, attack.poison_test(images))
        return net.to("cpu"), figures


@pytest.mark.usefixtures("few_digits")
def test_the_command_line_on_the_device(here, tmp_path):
    """Training, checkpoints, risks, evaluation, and the folder read again, with the figures of the CPU."""
    quick = ("--threads", "1", "--amp", "false", "--eval_every", "1")
    victim = ("--dataset", "digits", "--recipe", "cpu", "--width", "4", "--epochs", "2", "--save_folder_name", "a")
    purify, found = ("--result_file", "a", "--epochs", "2"), []
    for device, there in DEVICES.items():
        how = (*quick, "--device", device, "--record_root", str(tmp_path / device))
        with there():
            assert here("attack", "badnet", *victim, *how)[0] == 0
            assert here("defense", "npd", *purify, "--warm_epochs", "1", *how)[0] == 0  # reads its own checkpoint
            assert here("defense", "sau", *purify, "--track_risk", "true", *how)[0] == 0
        folder = tmp_path / device / "a"
        assert f"device: {device}" in (folder / "config.yaml").read_text()
        sums = [
            json.loads((place / "summary.json").read_text())
            for place in (folder, *sorted(folder.glob("defense/[!.]*")))
        ]
        found.append([{name: value for name, value in one.items() if name not in COST} for one in sums])
    assert found[0] == found[1]
