"""NPD, Neural Polarizer Defense (Zhu, Wei, Zha, Wu, NeurIPS 2023): one new layer in a frozen network that lets clean
features through and filters the trigger's out.

The polarizer, a 1x1 convolution (first the identity) and a batch norm, is put before one convolution of the network;
nothing else is trained. What the trigger looks like is not known, so perturbations towards the runner-up class stand in
for it. With f the network that holds the polarizer, p its softmax, c = argmax f(x) and r the class after it,

    inner   d = argmin CE(f(x + d), r)                          over |d|_2 <= eps, x + d in [0, 1]
    outer   min  l1 * CE(f(x), y)  +  l2 * CE(f(x + d), c)
                 -  l3 * log(1.0001 - max_{k != c} p_k(x + d))  -  l4 * log(1.0001 - p_r(x + d))

The convolution L becomes Sequential(polarizer, norm, layer = L); `restore_polarizer` loads such a network again. The
polarizer cannot be folded into L: L pads with zeros after the batch norm's shift, so a shift folded into its bias would
be wrong along the border.
"""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.config import param
from sau.defense.base import TrainingDefense
from sau.errors import ConfigError
from sau.loop import RunContext
from sau.models.normalized import resolve_layer
from sau.optim import Training
from sau.pgd import Ball, Norm, pgd, require_radius
from sau.types import Batched, Change, Labels, Logits, PerImage, Pixels, Scalar

MARK = ".polarizer.weight"  # ends the state-dict key that only a network with a polarizer has
FOOLED = 0.6  # share of a batch that must have reached the runner-up for the search to stop


class NPD(TrainingDefense):
    """Train a linear layer in the frozen network to filter perturbations towards the second most likely class."""

    name = "npd"
    lengths = ("epochs", "warm_epochs")
    gradients = "images"
    ignored = {
        **dict.fromkeys(("target_lab", "target_class"), "the attacked class is not known; the runner-up stands in"),
        **dict.fromkeys(("model_name", "use_residual"), "the polarizer is a 1x1 convolution with a batch norm"),
        "max_init": "the search starts at zero",
        "print_freq": "every round is said",
    }

    epochs: int = 50
    batch_size: int = 128
    target_layer_name: str = param("layer4.1.conv1", "the convolution before which the polarizer goes")
    warm_epochs: int = param(5, "epochs before the others, on clean images alone", ge=0)
    warm_lr: float = param(1e-4, "constant learning rate of the warm epochs", gt=0)
    weight_clean: float = param(1.0, "l1, of the clean loss", ge=0, aliases=("lmd1",))
    weight_adv: float = param(0.4, "l2, of the perturbed images' cross-entropy", ge=0, aliases=("lmd2",))
    weight_wrong: float = param(0.4, "l3, of the log that keeps other classes down", ge=0, aliases=("lmd3",))
    weight_target: float = param(0.4, "l4, of the log that keeps the runner-up down", ge=0, aliases=("lmd4",))
    eps: float = param(3.0, "radius of the ball, in [0, 1] pixels; in L_inf below 1", gt=0, aliases=("trigger_norm",))
    norm: Norm = param("L2", "norm of the ball; Reg means no ball", aliases=("norm_type",))
    adv_lr: float = param(0.1, "step of the search, as `eps`; every norm uses sign steps", gt=0)
    adv_steps: int = param(2, "steps, until 60 % of a batch are at the runner-up", ge=1, aliases=("inner_steps",))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eps", "adv_lr"):
            require_radius(name, getattr(self, name), self.norm)

    def run(self, model: nn.Module, batches: Batched, session: RunContext) -> None:
        model.eval().requires_grad_(False)
        state = self.prepare(model, batches)
        loop.run(
            partial(self.warm_step, state), batches, self.warm_epochs, state=state,
            session=session, label="warm-up", rate="warm_lr",
        )  # fmt: skip
        self.train(state, batches, session.for_stage(1))
        model.requires_grad_(True)

    def prepare(self, model: nn.Module, batches: Batched) -> dict[str, Any]:
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
        advice = f"name a convolution (Conv2d) with --target_layer_name, like {', '.join(names[-1:]) or 'none here'}"
        name = resolve_layer(model, self.target_layer_name, advice)
        polarizer, norm, _ = insert_polarizer(model, name)
        trained = [*polarizer.parameters(), *norm.parameters()]
        warm = Training(lr=self.warm_lr, lr_scheduler="constant", sgd_momentum=self.sgd_momentum, wd=self.wd)
        descents = {"warm": warm.descent(trained, len(batches)), "descent": self.descent(trained, len(batches))}
        return {"model": model, "_norm": norm, **descents}

    def warm_step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """Clean images alone, mostly to fill the running statistics of the new batch norm."""
        state["_norm"].train()
        loss = F.cross_entropy(state["model"](x), y)
        state["_norm"].eval()
        state["warm"](loss)
        return {"loss": loss}

    def step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        model, norm = state["model"], state["_norm"]
        with torch.no_grad():
            answer, runner_up = model(x).topk(2).indices.unbind(1)
        delta = self.search(model, x, runner_up)
        norm.train()  # the batch's statistics here, the running ones in the search and in use
        z, z_adv = model(torch.cat([x, x + delta])).chunk(2)  # apart, the running ones would be those of neither
        norm.eval()
        clean, (adv, wrong, target) = F.cross_entropy(z, y), held_losses(z_adv, answer, runner_up)
        loss = self.weight_clean * clean + self.weight_adv * adv
        loss = loss + self.weight_wrong * wrong + self.weight_target * target
        state["descent"](loss)
        return {"loss": loss, "clean_loss": clean, "adv_loss": adv, "fooled": (z_adv.argmax(1) != answer).sum()}

    def search(self, model: nn.Module, x: Pixels, target: Labels) -> Change:
        """Sign steps down CE(f(x + d), target), from 0, inside the ball and the pixels."""

        def closeness(d: Change) -> PerImage | None:
            z = model(x + d)
            if bool((z.argmax(1) == target).float().mean() > FOOLED):
                return None
            return -F.cross_entropy(z, target, reduction="none")

        ball = Ball(norm=self.norm, eps=self.eps, clip=True)
        return pgd(closeness, x, ball.start(x, "zero"), ball, steps=self.adv_steps, lr=self.adv_lr)


