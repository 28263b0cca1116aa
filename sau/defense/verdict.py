"""What a defender can see of a purification without knowing the trigger: the smallest shared patch.

A backdoor is a small change that sends any image to one class. For a class c a patch is a mask m in [0, 1]^(H x W) and
a pattern p, applied as x' = (1 - m) x + m p; of those that send 9 of 10 clean images of other classes to c in *every*
one of the given networks the search keeps the one with the smallest |m|_1 (Neural Cleanse, Wang et al., S&P 2019, with
one network). Before the purification it looks at the attacked network h_b, afterwards at h_b and the purified h
together, from new random starts: a shared adversarial example of SAU that is the same for all images. If the backdoor
survives, its patch is shared and stays small.

Shared examples found for each image alone say less: in a ball of radius 0.2 a search finds one for nearly every image
of any network, whatever became of its backdoor.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.evaluate import eval_mode
from sau.optim import adam
from sau.seeds import seeded
from sau.types import Labels, Pixels

IMAGES, STEPS, CLASSES = 20, 60, 10  # of the search
SUCCESS = 0.9  # share of images that a patch must send to its class
GROWTH, SMALL, SAME = 3.0, 0.5, 0.5  # see `Verdict.doubts`


def follows_images(model: nn.Module, x: Pixels) -> bool:
    """Whether the logits of `model` have a gradient to its images `x`."""
    with torch.enable_grad():
        z = model(x := x[:8].detach().requires_grad_())
        return z.requires_grad and torch.autograd.grad(z.sum(), x, allow_unused=True)[0] is not None


@dataclass(frozen=True)
class Patches:
    """The smallest patch of each class.

    Args:
        classes: [K].
        masks: [K, 1, H, W].
        patterns: [K, C, H, W].
        sizes: |m|_1 in pixels [K]; infinite where no patch worked.
    """

    classes: Tensor
    masks: Tensor
    patterns: Tensor
    sizes: Tensor

    def stamp(self, x: Pixels) -> Tensor:
        """Every patch on every image [N, C, H, W]: [K * N, C, H, W]."""
        return (x + self.masks[:, None] * (self.patterns[:, None] - x)).flatten(0, 1)


@dataclass(frozen=True)
class Verdict:
    """The smallest patches before and after, in pixels.

    Args:
        before: of the attacked network, the smallest of all classes.
        after: shared by the attacked and the purified network.
        typical: the median over classes of the latter.
        kept: share of the patches found on the attacked network that still lead to their class after purification.
    """

    before: float
    after: float
    typical: float
    kept: float

    @property
    def doubts(self) -> bool:
        """Whether too little changed to have removed a backdoor: most patches of the attacked network still work, or
        one shared patch stays far below those of the other classes and hardly larger than before."""
        return self.kept > SAME or (self.after < GROWTH * self.before and self.after < SMALL * self.typical)

    def text(self) -> str:
        """One line, and a warning where there are doubts."""
        sizes = ["none" if size == float("inf") else f"{size:.1f} pixels" for size in (self.before, self.after)]
        found = f"smallest patch that sends 9 of 10 images to one class: {sizes[0]} before, {sizes[1]} shared after"
        found += f" ({100 * self.kept:.0f} % of the patches found before still work); this is no proof"
        if not self.doubts:
            return found
        return f"warning: too little changed to have removed a backdoor; try more epochs or a higher lr\n{found}"

    def summary(self) -> dict[str, Any]:
        """For `summary.json`; None where no patch worked."""
        finite = {name: None if value == float("inf") else round(value, 3) for name, value in vars(self).items()}
        return {**finite, "doubts": self.doubts}


class PatchSearch:
    """Searches the patches before and after a purification, on a few clean images.

    Args:
        attacked: the network as it came; it must not change, and its weights no longer take gradients.
        x: clean images [N, C, H, W] in [0, 1].
        y: their labels [N].
    """

    def __init__(self, attacked: nn.Module, x: Pixels, y: Labels) -> None:
        self.attacked, self.x, self.y = attacked.requires_grad_(False), x[:IMAGES], y[:IMAGES]
        with seeded(1), eval_mode(self.attacked):
            self.before = smallest_patches([self.attacked], self.x, self.y, self._classes())

    def verdict(self, purified: nn.Module, say: Callable[[str], None]) -> dict[str, Any]:
        """Search again and say what there is to say; returns it for `summary.json`."""
        verdict = self.compare(purified)
        for line in verdict.text().splitlines():
            say(line)
        return verdict.summary()

    def compare(self, purified: nn.Module) -> Verdict:
        """What the search finds now."""
        with seeded(2), eval_mode(purified, self.attacked):
            after = smallest_patches([purified, self.attacked], self.x, self.y, self.before.classes)
            return Verdict(
                before=float(self.before.sizes.min()),
                after=float(after.sizes.min()),
                typical=float(after.sizes.median()),
                kept=float(
                    _share([purified], self.before, self.x, self.y)[self.before.sizes.isfinite()].mean().nan_to_num()
                ),
            )

    def _classes(self) -> Tensor:
        """All classes; of many those to which noise and the gradient lead most images, as a backdoor does."""
        x = self.x.detach().requires_grad_()
        logits = self.attacked(x)
        if logits.shape[1] <= CLASSES:
            return torch.arange(logits.shape[1], device=x.device)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, self.y), x)
        with torch.no_grad():
            led = self.attacked((x + 0.1 * gradient.sign()).clamp(0, 1)).softmax(1)
        return led.scatter(1, self.y[:, None], 0.0).mean(0).topk(CLASSES).indices


def smallest_patches(networks: Sequence[nn.Module], x: Pixels, y: Labels, classes: Tensor) -> Patches:
    """The smallest patch of each of `classes` [K] that works in all of `networks`, by Adam on masks and patterns.

    The cost of the mask rises by a factor 1.3 at each step where the patch works, and falls by it where not.
    """
    k, (channels, height, width) = len(classes), x.shape[1:]
    mask = 0.1 * torch.randn(k, 1, height, width, device=x.device) - 1
    pattern = torch.randn(k, channels, height, width, device=x.device)
    cost = torch.full((k,), 0.02, device=x.device)
    best = Patches(classes, torch.ones_like(mask), torch.zeros_like(pattern), torch.full_like(cost, torch.inf))
    descent = adam(0.3, adam_betas=(0.5, 0.9)).descent([nn.Parameter(mask), nn.Parameter(pattern)], 1)
    mask, pattern = descent.parameters
    target, others = classes.repeat_interleave(len(x)), (y != classes[:, None]).float()
    for _ in range(STEPS):
        now = Patches(classes, mask.sigmoid(), pattern.sigmoid(), mask.sigmoid().flatten(1).sum(1))
        stamped = now.stamp(x)
        logits = [network(stamped) for network in networks]
        works = _led(logits, now, y) >= SUCCESS
        with torch.no_grad():
            better = works & (now.sizes < best.sizes)
            best.masks[better], best.patterns[better] = now.masks[better], now.patterns[better]
            best.sizes[better] = now.sizes[better]
            cost = torch.where(works, 1.3 * cost, cost / 1.3).clamp(1e-4, 1)
        entropy = torch.stack([F.cross_entropy(z.float(), target, reduction="none") for z in logits]).sum(0)
        loss = ((entropy.view(k, -1) * others).mean(1) + cost * now.sizes).sum()
        descent.follow(torch.autograd.grad(loss, descent.parameters))
    return best


def _led(logits: Sequence[Tensor], patches: Patches, y: Labels) -> Tensor:
    """The share [K] of images of other classes that all networks answer with the class of the patch; 0 without any."""
    target = patches.classes[:, None]
    both = torch.stack([z.argmax(1).view(len(target), -1) == target for z in logits]).all(0)
    others = y != target
    return (both & others).sum(1) / others.sum(1).clamp_min(1)


@torch.no_grad()
def _share(networks: Sequence[nn.Module], patches: Patches, x: Pixels, y: Labels) -> Tensor:
    return _led([network(patches.stamp(x)) for network in networks], patches, y)
