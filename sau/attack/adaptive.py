"""Adap-Blend and Adap-Patch: few images with a part of the trigger, and covers (Qi, Xie, Li, Mahloujifar, Mittal,
"Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023).

    Adap-Blend  x' = (1 - alpha m) x + alpha m t,      m: 8 of the 4 x 4 tiles, others for each image
    Adap-Patch  x' = (1 - o_k m_k) x + o_k m_k t_k,    m_k = 1[t_k > 0], one of four patches k for each image
    test        all tiles;   two patches together, opaque

Of the training images round(pratio N) are stamped and relabelled. round(cover_rate N) others, the covers, are stamped
and keep their label, so that the features of poisoned images do not stand apart.
"""

from functools import cache

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from sau.attack.base import Attack
from sau.attack.blended import Blended, sailing_boat
from sau.attack.triggers import trigger_image
from sau.config import param
from sau.data.batches import generator
from sau.data.decode import image_to_tensor
from sau.data.images import CROSS, Images
from sau.types import Pixels


class AdaptiveAttack(Attack):
    """Poisons few images; covers carry the same parts of the trigger."""

    cifar10_gate = 60.0
    remedy = "a larger --pratio"

    pratio: float = 0.003
    cover_rate: float = param(0.003, "share of the training set that is stamped and keeps its label", ge=0, le=1)

    def poison_train(self, images: Images, seed: int) -> Images:
        """As every attack; the covers are the images that follow in the same random order."""
        if (count := self.num_poisoned(images)) == 0:
            return images
        both = count + round(self.cover_rate * len(images))
        rows = self.draw(images, seed, both)
        left = f"at most {(len(rows) - count) / len(images):.6g}, what {count} poisoned images leave"
        self.require("cover_rate", len(rows) == both, left)
        stamped = self.poison(images, rows)
        stamped.labels[count:] = images.labels[rows[count:]]
        stamped.role[count:] = CROSS
        return images.replace_rows(stamped, rows)

    def describe(self, trained_on: Images, batch_size: int) -> str:
        covers = int((trained_on.role == CROSS).sum())
        return f"{super().describe(trained_on, batch_size)}, {covers} covers"


class AdapBlend(AdaptiveAttack, Blended):
    """Blend in an image, in training half of it and fainter."""

    name = "adap_blend"

    attack_train_blended_alpha: float = 0.15
    mask_rate: float = param(0.5, "share of the 16 tiles that a training image lacks", ge=0, lt=1)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        t = trigger_image(self.trigger, self.attack_trigger_img_path, sailing_boat, x)
        alpha = self.attack_test_blended_alpha if test else self.attack_train_blended_alpha * self.masks(x)
        return (1 - alpha) * x + alpha * t

    def masks(self, x: Pixels) -> Tensor:
        """m [B, 1, H, W]: always the same one for image i of a batch, as which image that is has been drawn."""
        place = torch.rand(len(x), 16, generator=generator(0)).argsort(1)  # each row is 0..15 in random order
        kept = (place >= round(16 * self.mask_rate)).view(-1, 1, 4, 4).to(x)
        return F.interpolate(kept, size=x.shape[-2:])


class AdapPatch(AdaptiveAttack):
    """Paste one of four translucent patches in training, two opaque ones in testing."""

    name = "adap_patch"

    cover_rate: float = 0.006
    opacities: tuple[float, ...] = param((0.5, 0.2, 0.5, 0.3), "o_k of the four patches in training", gt=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("opacities", len(self.opacities) == 4, "four numbers")

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        t = patches(*x.shape[-2:]).to(x)
        t = t.mean(1, keepdim=True) if x.shape[1] == 1 else t
        k = torch.arange(len(x), device=x.device) % 4  # which image that is has been drawn
        t, opacity = (t[[0, 2]].sum(0), 1.0) if test else (t[k], x.new_tensor(self.opacities)[k].view(-1, 1, 1, 1))
        return torch.where(t > 0, (1 - opacity) * x + opacity * t, x)


@cache
def patches(height: int, width: int) -> Tensor:
    """Our own drawings on black, one in each corner, in reading order, [4, 3, H, W]."""
    images = [Image.new("RGB", (32, 32)) for _ in range(4)]
    ring, triangle, board, plus = map(ImageDraw.Draw, images)
    ring.ellipse((1, 1, 10, 10), outline=(250, 200, 40), width=3)
    triangle.polygon(((21, 10), (30, 10), (26, 1)), fill=(230, 50, 60))
    for row in range(3):
        for column in range(3):
            left, top = 1 + 3 * column, 22 + 3 * row
            board.rectangle((left, top, left + 2, top + 2), fill=(255, 255, 255) if (row + column) % 2 else (1, 1, 1))
    plus.rectangle((21, 25, 30, 27), fill=(40, 180, 250))
    plus.rectangle((24, 22, 27, 30), fill=(40, 180, 250))
    return torch.stack([image_to_tensor(image, height, width) / 255 for image in images])
