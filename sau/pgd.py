"""Searches for adversarial examples: projected gradient ascent (PGD) inside the set S of perturbations of an image, and
patches and warps that are the same for all images."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.errors import lacks_memory, require
from sau.models.normalized import at_least_fp32
from sau.optim import Descent, adam
from sau.types import Change, Flags, Labels, PerImage, Pixels

Norm = Literal["L_inf", "L1", "L2", "Reg"]
Bounded = Literal["L_inf", "L2", "L1"]  # those that have a ball
Init = Literal["zero", "random", "max", "min"]
INIT_HELP = "first e: zero, max (+eps everywhere), min (-eps) or random (uniform)"
PATCHES_HELP = "share of each batch that gets a patch, the same for all images, instead of e in S"
WARPS_HELP = "share of each batch that is warped, by a warp that is the same for all images, instead of e in S"
PATCH_IMAGES = 20  # that SAU's patches and warps are searched on
STEPS, CLASSES = 60, 10  # of a search for the smallest patches
PATCH_SUCCESS = 0.9  # share of the images of other classes that such a patch must lead to its class
SUSPICIOUS = 0.5  # of the typical size: a patch below it is a backdoor's
MAX_PATCH_AREA = 1 / 8  # of the image, which shared patches cover at most
Patches = tuple[Tensor, Tensor, Tensor]  # of K classes: masks [K, 1, H, W], patterns [K, C, H, W], |m|_1 in pixels [K]


@dataclass(frozen=True, kw_only=True)
class Ball:
    """S = {e : |e| <= eps}, `eps` in [0, 1] pixels; `clip` keeps x + e in [0, 1], and the norm Reg has no ball."""

    norm: Norm
    eps: float
    clip: bool = False

    def start(self, x: Pixels, init: Init) -> Change:
        """A first e for every image (INIT_HELP; uniform is in [-eps, eps]), projected into S. (The released code of SAU
        draws `random` from [0, 1) before projecting, which puts most values at +eps.)"""
        if init == "random":
            return self.into(x, torch.empty_like(x).uniform_(-self.eps, self.eps))
        return self.into(x, torch.full_like(x, {"zero": 0.0, "max": self.eps, "min": -self.eps}[init]))

    def into(self, x: Pixels, e: Change) -> Change:
        """e projected into S. What `clip` cuts moves values towards 0, so it stays in the ball."""
        e = project(e, self.norm, self.eps)
        return (x + e).clamp(0, 1) - x if self.clip else e

    def contains(self, e: Change) -> Flags:
        """Which of the e lie in the ball, up to rounding."""
        lost = 2**-23 * length(torch.ones_like(e[:1]), self.norm)  # what float32 may lose of every value of g - x
        return length(e, self.norm) <= self.eps * (1 + 1e-6) + lost


def pgd(
    objective: Callable[[Change], PerImage | None], x: Pixels, e: Change, ball: Ball, *, steps: int, lr: float,
    direction: Callable[[Change], Change] = torch.sign,
) -> Change:  # fmt: skip
    """Projected gradient ascent from `e`: e <- ball.into(x, e + lr * direction(gradient)), `steps` times.

    Args:
        objective: e [B, C, H, W] -> what to maximise, one value an image; None ends the ascent.
        x: images [B, C, H, W] in [0, 1].
        e: where it starts.
        ball: S.
        steps: how many.
        lr: length of a step.
        direction: of a step, from the gradient.
    """
    for _ in range(steps):
        d = e.detach().requires_grad_()
        if (values := objective(d)) is None:
            break
        (gradient,) = torch.autograd.grad(values.sum(), d)  # with respect to d alone: no weight gradients
        e = ball.into(x, d.detach() + lr * direction(gradient))
    return e.detach()


def require_radius(name: str, value: float, norm: Norm) -> None:
    """ConfigError unless the value is a radius of a ball, or a step: an L_inf ball of 1 and more holds every image."""
    allowed = "above 0 and, in L_inf, below 1, for pixels are in [0, 1]: 8 / 255, not 8"
    require(name, value, value > 0 and (norm != "L_inf" or value < 1), allowed)


def project(e: Change, norm: Norm, eps: float) -> Change:
    """Each image's perturbation, brought into the ball of radius `eps` around 0: L_inf clips values, L1 and L2 shrink
    the whole perturbation to the radius, Reg leaves it."""
    if norm == "L_inf":
        return e.clamp(-eps, eps)
    if norm == "Reg":
        return e
    return e * (eps / length(e, norm).clamp_min(1e-12)).clamp_max(1).view(-1, 1, 1, 1)


def length(e: Change, norm: Norm) -> PerImage:
    """The norm of every image's perturbation."""
    order = {"L_inf": torch.inf, "L1": 1, "L2": 2}[norm]
    return torch.linalg.vector_norm(e.flatten(1), ord=order, dim=1)


