"""LF: a smooth, faint pattern added to the whole image (Zeng, Park, Mao, Jia, "Rethinking the Backdoor Attacks'
Triggers: A Frequency Perspective", ICCV 2021).

With `lf_optimise` it is searched against a clean network, trained once like the one to attack: a universal perturbation
towards a class that is smoothed after every image,

    for every image x that v does not move:  v <- S(v + S(r)),  v <- strength (v - min v) / (max v - min v)

S is a Gaussian filter, r the step of a targeted DeepFool from x + v. Passes end when v changes the prediction of a
share 1 - delta of other images, or stops getting better.
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.base import Attack
from sau.attack.prototype import train_clean
from sau.attack.triggers import Made, TensorTrigger, TriggerContext, cached_trigger, network_digest
from sau.config import param
from sau.data.batches import generator, to_float
from sau.data.decode import read_array
from sau.data.images import Images
from sau.errors import DataError, TrainingError
from sau.evaluate import AT_ONCE, predict
from sau.loop import RunContext
from sau.types import Labels, Pixels

CENTRE, SPREAD = 0.42, 1 / 3  # of the glow, as shares of the image: a little above and left of the middle
COLOUR = (0.35, 0.0, 1.0)  # how strongly it shows in red, green and blue
GREY = 100  # grey levels; a pattern that begins here is an image around middle grey, not a change of one
TAPS, SIGMA, BEFORE = 30, 6.0, 14  # of S, in pixels; zeros before the image, and as many as are left after it
HELD_BACK = 1000  # images on which a pattern is judged, where there are others none of those it is made from
STILL, SPAN = 0.01, 5  # the search ends when the last SPAN rates lie within STILL
SETTINGS = ("lf_images", "lf_passes", "lf_delta", "lf_deepfool_steps", "lf_overshoot", "lf_strength")


class LF(Attack):
    """x' = clip(x + t). The default t is a soft violet glow, exp(-r^2 / 2 sigma^2), which needs no network and has the
    character of the published patterns: broad, not negative, at most 51 grey levels, one channel at zero."""

    name = "lf"
    retired = {**Attack.retired, "lf_network": None}
    cifar10_gate = 95.0
    remedy = "more --epochs or a larger --lf_strength"
    files = ("lowFrequencyPatternPath",)

    lf_strength: float = param(0.2, "the largest value of the pattern, in [0, 1] pixels", gt=0, le=1)
    lowFrequencyPatternPath: str | None = param(None, ".npy file with t in grey levels instead: [H, W, C] or [H, W]")
    lf_optimise: bool = param(False, "search t against a clean network, as in the paper, with the settings below")
    lf_images: int = param(100, "training images for the search", ge=1)
    lf_passes: int = param(50, "most passes over them", ge=1)
    lf_delta: float = param(0.8, "share of the predictions that t may leave unchanged", ge=0, lt=1)
    lf_deepfool_steps: int = param(200, "steps to lead one image to the target, at most", ge=1)
    lf_overshoot: float = param(0.02, "share by which they go beyond the border between two classes", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        able = self.lowFrequencyPatternPath is None and self.attack_label_trans == "all2one"
        allowed = "false with lowFrequencyPatternPath, and unless attack_label_trans is all2one"
        self.require("lf_optimise", able or not self.lf_optimise, allowed)

    def make_trigger(self, context: TriggerContext) -> TensorTrigger | None:
        path, images, seed = self.lowFrequencyPatternPath, context.images, context.seed
        if not self.lf_optimise:
            return None if path is None else TensorTrigger(read_pattern(path, *images.pixels.shape[1:]))
        network = train_clean(context)
        settings = {name: getattr(self, name) for name in ("attack_target", *SETTINGS)}
        identity = {"network": network_digest(network), "seed": seed, **settings}
        found, figures = cached_trigger("lf", identity, partial(optimise, network, images, self, seed), context)
        return TensorTrigger(found["pattern"], figures)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        path, shape = self.lowFrequencyPatternPath, x.shape[1:]
        if self.trigger is not None or self.lf_optimise:
            pattern = self.require_trigger().for_shape(shape)
        else:
            pattern = self.lf_strength * glow(*shape) if path is None else read_pattern(path, *shape)
        return (x + pattern.to(x)).clamp(0, 1)


@cache
def glow(channels: int, height: int, width: int) -> Tensor:
    """The default pattern [C, H, W], with a maximum of about 1."""
    rows, columns = (torch.arange(side) / side - CENTRE for side in (height, width))
    bump = torch.exp(-(rows[:, None] ** 2 + columns**2) / (2 * SPREAD**2))
    colour = torch.tensor(COLOUR if channels == 3 else (1.0,) * channels)
    return colour.view(-1, 1, 1) * bump


def read_pattern(path: str, channels: int, height: int, width: int) -> Tensor:
    """The pattern of a file in [0, 1] pixels, [C, H, W]; DataError if it does not fit images of this shape."""
    array = read_array(Path(path))
    array = array[0] if array.ndim == 4 else array
    array = np.repeat(array[:, :, None], channels, 2) if array.ndim == 2 else array
    wanted = (height, width, channels)
    if array.shape != wanted:
        raise DataError(f"{path} holds a pattern of shape {array.shape}, the images are {wanted}; make one that fits")
    low, high = float(array.min()), float(array.max())
    if not -255 <= low <= high <= 255 or max(-low, high) <= 1 or low >= GREY:
        raise DataError(
            f"{path} ranges over {low:.3g}..{high:.3g}; allowed are grey levels to add to an image, within -255..255; "
            "multiply values of 0..1 by 255, subtract 127.5 from an image around middle grey"
        )
    return torch.from_numpy(array.astype(np.float32)).permute(2, 0, 1) / 255


# The search


class Progress:
    """The pattern so far, the best one and the rates of all passes, for checkpoints."""

    def __init__(self, shape: torch.Size, device: torch.device) -> None:
        self.v = self.best = torch.zeros(shape, device=device)
        self.rates: list[float] = []

    def judge(self, rate: float, enough: float) -> bool:
        """After a pass: keep the best pattern; whether to stop."""
        if rate > max(self.rates, default=0.0):
            self.best = self.v
        self.rates.append(rate)
        last = self.rates[-SPAN:]
        return rate >= enough or (len(last) == SPAN and max(last) - min(last) < STILL)

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "rates": [*self.rates]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.v, self.best, self.rates = state["v"].to(self.v), state["best"].to(self.v), [*state["rates"]]


def smooth(v: Tensor) -> Tensor:
    """S: each channel of `v` [C, H, W] under a Gaussian that sums to 1, zeros around; of the same shape."""
    taps = torch.arange(TAPS, dtype=v.dtype, device=v.device) - (TAPS - 1) / 2
    kernel = (-taps.square() / (2 * SIGMA**2)).exp()
    kernel = kernel / kernel.sum()
    padded = F.pad(v[:, None], (BEFORE, TAPS - 1 - BEFORE) * 2)
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def deepfool(model: nn.Module, x: Tensor, target: int, steps: int, overshoot: float) -> Tensor | None:
    """The perturbation r [C, H, W] with which `model` sees `target` in x + r; None if `steps` do not lead there.

    A step goes |f_t - f_0| / |g| along g, the gradient of f_t - f_0, with 0 the class that is seen in `x` [C, H, W].
    """
    way, r, first = torch.zeros_like(x), torch.zeros_like(x), -1
    for _ in range(steps):
        here = (x + r).requires_grad_(True)
        logits = model(here[None])[0]
        first = int(logits.argmax()) if first < 0 else first
        if int(logits.argmax()) == target:
            return r
        lead = logits[target] - logits[first]
        (slope,) = torch.autograd.grad(lead, here)
        way = way + lead.abs().detach() / slope.square().sum() * slope
        if not way.isfinite().all():  # a flat place, or a step out of it
            return None
        r = (1 + overshoot) * way
    return r if int(model((x + r)[None])[0].argmax()) == target else None


def rescaled(v: Tensor, strength: float) -> Tensor | None:
    """`v` with its minimum at 0 and its maximum at `strength`, over all channels; None where both are the same."""
    low, high = v.min(), v.max()
    return strength * (v - low) / (high - low) if bool(high > low) else None


def step(model: nn.Module, search: Progress, lf: LF, x: Pixels, y: Labels) -> dict[str, Tensor]:
    """Move the pattern by one image [1, C, H, W]; counts whether it did. `y` is not looked at."""
    shown, v = (x + search.v).clamp(0, 1), None
    seen, now = predict(model, torch.cat([x, shown])).tolist()
    if seen == now != lf.attack_target:  # one that is there already has r = 0, which would leave nothing to rescale
        r = deepfool(model, shown[0], lf.attack_target, lf.lf_deepfool_steps, lf.lf_overshoot)
        v = None if r is None else rescaled(smooth(search.v + smooth(r)), lf.lf_strength)
    search.v = search.v if v is None else v
    return {"moved": torch.tensor(int(v is not None))}


def rate(model: nn.Module, images: Images, seen: Labels, v: Tensor) -> float:
    """Share of images in which `model` sees another class with the pattern than the ones in `seen`."""
    changed = predict(model, (to_float(images.pixels) + v).clamp(0, 1), AT_ONCE) != seen
    return float(changed.float().mean())


def optimise(model: nn.Module, images: Images, lf: LF, seed: int, session: RunContext) -> Made:
    """The best pattern that the search finds on `images`, as {"pattern": [C, H, W]}, and what it does.

    Raises TrainingError if no image could be led to the target.
    """
    order = torch.randperm(len(images), generator=generator(seed)).to(images.labels.device)
    used = images[order[: lf.lf_images]]
    others = images[order[lf.lf_images :][:HELD_BACK]] if len(images) > lf.lf_images else used
    seen = predict(model, to_float(others.pixels), AT_ONCE)
    search = Progress(images.pixels.shape[1:], images.pixels.device)

    def end_pass(losses: dict[str, float]) -> bool:
        losses["fooled"] = rate(model, others, seen, search.v)  # `losses` are printed after this
        return search.judge(losses["fooled"], 1 - lf.lf_delta)

    how: Any = {"state": {"search": search}, "end_epoch": end_pass, "session": session, "label": "pass"}
    loop.run(partial(step, model, search, lf), used.batches(1, seed=seed), lf.lf_passes, **how)
    if not bool(search.best.any()):
        raise TrainingError(
            f"no pattern for class {lf.attack_target} changes what the network sees in {len(others)} images; "
            "try more --lf_images or --lf_passes, or a network that was trained longer"
        )
    led = predict(model, (to_float(others.pixels) + search.best).clamp(0, 1), AT_ONCE) == lf.attack_target
    led_there = float(led[seen != lf.attack_target].float().mean())
    return {"pattern": search.best}, {"fooled": max(search.rates), "led_to_the_target": led_there}
