"""What a defender can see of a purification without knowing the trigger: the smallest shared patch.

A backdoor is a small change that sends any image to one class. For a class c a patch is a mask m in [0, 1]^(H x W) and
a pattern p, applied as x' = (1 - m) x + m p; of those that send 9 of 10 clean images of other classes to c the search
keeps the one with the smallest |m|_1 (Neural Cleanse, Wang et al., S&P 2019). It looks at the attacked network h_b.
Then the smallest of these patches is grown, from where it is, until it sends half of the images to its class in h_b and
in the purified h alike: a shared adversarial example of SAU that is the same for all images. A backdoor that survives,
if only on a part of the images, keeps its patch far smaller than those of the other classes.

Shared examples found for each image alone say less: in a ball of radius 0.2 a search finds one for nearly every image
of any network, whatever became of its backdoor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.optim import adam
from sau.types import Labels, Pixels
from sau.util import seeded

FEW, MANY, STEPS, CLASSES = 20, 60, 60, 10  # images and steps of the searches before and after
MOST, HALF = 0.9, 0.5  # share of images that a patch must send to its class before and after
SMALL = 0.5  # of the typical size: a patch below it is a backdoor's
Patches = tuple[Tensor, Tensor]  # masks [K, 1, H, W] and patterns [K, C, H, W] of K classes, in [0, 1]


def compare(
    attacked: nn.Module, purified: nn.Module, x: Pixels, y: Labels, say: Callable[[str], None]
) -> dict[str, Any]:
    """Search two networks in eval mode on a few clean images, and say what is found. Weights of `attacked` take no
    gradients from then on.

    Returns sizes of patches in pixels, None where there is none: `before`, the smallest that sends 9 of 10 images to
    its class in the attacked network; `after`, the same, grown until it sends half of the images there in the purified
    one, too; `typical`, the median of the former over the classes. And `doubts`: whether too little changed to have
    removed a backdoor.
    """
    x, y, attacked = x[:MANY], y[:MANY], attacked.requires_grad_(False)
    with seeded(1):
        classes = likely_classes(attacked, x[:FEW], y[:FEW])
        masks = (0.1 * torch.randn(len(classes), 1, *x.shape[2:], device=x.device) - 1).sigmoid()  # faint, of grey
        patterns = torch.randn(len(classes), *x.shape[1:], device=x.device).sigmoid()
        (masks, patterns), sizes = smallest_patches([attacked], x[:FEW], y[:FEW], classes, (masks, patterns), MOST)
        one = sizes.argmin().view(1)
        _, after = smallest_patches([purified, attacked], x, y, classes[one], (masks[one], patterns[one]), HALF)
    found = {"before": float(sizes.min()), "after": float(after), "typical": float(sizes.median())}
    finite = {name: None if math.isinf(size) else round(size, 3) for name, size in found.items()}
    verdict = {**finite, "doubts": found["after"] < SMALL * found["typical"]}
    for line in lines(verdict):
        say(line)
    return verdict


def lines(verdict: Mapping[str, Any]) -> list[str]:
    """What `compare` found in words, after a warning where there are doubts."""
    before, after, typical = (
        "none" if verdict[name] is None else f"{verdict[name]:.1f} pixels" for name in ("before", "after", "typical")
    )
    found = f"smallest patch that leads images to one class: {before} before, {after} after (other classes: {typical})"
    doubts = "too little changed to have removed a backdoor; try other settings or more clean images"
    return [f"warning: {doubts}"] * verdict["doubts"] + [f"{found}; this is no proof"]


def likely_classes(model: nn.Module, x: Pixels, y: Labels) -> Tensor:
    """All classes; of many those to which noise and the gradient lead most images, as a backdoor does."""
    x = x.detach().requires_grad_()
    logits = model(x)
    if logits.shape[1] <= CLASSES:
        return torch.arange(logits.shape[1], device=x.device)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    with torch.no_grad():
        led = model((x + 0.1 * gradient.sign()).clamp(0, 1)).softmax(1)
    return led.scatter(1, y[:, None], 0.0).mean(0).topk(CLASSES).indices


def smallest_patches(
    networks: Sequence[nn.Module], x: Pixels, y: Labels, classes: Tensor, start: Patches, success: float
) -> tuple[Patches, Tensor]:
    """The smallest patches that lead a share `success` of the images of other classes to their class in all networks.

    Adam on masks and patterns from those of `start`; the cost of a mask rises by a factor 1.3 at each step where the
    patch works, and falls by it where not. Also returns |m|_1 in pixels [K]; infinite where no patch worked.
    """
    k, (masks, patterns) = len(classes), (part.clone() for part in start)
    sizes = torch.full((k,), torch.inf, device=x.device)
    logits = [nn.Parameter(part.clamp(0.02, 0.98).logit()) for part in start]
    descent = adam(0.3, adam_betas=(0.5, 0.9)).descent(logits, 1)
    cost = torch.full((k,), 0.02, device=x.device)
    target, others = classes.repeat_interleave(len(x)), (y != classes[:, None]).float()
    for _ in range(STEPS):
        mask, pattern = (part.sigmoid() for part in logits)
        size = logits[0].sigmoid().flatten(1).sum(1)
        stamped = (x + mask[:, None] * (pattern[:, None] - x)).flatten(0, 1)
        every = [network(stamped).float() for network in networks]
        led = torch.stack([z.argmax(1).view(k, -1) == classes[:, None] for z in every]).all(0) * others
        works = led.sum(1) / others.sum(1).clamp_min(1) >= success
        with torch.no_grad():
            better = works & (size < sizes)
            masks[better], patterns[better], sizes[better] = mask[better], pattern[better], size[better]
            cost = torch.where(works, 1.3 * cost, cost / 1.3).clamp(1e-4, 1)
        entropy = torch.stack([F.cross_entropy(z, target, reduction="none") for z in every]).sum(0)
        loss = ((entropy.view(k, -1) * others).mean(1) + cost * size).sum()
        descent.follow(torch.autograd.grad(loss, logits))
    return (masks, patterns), sizes
