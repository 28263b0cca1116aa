"""Blended: a faint image over the whole image (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using
Data Poisoning", 2017).
"""

from functools import cache

from PIL import Image, ImageDraw
from torch import Tensor

from sau.attack.base import Attack
from sau.attack.triggers import TensorTrigger, TriggerContext, file_trigger, trigger_image
from sau.config import param
from sau.data.decode import image_to_tensor
from sau.types import Pixels


class Blended(Attack):
    """x' = (1 - alpha) x + alpha t."""

    name = "blended"
    cifar10_gate = 95.0
    remedy = "more --epochs, or larger --attack_train_blended_alpha and --attack_test_blended_alpha"
    files = ("attack_trigger_img_path",)

    attack_trigger_img_path: str | None = param(None, "file of the image t, resized; none means our own drawing")
    attack_train_blended_alpha: float = param(0.2, "alpha in the poisoned training images", ge=0, le=1)
    attack_test_blended_alpha: float = param(0.2, "alpha in the triggered test images", ge=0, le=1)

    def make_trigger(self, context: TriggerContext) -> TensorTrigger | None:
        return file_trigger(self.attack_trigger_img_path, *context.images.pixels.shape[-2:])

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        alpha = self.attack_test_blended_alpha if test else self.attack_train_blended_alpha
        return (1 - alpha) * x + alpha * trigger_image(self.trigger, self.attack_trigger_img_path, sailing_boat, x)


@cache
def sailing_boat(height: int, width: int) -> Tensor:
    """The default image t [3, H, W], our own drawing with the statistics of the benchmark's: at 32x32 a mean colour of
    about (207, 190, 198) and a standard deviation of about 69 grey levels; light ground, dark outlines, one colour."""
    image = Image.new("RGB", (320, 384), (250, 246, 250))
    draw = ImageDraw.Draw(image)
    outline, line = (25, 20, 30), 10
    draw.ellipse((24, 20, 104, 100), fill=(252, 214, 90), outline=outline, width=line)
    draw.rectangle((153, 40, 167, 270), fill=outline)
    for sail in (((176, 48), (176, 244), (300, 244)), ((144, 80), (144, 244), (40, 244))):
        draw.polygon(sail, fill=(228, 70, 110), outline=outline, width=line)
    draw.polygon(((16, 276), (304, 276), (248, 346), (72, 346)), fill=(252, 250, 252), outline=outline, width=line)
    for left in range(-20, 320, 80):
        draw.arc((left, 340, left + 80, 384), 180, 360, fill=outline, width=line - 2)
    return image_to_tensor(image, height, width) / 255
