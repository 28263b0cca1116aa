"""`SAU().purify(model, loader)` on networks that its settings were not made for: the ASR falls, or a warning says not.

`python tests/test_own_networks.py docs/results/own_networks.jsonl` runs the whole table (hours on one core) and goes on
where the file ends; CIFAR-10 is looked for in SAU_DATA. Defenses may follow (`sau,sau-sam`) and data (`digits`,
`cifar10`, or `timm`, which is all of CIFAR-10 with networks of timm, in bf16 where the device has it).
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sau import pgd
from sau.attack import BadNet, Blended, WaNet
from sau.audit import measure
from sau.audit.runner import STAMPED
from sau.data.images import Images, to_float
from sau.data.sources import clean_subset, load, source
from sau.defense import DEFENSES
from sau.device import has_bf16
from sau.evaluate import predict, score
from sau.loop import RunContext
from sau.models import Normalized
from sau.optim import Training


def cnn(norm: bool) -> nn.Module:
    """Three convolutions with or without batch norm, and two linear layers."""
    layers: list[nn.Module] = []
    for before, after in ((3, 24), (24, 48), (48, 64)):
        normed = [nn.BatchNorm2d(after)] if norm else []
        layers += [nn.Conv2d(before, after, 3, padding=1), *normed, nn.ReLU(), nn.MaxPool2d(2)]
    head = (nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), *head)


class ViT(nn.Module):
    """A small vision transformer for images of `size` pixels, in patches of 4."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.net = torchvision.models.VisionTransformer(size, 4, 4, 4, 64, 128, num_classes=10)
        nn.init.trunc_normal_(self.net.heads.head.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


def mobilenet() -> nn.Module:
    """torchvision's, with torch's own momentum of batch norm: its 0.01 needs more updates than these victims get."""
    net = torchvision.models.mobilenet_v3_small(num_classes=10)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return net


def of_timm(name: str, **settings: Any) -> nn.Module:
    import timm  # of the extra `models`

    return timm.create_model(name, num_classes=10, **settings)


# From the size of the images to a network, and how its victim is trained.
NETWORKS: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any]]] = {
    "cnn": (lambda size: cnn(True), {"lr": 0.05}),
    "cnn_without_norm": (lambda size: cnn(False), {"lr": 2e-3, "client_optimizer": "adamw"}),
    "resnet18": (lambda size: torchvision.models.resnet18(num_classes=10), {"lr": 0.05}),
    "mobilenet_v3_small": (lambda size: mobilenet(), {"lr": 0.05}),
    "vit": (ViT, {"lr": 2e-3, "client_optimizer": "adamw"}),
}
ADAMW = {"lr": 1e-3, "client_optimizer": "adamw", "wd": 0.05}
TIMM: dict[str, tuple[Callable[[int], nn.Module], dict[str, Any]]] = {  # small, with strides for 32 pixels
    "timm_resnet18": (lambda size: of_timm("resnet18", channels=(32, 64, 128, 256)), {"lr": 0.05}),
    "timm_vit": (
        lambda size: of_timm(
            "vit_tiny_patch16_224", img_size=size, patch_size=4, embed_dim=128, depth=4, num_heads=4, mlp_ratio=2
        ),
        ADAMW,
    ),
    "timm_convnext": (  # a layer scale of 1e-6, as for 300 epochs, hardly learns in 12
        lambda size: of_timm(
            "convnext_atto", patch_size=2, dims=(32, 64, 128, 256), depths=(2, 2, 4, 2), ls_init_value=None
        ),
        ADAMW,
    ),
}
ATTACKS = {"badnet": BadNet, "blended": Blended}
POISONS = {**ATTACKS, "wanet": partial(WaNet, s=1.0)}  # twice the default strength, for 12 epochs
DATA = {"digits": (16, 40), "cifar10": (32, 10), "timm": (32, 12)}  # size of images, epochs of the victim
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SLOW = {"resnet18": {"digits": [200], "cifar10": [500]}, "vit": {"digits": [200], "cifar10": [500]}}
COUNTS = [100, 1000]  # clean images


def images(name: str) -> tuple[Images, Images]:
    """Training and test images: of `cifar10` a fifth of each."""
    every = load("digits" if name == "digits" else "cifar10", os.environ.get("SAU_DATA", "data"))
    return tuple(one[torch.arange(0, len(one), 5 if name == "cifar10" else 1)] for one in every)


