"""How well a trigger hides, measured on the triggered test images as they are stored, 8 bits deep."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

from sau.data.images import Images, evenly_spaced
from sau.pgd import require_radius
from sau.types import Bytes

RADIUS = 0.2  # of the L-infinity ball that SAU searches, in [0, 1] pixels
SAMPLE = 1000  # images that SSIM is averaged over; it takes about a millisecond each


def quality(clean: Bytes, triggered: Bytes, radius: float = RADIUS) -> dict[str, Any]:
    """PSNR, SSIM and L-infinity of a trigger, and how many of the perturbations lie in a ball.

    Args:
        clean: uint8 [N, C, H, W].
        triggered: the same images with the trigger.
        radius: of the ball in the L-infinity norm, in [0, 1] pixels. SAU's Assumption (a) is that the perturbations
            g(x) - x of the attack lie in the ball that it searches (Wei et al. 2023, section 3).

    Returns:
        psnr: mean over the changed images of 10 log10(1 / MSE), in dB; None if nothing changed.
        ssim: mean structural similarity of `ssim_count` images, spread evenly, by scikit-image's default, whose windows
        of 7x7 weigh all pixels alike (a Gaussian in Wang et al. 2004); None without skimage.
        linf, linf_max: mean and maximum over images of the largest change of a value, in [0, 1] pixels.
        l2: mean L2 norm of the change of an image, in [0, 1] pixels.
        unchanged, in_ball: percentage of images that the trigger does not change, and changes by at most `radius`.
    """
    require_radius("radius", radius, "L_inf")
    largest, errors = [], []
    for x, g in zip(clean.split(1000), triggered.split(1000), strict=True):
        change = (g.int() - x.int()).flatten(1).double() / 255
        largest.append(change.abs().amax(1))
        errors.append(change.square().mean(1))
    linf, mse = torch.cat(largest), torch.cat(errors)
    changed = mse > 0
    seen = evenly_spaced(len(clean), SAMPLE)
    ssim = _ssim(clean[seen], triggered[seen])
    return {
        "psnr": round(float((-10 * mse[changed].log10()).mean()), 2) if changed.any() else None,
        "ssim": None if ssim is None else round(ssim, 4),
        "ssim_count": min(SAMPLE, len(clean)) if ssim is not None else 0,
        "linf": round(float(linf.mean()), 4),
        "linf_max": round(float(linf.max()), 4),
        "l2": round(float((mse * clean[0].numel()).sqrt().mean()), 3),
        "unchanged": round(100 * float((~changed).double().mean()), 2),
        "in_ball": round(100 * float((linf <= radius + 1e-9).double().mean()), 2),
        "radius": radius,
    }


def of_attack(test: Images, triggered: Images, radius: float = RADIUS) -> dict[str, Any] | None:
    """`quality` of a triggered test set made from `test`; None if it is empty."""
    if len(triggered) == 0:
        return None
    return quality(test.pixels[triggered.index].cpu(), triggered.pixels.cpu(), radius)


def describe(found: dict[str, Any]) -> str:
    """A line for the screen."""
    ssim = "" if found["ssim"] is None else f", SSIM {found['ssim']:.3f}"
    psnr = "unchanged" if found["psnr"] is None else f"PSNR {found['psnr']:.1f} dB"
    none = f", {found['unchanged']:g} % of the images unchanged" if 0 < found["unchanged"] < 100 else ""
    linf, inside = f"{found['linf']:.3f} (at most {found['linf_max']:.3f})", f"{found['in_ball']:g} % within"
    return f"trigger: {psnr}{ssim}, L-infinity {linf}, {inside} {found['radius']:g}{none}"


def _ssim(clean: Bytes, triggered: Bytes) -> float | None:
    if importlib.util.find_spec("skimage") is None or min(clean.shape[-2:]) < 3:
        return None  # a window of one pixel has no variance
    from skimage.metrics import structural_similarity

    window = (min(7, *clean.shape[-2:]) - 1) // 2 * 2 + 1  # the largest odd one that fits
    pairs = zip(clean.numpy(), triggered.numpy(), strict=True)
    values = [structural_similarity(x, g, win_size=window, channel_axis=0, data_range=255) for x, g in pairs]
    return float(sum(values) / len(values))


def magnified(difference: Tensor) -> tuple[Tensor, float]:
    """|difference| of images in [0, 1], any shape, times the factor that makes its largest value 1, and the factor; a
    largest value below a grey level is taken for one."""
    gain = 1 / max(float(difference.abs().max()), 1 / 255)
    return difference.abs() * gain, gain