def held_losses(z: Logits, answer: Labels, target: Labels) -> tuple[Scalar, Scalar, Scalar]:
    """Of perturbed images: CE(., c), -log(1.0001 - max_{k != c} p_k) and -log(1.0001 - p_r), means over the batch."""
    p = z.softmax(1)
    other, attacked = p.scatter(1, answer[:, None], 0.0).amax(1), p.gather(1, target[:, None])[:, 0]
    return F.cross_entropy(z, answer), -(1.0001 - other).log().mean(), -(1.0001 - attacked).log().mean()


def insert_polarizer(model: nn.Module, name: str) -> nn.Sequential:
    """Put a new polarizer, the identity in front of a fresh batch norm, before the convolution `name` of `model`."""
    layer = model.get_submodule(name)
    if not isinstance(layer, nn.Conv2d):
        raise ConfigError(f"{name} is a {type(layer).__name__}; a polarizer goes before a convolution (Conv2d)")
    place, width = layer.weight, layer.in_channels
    polarizer = nn.Conv2d(width, width, 1, bias=False)
    nn.init.dirac_(polarizer.weight)
    parts = OrderedDict[str, nn.Module](polarizer=polarizer, norm=nn.BatchNorm2d(width), layer=layer)
    inside = nn.Sequential(parts).to(place.device, place.dtype).train(layer.training)
    names = [full for full, module in model.named_modules(remove_duplicate=False) if module is layer]
    for full in names:  # a layer may have several
        model.set_submodule(full, inside)
    return inside


def insert_polarizers(net: nn.Module, names: Iterable[str]) -> None:
    """Put polarizers into `net` where the state dict with these names has them and `net` a convolution."""
    layers = dict(net.named_modules())
    for place in (name.removesuffix(MARK) for name in names if name.endswith(MARK)):
        if isinstance(layers.get(place), nn.Conv2d):
            insert_polarizer(net, place)


def restore_polarizer(net: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """`net`, of the attacked network's architecture, with a state dict, of NPD or without polarizers."""
    insert_polarizers(net, weights)
    net.load_state_dict(weights)
    return net
