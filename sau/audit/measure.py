"""What brings a backdoor back, and where it still is: re-learning, the linear path, universal perturbations, and what
is left in the features.

Re-learning, RA (Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the Superficial Safety of
Backdoor Defense", NeurIPS 2024): a purified network is fine-tuned on few clean images, k of which are triggered
training images with the attacker's label.

Path (same paper), from the attacked weights W_b, s = 0, to the purified ones W_p, s = 1:

    W(s) = (1 - s) W_b + s W_p

Universal perturbation (Zhu, Liang, Wu, "Breaking the False Sense of Security in Backdoor Defense through
Re-Activation Attack", NeurIPS 2024): one D for all triggered images x~,

    min_D  mean CE(h(x~ + D), t)  -  mean log(1.0001 - max_{k != t} p_k(x~ + D)),     |D|_inf <= eps,  x~ + D in [0, 1]

BEC, the backdoor existence coefficient (same paper as D):

    TAC_c = mean |a_c(x~) - a_c(x)|_2                 how much channel c of a layer of h_b changes with the trigger
    s(h)  = mean over layers of CKA(h_b, h)           of the tenth of the channels with the largest TAC, on triggered x~
    BEC   = (s(h) - s(clean)) / (1 - s(clean))        1 for h_b itself, 0 for the clean network

with linear CKA(X, Y) = <H XX' H, H YY' H> / (|H XX' H| |H YY' H|), H the centring matrix, images as rows.
"""

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sau.data.batches import generator
from sau.data.images import Augment, Images, to_float
from sau.defense.ft_sam import FT
from sau.defense.nad import features
from sau.defense.npd import held_losses
from sau.errors import require
from sau.loop import RunContext
from sau.models.normalized import full_precision
from sau.types import Labels, Universal

DRAW = 42  # the attacker's draws begin here, the defender's at the seed of the defense: they are independent
STEPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # on the path
FIT_BATCH, BLOCK = 128, 250  # images at a time: D (as released), features
KEPT = 0.1  # share of a layer's channels, rounded up
TAC_IMAGES, CKA_IMAGES = 2200, 500
ASIDE = ("shortcut", "downsample")  # in the names of convolutions beside the main path
Channels = dict[str, Labels]  # by layer


def mixture(
    train: Images, poisons: Images, shots: int, *, share: float, seed: int, augment: Augment | None = None
) -> Images:
    """The attacker's images: `shots` of `poisons`, and clean ones up to the size of the draw, a `share` of `train`.

    The same seed draws the same clean images whatever `shots` is, and the poisons of fewer shots are among those of
    more. The clean images are put through `augment` once and for all; the poisons stay as they are.
    """
    draw, size = generator(DRAW + seed), round(share * len(train))
    require("share", share, size > 0, f"above {0.5 / len(train):.3g}, which is one of {len(train)} images")
    clean = train[torch.randperm(len(train), generator=draw)[:size]]
    chosen = poisons[torch.randperm(len(poisons), generator=draw)[:shots]]
    if augment is not None:
        clean = replace(clean, pixels=augment(clean.pixels, draw))
    return chosen.concat(clean[torch.arange(len(chosen), size)])


class _RA(FT):
    data_use = "poisoned"  # as some of its images are; so `purify` leaves out the verdict, which takes longer than RA


def relearn(
    model: nn.Module, images: Images, *, epochs: int = 5, seed: int = 0, augment: Augment | None = None
) -> nn.Module:
    """A copy of `model`, all weights fine-tuned as RA does: SGD 0.01 with momentum 0.9, batches of 128, batch norm in
    train mode, cross-entropy, neither decay nor schedule. `augment` takes every batch, poisons included.
    """
    method = _RA(epochs=epochs, batch_size=128, lr=0.01, lr_scheduler="constant", wd=0.0, augment=augment is not None)
    return method.purify(model, images, augment=augment, seed=seed, session=RunContext(say=lambda line: None))


def connected(attacked: nn.Module, purified: nn.Module) -> bool:
    """Whether there is a path: the same weights by name and shape, which a network with added layers has not."""
    ours, theirs = ({name: t.shape for name, t in net.state_dict().items()} for net in (attacked, purified))
    return ours == theirs


def interpolate(attacked: nn.Module, purified: nn.Module, s: float) -> nn.Module:
    """A network in eval mode with weights and statistics of batch norm W(s); what are no fractions are `purified`'s."""
    model, start = copy.deepcopy(purified), attacked.state_dict()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.lerp(start[name], tensor, s))
    return model.eval()


