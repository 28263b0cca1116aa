"""LC, label-consistent: patterns in the corners of images that are hard to learn otherwise (Turner, Tsipras, Madry,
"Label-Consistent Backdoor Attacks", 2019).

    training  x' = clip(x + e + a c),    e = argmax_{|e| <= eps} CE(f(x + e), t);      test  x' = clip(x + a c)

The images are those of the target class t, and keep their label. f, the surrogate, is a clean network trained like the
one to attack (in the paper, against adversarial examples); c is 1 and -1 by turns in the four corners.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.attack.base import Attack
from sau.attack.prototype import train_clean
from sau.attack.triggers import TriggerContext
from sau.config import param
from sau.data.batches import VALUES_AT_ONCE
from sau.errors import require
from sau.pgd import Ball, pgd
from sau.types import Change, PerImage, Pixels

CORNER = 3  # side of a corner's pattern, in pixels of 32


class LC(Attack):
    """Perturb images of the target class against the surrogate; patterns in the corners."""

    name = "lc"
    cifar10_gate = 95.0
    remedy = "a larger --pratio, up to all images of the class"
    clean_label = True
    ignored = dict.fromkeys(
        ("attack_train_replace_imgs_path", "attack_test_replace_imgs_path"), "the images are perturbed here"
    )

    reduced_amplitude: float = param(1.0, "a, how strong the pattern is", gt=0, le=1)
    lc_eps: float = param(8 / 255, "radius of the L_inf ball of e, in [0, 1] pixels", ge=0, lt=1)
    lc_steps: int = param(100, "steps of the search for e", ge=1)
    lc_step_size: float = param(1.5 / 255, "length of a step", gt=0, lt=1)

    def make_trigger(self, context: TriggerContext) -> nn.Module:
        return train_clean(context)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        at_once = max(1, VALUES_AT_ONCE // math.prod(x.shape[1:]))  # the search keeps the activations of its images
        found = (self.perturbation(part.detach().float()) for part in x.split(at_once))
        e = torch.zeros_like(x) if test else torch.cat([*found]).to(x.dtype)
        return (x + e + self.reduced_amplitude * corners(*x.shape[-2:]).to(x)).clamp(0, 1)

    @torch.enable_grad()
    def perturbation(self, x: Pixels) -> Change:
        """e, by sign steps from 0."""
        network, target = self.require_trigger(), torch.full((len(x),), self.attack_target, device=x.device)

        def loss(e: Change) -> PerImage:
            return F.cross_entropy(network(x + e), target, reduction="none")

        ball = Ball(norm="L_inf", eps=self.lc_eps, clip=True)
        return pgd(loss, x, ball.start(x, "zero"), ball, steps=self.lc_steps, lr=self.lc_step_size)


@cache
def corners(height: int, width: int) -> Tensor:
    """c [1, H, W], which grows with the image; ConfigError below 11 pixels, where corners get none of it."""
    require("side of the images", min(height, width), min(height, width) >= 11, "11 pixels and more for lc")
    c, places = torch.zeros(32, 32), torch.arange(CORNER)
    ends = torch.cat([places, places - CORNER])
    c[ends[:, None], ends] = (1.0 - 2 * ((places[:, None] + places) % 2)).repeat(2, 2)
    return F.interpolate(c[None, None], size=(height, width))[0]
