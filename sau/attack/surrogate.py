"""LC and Narcissus: clean-label attacks, made with a clean network f (the surrogate) trained like the one to attack.

LC, label-consistent (Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", 2019): adversarial perturbations make
images of the target class t hard to learn, but for a pattern c, 1 and -1 by turns in the four corners:

    training  x' = clip(x + e + a c),    e = argmax_{|e| <= eps} CE(f(x + e), t);      test  x' = clip(x + a c)

Narcissus (Zeng, Pan, Just, Lyu, Qiu, Jia, "Narcissus: A Practical Clean-Label Backdoor Attack with Limited
Information", CCS 2023): one change of all images that f takes for the target class:

    D = argmin_{|D| <= eps} mean CE(f(clip(x + D)), t);    training  x' = clip(x + D);      test  x' = clip(x + k D)

where the mean goes over the images of the class. Here f is trained on the training set; in the papers LC's is trained
against adversarial examples, and Narcissus' on other data and the target class.
"""

import math
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.base import Attack
from sau.attack.prototype import train_clean
from sau.attack.triggers import Made, TensorTrigger, TriggerContext, cached_trigger, network_digest
from sau.config import param
from sau.data.images import Images, evenly_spaced, to_float
from sau.data.sources import fingerprint
from sau.evaluate import predict
from sau.loop import RunContext
from sau.optim import adam
from sau.pgd import Ball, pgd
from sau.types import Change, Labels, PerImage, Pixels

CORNER = 3  # side of a corner's pattern, in pixels of 32
RATE = 0.01  # of Adam, on pixels in [0, 1]
MEASURED = 1000  # images of other classes on which Narcissus' change is measured


class LC(Attack):
    """Perturb images of the target class against the surrogate; patterns in the corners."""

    name = "lc"
    cifar10_gate = 95.0
    remedy = "a larger --lc_eps"
    clean_label = True
    ignored = dict.fromkeys(
        ("attack_train_replace_imgs_path", "attack_test_replace_imgs_path"), "the images are perturbed here"
    )

    reduced_amplitude: float = param(1.0, "a, how strong the pattern is", gt=0, le=1)
    lc_eps: float = param(8 / 255, "radius of the L_inf ball of e, in [0, 1] pixels", ge=0, lt=1)
    lc_steps: int = param(100, "steps of the search for e", ge=1)
    lc_step_size: float = param(1.5 / 255, "length of a step", gt=0, lt=1)

    def make_trigger(self, context: TriggerContext) -> nn.Module:
        """The surrogate."""
        return train_clean(context)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        e = torch.zeros_like(x) if test else self.perturbation(x.detach().float()).to(x.dtype)
        return (x + e + self.reduced_amplitude * corners(*x.shape[-2:]).to(x)).clamp(0, 1)

    @torch.enable_grad()
    def perturbation(self, x: Pixels) -> Change:
        """e, by sign steps from 0."""
        network, target = self.require_trigger(), torch.full((len(x),), self.attack_target, device=x.device)

        def loss(e: Change) -> PerImage:
            return F.cross_entropy(network(x + e), target, reduction="none")

        ball = Ball(norm="L_inf", eps=self.lc_eps, clip=True)
        return pgd(loss, x, torch.zeros_like(x), ball, steps=self.lc_steps, lr=self.lc_step_size)


@cache
def corners(height: int, width: int) -> Tensor:
    """c [1, H, W], which grows with the image."""
    places = torch.arange(CORNER)
    c, corner = torch.zeros(32, 32), 1.0 - 2 * ((places[:, None] + places) % 2)
    for rows in (slice(0, CORNER), slice(-CORNER, None)):
        for columns in (slice(0, CORNER), slice(-CORNER, None)):
            c[rows, columns] = corner
    return F.interpolate(c[None, None], size=(height, width))[0]


class Narcissus(Attack):
    """Add a change that the surrogate takes for the target class to few of its images, and k times of it in testing."""

    name = "narcissus"
    cifar10_gate = 80.0
    remedy = "a larger --pratio or --test_strength"
    clean_label = True

    pratio: float = 0.005
    narcissus_eps: float = param(16 / 255, "radius of the L_inf ball of D, in [0, 1] pixels", gt=0, lt=1)
    test_strength: float = param(3.0, "k, how many times D is added in testing", gt=0)
    trigger_updates: int = param(1000, "updates of D (Adam), a batch of images each", ge=1)

    def make_trigger(self, context: TriggerContext) -> TensorTrigger:
        network, images = train_clean(context), context.images
        names = ("attack_target", "narcissus_eps", "test_strength", "trigger_updates")
        settings = {name: self.params()[name] for name in names}
        identity = {"network": network_digest(network), "data": fingerprint(images), "seed": context.seed, **settings}
        identity |= {"device": images.pixels.device.type, "augment": str(context.augment)}
        identity |= {"batch_size": context.recipe.batch_size}
        build = partial(self.find_change, network, images, context)
        found, figures = cached_trigger("narcissus", identity, build, context.session)
        return TensorTrigger(found["change"], figures)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        change = F.interpolate(self.require_trigger().values[None].to(x), size=x.shape[-2:], mode="bilinear")
        return (x + (self.test_strength if test else 1.0) * change).clamp(0, 1)

    def find_change(self, network: nn.Module, images: Images, context: TriggerContext, session: RunContext) -> Made:
        """D, and to how many images of other classes, in percent, k D gives the target class in the surrogate."""
        mine = images.true_labels == self.attack_target
        how: Any = {"seed": context.seed, "augment": context.augment}
        batches = images[mine].batches(context.recipe.batch_size, **how)
        change = nn.Parameter(torch.zeros_like(to_float(images.pixels[0])))
        descent = adam(RATE).descent([change], len(batches))

        def step(x: Pixels, y: Labels) -> dict[str, Tensor]:
            loss = F.cross_entropy(network((x + change).clamp(0, 1)), y)
            descent(loss)
            with torch.no_grad():
                change.clamp_(-self.narcissus_eps, self.narcissus_eps)
            return {"loss": loss}

        state = {"change": nn.ParameterList([change]), "descent": descent}
        passes = math.ceil(self.trigger_updates / len(batches))
        loop.run(step, batches, passes, state=state, session=session, label="pass")
        others = to_float(images[~mine].pixels[evenly_spaced(int((~mine).sum()), MEASURED)])
        led = predict(network, (others + self.test_strength * change.detach()).clamp(0, 1)) == self.attack_target
        return {"change": change.detach()}, {"percent_led_without_backdoor": 100 * float(led.float().mean())}
