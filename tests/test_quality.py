"""How well triggers hide, by images whose figures can be worked out by hand."""

import importlib.util
import math

import pytest
import torch
from toys import toy_images

from sau import quality
from sau.attack import BadNet, Blended

WHY = "scikit-image is not installed; it is in the extra [report]"
needs_skimage = pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason=WHY)


def pictures(*changes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A image for each change: all of its 4x4x3 values are 100, and one of them is moved."""
    clean = torch.full((len(changes), 3, 4, 4), 100, dtype=torch.uint8)
    triggered = clean.clone()
    for picture, change in zip(triggered, changes, strict=True):
        picture[1, 2, 3] = 100 + change
    return clean, triggered


def test_psnr_and_l_infinity_by_hand():
    """One of 48 values moved by 51 grey levels, 0.2: MSE 0.04 / 48, 10 log10 of its inverse 30.79 dB; by 102: 24.77."""
    found = quality.quality(*pictures(51, 102, 0))
    expected = [10 * math.log10(48 / change**2) for change in (0.2, 0.4)]
    assert expected[0] == pytest.approx(30.79, abs=0.01)
    assert found["psnr"] == pytest.approx(sum(expected) / 2, abs=0.01)
    assert found["l2"] == found["linf"] == pytest.approx(0.2) and found["linf_max"] == pytest.approx(0.4)
    assert found["unchanged"] == pytest.approx(33.33) and found["radius"] == 0.2
    assert quality.quality(*pictures(52))["linf_max"] == 0.2039
    for radius, share in ((0.2, 66.67), (0.199, 33.33), (0.4, 100.0)):  # the ball has its border
        assert quality.quality(*pictures(51, 102, 0), radius=radius)["in_ball"] == pytest.approx(share)
    found = quality.quality(*pictures(0, 0))
    assert found["psnr"] is None and found["unchanged"] == 100 and found["in_ball"] == 100
    assert "unchanged" in quality.describe(found)


@needs_skimage
def test_ssim_is_one_for_equal_pictures_and_falls_with_the_trigger():
    images = toy_images(12, size=32)
    equal = quality.quality(images.pixels, images.pixels)
    assert equal["ssim"] == 1 and equal["ssim_count"] == 12
    values = []
    for alpha in (0.05, 0.3):
        attack = Blended(attack_test_blended_alpha=alpha)
        values.append(quality.of_attack(images, attack.poison_test(images))["ssim"])
    assert 1 > values[0] > values[1] > 0


@needs_skimage
@pytest.mark.parametrize(("a", "b"), [(100, 150), (2, 5)])
def test_ssim_by_hand_of_flat_pictures(a, b):
    """Of two flat images only the luminance term is left: (2 a b + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2."""
    clean, other = (torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (a, b))
    c = (0.01 * 255) ** 2
    expected = (2 * a * b + c) / (a**2 + b**2 + c)
    assert quality.quality(clean, other)["ssim"] == pytest.approx(expected, abs=1e-4)


def test_without_scikit_image_there_is_no_ssim(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = quality.quality(*pictures(51))
    assert found["ssim"] is None and found["ssim_count"] == 0 and "SSIM" not in quality.describe(found)


def test_pictures_are_compared_with_those_they_were_made_from():
    images = toy_images(20, size=32)
    triggered = BadNet(attack_target=1).poison_test(images)
    found = quality.of_attack(images, triggered)
    assert found["psnr"] > 18 and found["linf"] > 0.2 and found["in_ball"] < 50  # a white square is a large change
    assert quality.of_attack(images, triggered[triggered.index < 0]) is None
    assert quality.of_attack(images, triggered, 0.999)["in_ball"] == 100
