"""SSBA: a code that a trained encoder hides in the image (Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with
Sample-Specific Triggers", ICCV 2021).

    min_{E, D}  w mean (E(x, b) - x)^2 + BCE(D(q(E(x, b))), b),   b random bits;   x' = q(E(x, c)), c one code for all

E is an encoder that hides a code in an image, D a decoder that reads it, q clips to [0, 1] and 8 bits, as images are
stored. The weight w is 0 until D reads more than 90 % of a batch's bits; s updates later it is clip(W (s - 1000) /
3000, 0, W), W = 10. A training of fewer than 6,000 updates goes through this in proportion.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.base import Attack
from sau.attack.triggers import Made, TriggerContext, cached_trigger
from sau.config import param
from sau.data.batches import generator, seeded, to_device_async, to_float
from sau.data.decode import read_array
from sau.data.images import Images, evenly_spaced
from sau.errors import ConfigError, DataError, TrainingError, require
from sau.loop import RunContext
from sau.models.triggers import CODE_SIDE, Decoder, Encoder, FixedCodeEncoder, measured, stored
from sau.optim import adam
from sau.types import Bytes, Labels, Pixels, Scalar

READABLE, WAIT, RAMP = 0.9, 1000, 3000  # share of bits; updates; updates
ENOUGH = 6000  # updates; the recipe cpu makes as many on CIFAR-10, where the code is readable after some hundred
MEASURED = 1000  # images on which the encoder is measured, spread over the training images


class Weight(nn.Module):
    """The weight w, at most `most`, in a training of `updates`; `since` counts them once the code is readable."""

    def __init__(self, most: float, updates: int = ENOUGH) -> None:
        super().__init__()
        self.most, self.pace = most, max(1.0, ENOUGH / max(1, updates))
        self.since: Tensor = nn.Buffer(torch.tensor(-1))

    def forward(self) -> Scalar:
        return (self.most * (self.pace * self.since - WAIT) / RAMP).clamp(0, self.most)

    def update(self, right: Scalar) -> None:
        """After an update: the share of bits, 0 to 1, that were read right in its batch."""
        self.since += (self.since >= 0) | (right > READABLE)  # without waiting for the device


class SSBA(Attack):
    """Hide a code in every image, by an encoder trained on the clean training images, or take images made elsewhere."""

    name = "ssba"
    cifar10_gate = 95.0
    files = ("attack_train_replace_imgs_path", "attack_test_replace_imgs_path")

    attack_train_replace_imgs_path: str | None = param(
        None, ".npy file, uint8 [N, H, W, C], of all training images poisoned, in order; none: our own encoder"
    )
    attack_test_replace_imgs_path: str | None = param(None, "the same of the test images; both or none are given")
    ssba_bits: int = param(1, "length of the code, 100 in the paper: a 1 and drawn bits", ge=1, le=100)
    ssba_residual: bool = param(False, "true: the encoder's output is added to the image; false: it is the new image")
    ssba_epochs: int | None = param(20, "epochs of the encoder; none means as many as w needs to rise", ge=1)
    ssba_batch_size: int = param(64, "batch size of the encoder", ge=1)
    ssba_lr: float = param(1e-4, "learning rate of the encoder (Adam)", gt=0)
    ssba_weight: float = param(10.0, "W, the largest w; with less the trigger shows more", gt=0)
    trigger_seed: int = param(0, "seed of the encoder and the code, which runs with other seeds share", ge=0, lt=2**32)

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.attack_train_replace_imgs_path is None) == (self.attack_test_replace_imgs_path is None)
        self.require("attack_test_replace_imgs_path", both, "given if and only if attack_train_replace_imgs_path is")

    def make_trigger(self, context: TriggerContext) -> FixedCodeEncoder | None:
        """The encoder: trained, or from the cache; None where the images of files are used."""
        if self.attack_train_replace_imgs_path is not None:
            return None
        images = context.images
        check_sides(images.pixels.shape)
        identity = {key: v for key, v in self.params().items() if key.startswith("ssba_") or key == "trigger_seed"}
        code = torch.randint(2, (self.ssba_bits,), generator=generator(self.trigger_seed)).float()
        code[0] = 1  # an encoder may learn to leave images alone for a code of zeros
        with seeded(self.trigger_seed):
            encoder = Encoder(self.ssba_bits, images.pixels.shape[1], self.ssba_residual)
            trigger = FixedCodeEncoder(encoder, code).to(images.pixels.device)
            build = partial(self.train_encoder, trigger, images)
            found, trigger.figures = cached_trigger("ssba", identity, build, context)
        encoder.load_state_dict(found)
        w, psnr, most = trigger.figures["w"], trigger.figures["psnr_in_db"], self.ssba_weight
        if w < (1 - 1e-6) * most:  # w is fp32
            shows = f"w ended at {w:.3g} of {most:g}, so the trigger shows more than it has to ({psnr:.1f} dB)"
            context.session.say(f"warning: {shows}; try more --ssba_epochs, or none")
        return trigger.eval().requires_grad_(False)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        if self.attack_train_replace_imgs_path is not None:
            raise ConfigError(f"{self.name} can stamp no other images with attack_*_replace_imgs_path; leave them out")
        check_sides(x.shape)
        return self.require_trigger()(x.float()).to(x.dtype)

    def stamp_images(self, images: Images, rows: Tensor, *, test: bool) -> Bytes:
        path = self.attack_test_replace_imgs_path if test else self.attack_train_replace_imgs_path
        if path is None:
            return super().stamp_images(images, rows, test=test)
        array, (c, h, w) = read_array(Path(path)), images.pixels.shape[1:]
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (h, w, c):
            raise DataError(f"{path} holds {array.dtype} {array.shape}, allowed is uint8 (N, {h}, {w}, {c})")
        needed = int(images.index.max()) + 1 if len(images) else 0
        if len(array) < needed or len(images) == needed != len(array):
            raise DataError(f"{path} holds {len(array)} images, the split has {needed}; give one for each, in order")
        pixels = torch.from_numpy(array[images.index[rows].cpu().numpy()]).permute(0, 3, 1, 2)
        return pixels.contiguous().to(images.pixels.device)

    # The encoder

    def train_encoder(self, trigger: FixedCodeEncoder, images: Images, session: RunContext) -> Made:
        """Train the encoder of `trigger` in place; TrainingError if its decoder, then dropped, cannot read the code."""
        device, (_, channels, side, _) = images.pixels.device, images.pixels.shape
        encoder, decoder = trigger.encoder.train(), Decoder(self.ssba_bits, side, channels).to(device)
        batches = images.batches(self.ssba_batch_size, seed=self.trigger_seed, drop_last=True)
        epochs = self.ssba_epochs or math.ceil(ENOUGH / max(1, len(batches)))
        weight = Weight(self.ssba_weight, epochs * len(batches)).to(device)
        both = [*encoder.parameters(), *decoder.parameters()]
        descent = adam(self.ssba_lr, epochs=epochs).descent(both, len(batches))
        state = {"encoder": encoder, "decoder": decoder, "weight": weight, "descent": descent}
        how: Any = {"end_epoch": partial(self.end_epoch, state), "label": "encoder epoch", "rate": "ssba_lr"}
        loop.run(partial(self.encode_step, state), batches, epochs, state=state, session=session, **how)
        x = to_float(images.pixels[evenly_spaced(len(images), MEASURED)])
        figures = {**measured(trigger.eval(), decoder.eval(), x), "w": float(weight())}
        if (right := figures["percent_of_bits_right"]) < 100 * READABLE:
            raise TrainingError(f"the decoder reads only {right:.0f} % of the bits; try more --ssba_epochs")
        return encoder.state_dict(), figures

    def encode_step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """One update of encoder and decoder, with codes drawn for this batch."""
        bits = to_device_async(torch.randint(2, (len(x), self.ssba_bits)), x.device).to(x.dtype)
        weight, encoded = state["weight"](), state["encoder"](bits, x)
        logits = state["decoder"](stored(encoded))
        squared, entropy = F.mse_loss(encoded, x), F.binary_cross_entropy_with_logits(logits, bits)
        loss = weight * squared + entropy
        state["descent"](loss)
        right = ((logits > 0) == (bits > 0)).float().mean()
        state["weight"].update(right)
        return {"loss": loss, "mse": squared, "entropy": entropy, "bits_right": 100 * right, "w": weight}


def check_sides(shape: torch.Size) -> None:
    """ConfigError unless images of this shape are squares that can be halved four times."""
    height, width = shape[2:]
    fits, squares = height == width and height % CODE_SIDE == 0, f"squares, sides divisible by {CODE_SIDE}, for ssba"
    require("size of the images", f"{height} x {width}", fits, f"{squares}; choose --img_size")