def universal(
    model: nn.Module, images: Images, radii: Sequence[float], *, steps: int, seed: int = 0
) -> Iterator[tuple[float, Universal]]:
    """(eps, D) for one radius after the other, D [1, C, H, W] with |D|_inf <= eps.

    D is fitted to lead `images` to their labels; `model` is frozen, in eval mode. Plain gradient steps as long as eps
    times the gradient, at the published eps of 0.05 the published rate, each on 128 images, `steps` for each of the
    rising `radii`. Each radius begins where the last one ended; the first begins anywhere in its ball.
    """
    rng = generator(seed)
    delta, batches = noise(images, radii[0], rng), _batches(len(images), rng)
    for eps in radii:
        for batch in islice(batches, steps):
            x, target = to_float(images.pixels[batch]), images.labels[batch]
            d = delta.clone().requires_grad_()
            reached, others, _ = held_losses(model((x + d).clamp(0, 1)), target, target)
            (gradient,) = torch.autograd.grad(reached + others, d)
            delta = (delta - eps * gradient).clamp(-eps, eps)
        yield eps, delta


def noise(images: Images, eps: float, rng: torch.Generator) -> Universal:
    """A perturbation [1, C, H, W] drawn evenly from the ball: where the search begins, and a control by itself."""
    shape = (1, *images.pixels.shape[1:])
    return ((2 * torch.rand(shape, generator=rng) - 1) * eps).to(images.pixels.device)


def _batches(count: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Whole batches of shuffled positions, without end."""
    while True:
        order = torch.randperm(count, generator=rng)
        yield from order[: count - count % FIT_BATCH].split(FIT_BATCH) if count >= FIT_BATCH else (order,)


def layers(model: nn.Module) -> list[str]:
    """The convolutions on the main path without the first one, by name."""
    every = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    return [name for name in every[1:] if not any(word in name for word in ASIDE)]


def top_tac_channels(model: nn.Module, clean: Images, triggered: Images) -> Channels:
    """The channels of each layer of h_b, `model`, that change most with the trigger.

    `clean` are the images before it, in the same order; the first 2,200 count.
    """
    sums: dict[str, Tensor] = {}
    names = layers(model)
    for at in torch.arange(min(TAC_IMAGES, len(clean))).split(BLOCK):
        x, g = (_outputs(model, part[at], names) for part in (clean, triggered))
        for name in names:
            sums[name] = sums.get(name, 0) + torch.linalg.vector_norm((g[name] - x[name]).flatten(2), dim=2).sum(0)
    return {name: tac.topk(math.ceil(KEPT * len(tac))).indices for name, tac in sums.items()}


def similarity(reference: nn.Module, model: nn.Module, triggered: Images, channels: Channels) -> dict[str, float]:
    """CKA of each layer between h_b and `model`, which has the same layers, on the first 500 triggered images."""
    found: dict[str, list[list[Tensor]]] = {name: [[], []] for name in channels}
    for at in torch.arange(min(CKA_IMAGES, len(triggered))).split(BLOCK):
        for place, network in enumerate((reference, model)):
            for name, output in _outputs(network, triggered[at], list(channels)).items():
                found[name][place].append(output[:, channels[name]].flatten(1))
    return {name: cka(torch.cat(theirs), torch.cat(ours)) for name, (theirs, ours) in found.items()}


def cka(x: Float[Tensor, "n f"], y: Float[Tensor, "n g"]) -> float:
    """Linear centred kernel alignment of two sets of features of n images, 0 to 1; 0 where one does not vary."""
    grams = [part.double() @ part.double().T for part in (x, y)]
    first, second = (gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean() for gram in grams)
    scale = float(first.norm() * second.norm())
    return float((first * second).sum()) / scale if scale > 0 else 0.0


def bec(s: float, clean: float) -> float | None:
    """BEC of a network, from s(h) and that of the clean one; None if the clean one is like h_b."""
    return (s - clean) / (1 - clean) if clean < 1 else None


@torch.no_grad()
def _outputs(model: nn.Module, images: Images, names: Sequence[str]) -> dict[str, Tensor]:
    """The output of each layer. A layer that NPD put a polarizer before has its old name."""
    with full_precision(model):
        return features(model, names, to_float(images.pixels))[1]