# Patches


def likely_classes(model: nn.Module, x: Pixels, y: Labels) -> Tensor:
    """All classes; of many the ten to which a step up the loss leads most images, as a backdoor does."""
    x = x.detach().requires_grad_()
    logits = model(x)
    if logits.shape[1] <= CLASSES:
        return torch.arange(logits.shape[1], device=x.device)
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits, y), x)
    with torch.no_grad():
        led = model((x + 0.1 * gradient.sign()).clamp(0, 1)).softmax(1)
    return led.scatter(1, y[:, None], 0.0).mean(0).topk(CLASSES).indices


def under_patch(x: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """x' = (1 - m) x + m p, in any shapes that fit together."""
    return x + mask * (pattern - x)


def stamped_losses(
    networks: Sequence[nn.Module], x: Pixels, classes: Tensor, masks: Tensor, patterns: Tensor
) -> tuple[Tensor, Tensor]:
    """Of all images under each patch [K, N]: the cross-entropy towards its class, summed over the networks, and whether
    all of these see that class. Masks are [K, 1, H, W], patterns [K, C, H, W]."""
    stamped = under_patch(x, masks[:, None], patterns[:, None]).flatten(0, 1)
    target = classes.repeat_interleave(len(x))
    logits = [at_least_fp32(network(stamped)) for network in networks]
    losses = torch.stack([F.cross_entropy(z, target, reduction="none") for z in logits]).sum(0)
    led = torch.stack([z.argmax(1) == target for z in logits]).all(0)
    return losses.view(len(classes), -1), led.view(len(classes), -1)


def smallest_patches(
    networks: Sequence[nn.Module], share: float, x: Pixels, y: Labels, classes: Tensor, masks: Tensor, patterns: Tensor
) -> Patches:
    """The smallest patches that lead this `share` of the images of other classes to their class in all networks.

    Adam from the given masks and patterns; the cost of a mask rises by a factor 1.3 at each step where the patch works,
    and falls by it where not. Where no patch worked, |m|_1 is infinite.
    """
    logits = [nn.Parameter(logit(part)) for part in (masks, patterns)]
    masks, patterns, sizes = masks.clone(), patterns.clone(), torch.full(classes.shape, torch.inf, device=x.device)
    descent = adam(0.6, adam_betas=(0.5, 0.9)).descent(logits, 1)
    cost = torch.full(classes.shape, 0.02, device=x.device)
    others = (y != classes[:, None]).float()
    for _ in range(STEPS):
        mask, pattern = (part.sigmoid() for part in logits)
        size = logits[0].sigmoid().expand(-1, -1, *x.shape[2:]).flatten(1).sum(1)
        losses, led = stamped_losses(networks, x, classes, mask, pattern)
        works = (led * others).sum(1) / others.sum(1).clamp_min(1) >= share
        with torch.no_grad():
            better = works & (size < sizes)
            masks[better], patterns[better], sizes[better] = mask[better], pattern[better], size[better]
            cost = torch.where(works, 1.3 * cost, cost / 1.3).clamp(1e-4, 1)
        descent.follow(torch.autograd.grad(((losses * others).mean(1) + cost * size).sum(), logits))
    return masks, patterns, sizes


def patches_in_parts(network: nn.Module, x: Pixels, y: Labels, *start: Tensor) -> list[Patches]:
    """`smallest_patches` from `start`, classes, masks and patterns; where memory runs out, of each half of the classes
    on its own."""
    try:
        return [smallest_patches([network], PATCH_SUCCESS, x, y, *start)]
    except (RuntimeError, MemoryError) as error:
        if len(start[0]) == 1 or not lacks_memory(error):
            raise
    halves = zip(*(part.tensor_split(2) for part in start), strict=True)  # the memory of the attempt is free again
    return [found for half in halves for found in patches_in_parts(network, x, y, *half)]


def logit(part: Tensor) -> Tensor:
    """What the sigmoid makes masks or patterns of, within what steps of Adam reach."""
    return part.clamp(0.02, 0.98).logit()


def patch_of_each_class(
    network: nn.Module, x: Pixels, y: Labels, size: Sequence[int] | None = None, tries: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classes, and the smallest patches of each that lead 9 of 10 images there, `tries` of each class. Masks have
    `size`: that of the images, or (1, 1), one value for all pixels."""
    classes, found = likely_classes(network, x, y), list[Patches]()
    for _ in range(tries):
        # Most of the image at first: of faint masks half shrink onto no trigger.
        masks = (0.1 * torch.randn(len(classes), 1, *(size or x.shape[2:]), device=x.device) + 1).sigmoid()
        patterns = torch.randn(len(classes), *x.shape[1:], device=x.device).sigmoid()
        found += patches_in_parts(network, x, y, classes, masks, patterns)
    masks, patterns, sizes = map(torch.cat, zip(*found, strict=True))
    return classes.repeat(tries), masks, patterns, sizes


def drawn(ends: Tensor, count: int) -> Tensor:
    """Random numbers [count] of the parts of [0, 1] that have these ends."""
    return torch.searchsorted(ends, torch.rand(count, device=ends.device)).clamp_max(len(ends) - 1)


class SharedPatches(nn.Module):
    """Shared adversarial examples of SAU that are the same for all images, as a trigger is: x' = (1 - m) x + m p.

    Three searches of each class give a patch of each kind:

    * fixed: the smallest mask m that leads the backdoored network h_b to the class, as in BadNets;
    * moving: begins as the fixed one;
    * whole: moving, with one value of m for all pixels, as in Blended.

    What moves descends the cross-entropy of both networks to its class, a step of Adam a batch. A cost holds |m|_1 at
    half (moving) or all (whole) of the median first size, below 1/8 of the image. Smaller patches get more images.

    Args:
        network: h_b.
        x: a batch of clean images [B, C, H, W] in [0, 1].
        y: their labels [B].
    """

    def __init__(self, network: nn.Module, x: Pixels, y: Labels) -> None:
        super().__init__()
        x, y, largest = x[:PATCH_IMAGES], y[:PATCH_IMAGES], MAX_PATCH_AREA * x[0, 0].numel()
        classes, *first, sizes = patch_of_each_class(network, x, y, tries=3)
        _, *whole, values = patch_of_each_class(network, x, y, (1, 1), tries=3)
        self.first_masks, self.first_patterns = (nn.Buffer(part) for part in first)
        self.masks, self.patterns = (nn.Parameter(logit(part)) for part in first)
        self.values, self.pictures = (nn.Parameter(logit(part)) for part in whole)
        self.classes: Tensor = nn.Buffer(classes.repeat(3))
        limits = [(SUSPICIOUS * sizes.median()).clamp_max(largest), values.median().clamp_max(largest)]
        self.limits: Tensor = nn.Buffer(torch.stack([limits[0], *limits]).repeat_interleave(len(classes)))
        self.cost: Tensor = nn.Buffer(torch.full_like(self.limits, 0.02))
        shares = [each.clamp(1, largest) ** -2 for each in (sizes, values)]  # a search that fails has no size
        small, other = (each / each.sum() for each in shares)
        self.ends: Tensor = nn.Buffer(torch.cat([small, small, other]).cumsum(0) / 3)

    def descent(self) -> Descent:
        return adam(0.3, adam_betas=(0.5, 0.9)).descent(self.parameters(), 1)

    def patches(self) -> tuple[Tensor, Tensor]:
        """All m [N, 1, H, W] and p [N, C, H, W]: fixed, moving, whole."""
        masks = torch.cat([self.first_masks, self.masks.sigmoid(), self.values.sigmoid().expand_as(self.masks)])
        return masks, torch.cat([self.first_patterns, self.patterns.sigmoid(), self.pictures.sigmoid()])

    def stamp(self, x: Pixels, chosen: Tensor) -> Pixels:
        """x', each image under the patch of that number."""
        masks, patterns = self.patches()
        return under_patch(x, masks[chosen], patterns[chosen])

    def ascend(self, networks: Sequence[Callable[[Tensor], Tensor]], descent: Descent, x: Pixels) -> Pixels:
        """Each image under a random patch, after a step of those that move."""
        chosen = drawn(self.ends, len(x))
        stamped, size = self.stamp(x, chosen), self.patches()[0].flatten(1).sum(1)
        loss = sum(F.cross_entropy(at_least_fp32(network(stamped)), self.classes[chosen]) for network in networks)
        self.cost.mul_(torch.where(size.detach() > self.limits, 1.2, 1 / 1.2)).clamp_(1e-4, 10)
        descent.follow(torch.autograd.grad(loss + (self.cost * size).mean(), descent.parameters))
        return self.stamp(x, chosen).detach()


class SharedWarps(nn.Module):
    """Shared adversarial examples of SAU that are one warp for all images, as WaNet's: x'(u) = x(u + f(u)).

    Each class has a field f, bicubic between 4x4 points, there at most one pixel. It descends the cross-entropy of
    h_b to that class, then that of both networks, a step of Adam a batch. Classes to which h_b is led more often get
    more images, by the fourth power of that share. Arguments are those of `SharedPatches`.
    """

    def __init__(self, network: nn.Module, x: Pixels, y: Labels) -> None:
        super().__init__()
        x, y = x[:PATCH_IMAGES], y[:PATCH_IMAGES]
        self.classes: Tensor = nn.Buffer(likely_classes(network, x, y))
        count = len(self.classes)
        self.fields = nn.Parameter(torch.randn(count, 2, 4, 4, device=x.device) / 2)
        self.ends: Tensor = nn.Buffer(torch.arange(1, count + 1, device=x.device) / count)
        descent = self.descent()
        for _ in range(STEPS * count):
            self.ascend([network], descent, x)
        with torch.no_grad():
            led = [network(self.warp(x, torch.full_like(y, i))).argmax(1) == c for i, c in enumerate(self.classes)]
        shares = torch.stack(led).float().mean(1).clamp_min(0.01) ** 4
        self.ends.copy_((shares / shares.sum()).cumsum(0))

    def descent(self) -> Descent:
        return adam(0.1, adam_betas=(0.5, 0.9)).descent(self.parameters(), 1)

    def warp(self, x: Pixels, chosen: Tensor) -> Pixels:
        """x', each image under the warp of that number."""
        right, down = F.interpolate(self.fields[chosen], x.shape[2:], mode="bicubic", align_corners=True).unbind(1)
        same = torch.eye(2, 3, device=x.device).expand(len(x), 2, 3)
        grid = F.affine_grid(same, list(x.shape), align_corners=False)  # which is 2 wide and 2 high
        grid = grid + torch.stack([2 / x.shape[3] * right, 2 / x.shape[2] * down], 3)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    def ascend(self, networks: Sequence[Callable[[Tensor], Tensor]], descent: Descent, x: Pixels) -> Pixels:
        """Each image under a random warp, after a step of these."""
        warped = self.warp(x, chosen := drawn(self.ends, len(x)))
        losses = [F.cross_entropy(at_least_fp32(network(warped)), self.classes[chosen]) for network in networks]
        descent.follow(torch.autograd.grad(torch.stack(losses).sum(), descent.parameters))
        with torch.no_grad():
            self.fields.clamp_(-1, 1)
            return self.warp(x, chosen)