def purified(network: str, attack: str, data: str, count: int, seed: int, defense: str = "sau") -> dict[str, Any]:
    """Train a victim, purify it with the defaults and measure both."""
    torch.manual_seed(seed)
    train, test = images(data)
    make, recipe = {**NETWORKS, **TIMM}[network]
    key = f"{network}_{attack}_{data}_{seed}"
    poison = POISONS[attack](pratio=0.1, attack_target=0)
    augment = source("cifar10").augment if data == "timm" else None
    recipe = Training(epochs=DATA[data][1], lr_scheduler="OneCycleLR", **recipe)
    net, lines = make(DATA[data][0]).to(DEVICE), []
    if data == "timm":
        net = Normalized(net, source("cifar10").mean, source("cifar10").std, amp=has_bf16(DEVICE)).to(DEVICE)
    session = RunContext(say=lines.append)
    poison = poison.fit_trigger(train, net, recipe, seed=seed, session=session)
    if key not in VICTIMS:
        VICTIMS.clear()
        poisoned, how = poison.poison_train(train, seed).to(DEVICE), {"augment": augment, "seed": seed}
        VICTIMS[key] = poison.fit(net, poisoned, recipe, session=session, **how)
    victim, triggered, test = VICTIMS[key], poison.poison_test(test).to(DEVICE), test.to(DEVICE)
    clean = clean_subset(train, ratio=count / len(train), seed=seed)
    pair = TensorDataset(to_float(clean.pixels), clean.labels)
    given: Any = clean if data == "timm" else DataLoader(pair, batch_size=32, shuffle=True)
    lines.clear()
    session = RunContext(say=lines.append)
    after = DEFENSES[defense]().purify(victim, given, augment=augment, session=session)
    figures, networks = dict[str, float](), {"before": victim, "after": after}
    for when, each in networks.items():
        shares = score(each, test, triggered).shares()
        figures |= {f"{name}_{when}": share.percent for name, share in shares.items() if share}
        figures[f"target_{when}"] = 100 * float((predict(each, test[test.labels != 0].pixels) == 0).float().mean())
    if data == "timm":  # re-learned from five triggered training images, as in an audit
        some = train[(train.labels != 0).nonzero().flatten()[:STAMPED]]
        poisons = poison.poison(some, torch.arange(len(some)))
        few = measure.mixture(train, poisons, 5, share=0.02, seed=seed, augment=augment)
        figures["asr_relearned"] = score(measure.relearn(after, few, seed=seed), test, triggered).asr.percent
    cell = {"network": network, "attack": attack, "data": data, "clean": count, "seed": seed, "defense": defense}
    warned = any(line.startswith("warning") and "memory" not in line for line in lines)
    return {**cell, "device": DEVICE.type, **figures, "warned": warned, **session.findings}


VERDICT_STEPS = pgd.STEPS  # conftest.py shortens the verdict
VICTIMS: dict[str, nn.Module] = {}  # the last one


def cells(sets: list[str]) -> Iterator[tuple[str, str, str, int, int]]:
    """Those of the table, the quick ones first."""
    for data in sets:
        timm = data == "timm"
        for seed in range(2 if timm else 3):
            for network in TIMM if timm else NETWORKS:
                for attack in (*ATTACKS, "wanet") if timm else ATTACKS:
                    for count in [2500] if timm else SLOW.get(network, {}).get(data, COUNTS):
                        yield network, attack, data, count, seed


def main(path: Path, defenses: str = "sau", sets: str = "digits,cifar10") -> None:
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    known = {tuple(row[name] for name in ("network", "attack", "data", "clean", "seed", "defense")) for row in done}
    for *cell, defense in ((*cell, defense) for cell in cells(sets.split(",")) for defense in defenses.split(",")):
        if (*cell, defense) not in known:
            row = purified(*cell, defense)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("network", ["cnn", "cnn_without_norm"])
@pytest.mark.parametrize("defense", ["sau", "sau-sam"])
def test_the_backdoor_of_an_own_network_is_removed_or_a_warning_stands_there(
    defense: str, network: str, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pgd, "STEPS", VERDICT_STEPS)
    row = purified(network, attack, "digits", 200, 5, defense)
    assert row["asr_before"] > 85
    assert row["asr_after"] <= 10 or row["warned"], row
    assert row["acc_before"] - row["acc_after"] <= 5, row


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
