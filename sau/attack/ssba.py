"""SSBA: an invisible trigger, another one in every picture (Li, Li, Wu, Li, He, Lyu, "Invisible Backdoor Attack with
Sample-Specific Triggers", ICCV 2021).

    min_{E, D}  w mean (E(x, b) - x)^2 + BCE(D(q(E(x, b))), b),   b random bits;   x' = q(E(x, c)), c one code for all

E is an encoder that hides a code in an image, D reads it again, q clips to [0, 1] and 8 bits, for so images are stored.
The weight w is 0 until D reads more than 90 % of a batch's bits; s updates later it is clip(10 (s - 1000) / 3000, 0,
10). A training of fewer than 6,000 updates goes through this in proportion.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau import loop
from sau.attack.base import Attack
from sau.attack.making import Making
from sau.attack.ssba_pictures import fitting, ready_pictures
from sau.attack.workshop import Made, made
from sau.config import param
from sau.data.augment import to_device_async
from sau.data.images import Images, evenly_spaced, to_float
from sau.data.sources import fingerprint
from sau.errors import ConfigError, TrainingError
from sau.loop import Session
from sau.models.steganography import CODE_SIDE, Decoder, Encoder, FixedCodeEncoder, measured, stored
from sau.optim import adam
from sau.seeds import generator, seeded
from sau.types import Bytes, Labels, Pixels, Scalar

READABLE, WAIT, RAMP, MOST = 0.9, 1000, 3000, 10.0  # share of bits; updates; updates; the largest w
ENOUGH = 6000  # updates, as many as the recipe cpu makes on CIFAR-10, where the code is readable after some hundred
MEASURED = 1000  # pictures on which the encoder is measured, spread over the training pictures


class Weight(nn.Module):
    """The weight w of the squared error; `since` counts updates after the code was readable, -1 before.

    Args:
        updates: of the whole training; w waits and rises in proportion where they are fewer than ENOUGH.
    """

    since: Tensor

    def __init__(self, updates: int = ENOUGH) -> None:
        super().__init__()
        self.pace = max(1.0, ENOUGH / max(1, updates))
        self.register_buffer("since", torch.tensor(-1))

    def forward(self) -> Scalar:
        return (MOST * (self.pace * self.since - WAIT) / RAMP).clamp(0, MOST)

    def see(self, right: Scalar) -> None:
        """After an update: the share of bits, 0 to 1, that were read right in its batch."""
        self.since += (self.since >= 0) | (right > READABLE)  # without a word to the CPU


@dataclass(frozen=True, kw_only=True)
class SSBA(Attack):
    """Hide a code in every picture, with an encoder trained on the clean training pictures or with ready pictures."""

    name: ClassVar[str] = "ssba"
    gates: ClassVar[Mapping[str, float]] = {"cifar10": 95.0}
    costly: ClassVar[bool] = True
    files: ClassVar[tuple[str, ...]] = ("attack_train_replace_imgs_path", "attack_test_replace_imgs_path")

    attack_train_replace_imgs_path: str | None = param(
        None,
        "a .npy file, uint8 [N, H, W, C], with a poisoned version of every training image, in order; none means "
        "our own encoder, which all the other settings are for",
    )
    attack_test_replace_imgs_path: str | None = param(
        None, "the same for the test images; given together with the other one"
    )
    ssba_bits: int = param(
        1,
        "length of the code; the benchmark's images carry 1, the paper's 100. The first bit is 1, the others are drawn",
        ge=1,
        le=100,
    )
    ssba_residual: bool = param(False, "the encoder adds to the image, where it else draws it anew")
    ssba_epochs: int | None = param(
        20, "passes of the encoder's training over the training images; none means as many as w needs to rise", ge=1
    )
    ssba_batch_size: int = param(64, "images a step of it", ge=1)
    ssba_lr: float = param(1e-4, "its learning rate (Adam)", gt=0)
    trigger_seed: int = param(
        0, "of the encoder and the code, so that runs with other seeds share them", ge=0, lt=2**32
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        both = (self.attack_train_replace_imgs_path is None) == (self.attack_test_replace_imgs_path is None)
        self.require("attack_test_replace_imgs_path", both, "given if and only if attack_train_replace_imgs_path is")

    def make_trigger(self, given: Making) -> nn.Module | None:
        """The encoder: trained on the pictures, or from the cache; with ready pictures there is nothing to make."""
        if self.attack_train_replace_imgs_path is not None:
            return None
        images, where = given.images, given.images.pixels.device
        _check_sides(images.pixels.shape)
        own = {key: value for key, value in self.params().items() if key.startswith("ssba_")}
        identity = {"data": fingerprint(images), "device": where.type, "trigger_seed": self.trigger_seed, **own}
        identity["read"] = "8 bits"  # encoders of older versions were trained on floats
        with seeded(self.trigger_seed):
            encoder = Encoder(self.ssba_bits, images.pixels.shape[1], self.ssba_residual)
            hidden = FixedCodeEncoder(encoder, self._code()).to(where)
            found, hidden.figures = made("ssba", identity, partial(self._train, hidden, images), given.session)
        encoder.load_state_dict(found)
        w, noise = hidden.figures["w"], hidden.figures["psnr_in_db"]
        if w < MOST:  # of an encoder made before, too
            given.say(
                f"warning: w ended at {w:.3g} of {MOST:g}, so the trigger shows more than it has to ({noise:.1f} dB); "
                "try more --ssba_epochs, or none"
            )
        return hidden.eval().requires_grad_(False)

    def stamp(self, x: Pixels, *, test: bool = False) -> Pixels:
        if self.attack_train_replace_imgs_path is not None:
            raise ConfigError(
                f"{self.name} with ready pictures cannot stamp others; leave out attack_*_replace_imgs_path"
            )
        _check_sides(x.shape)
        return self.made()(x.float()).to(x.dtype)

    def poison_train(self, images: Images, seed: int) -> Images:
        self._check_ready(images, test=False)
        return super().poison_train(images, seed)

    def poison_test(self, images: Images) -> Images:
        self._check_ready(images, test=True)
        return super().poison_test(images)

    def stamped(self, images: Images, *, test: bool) -> Bytes:
        path = self._path(test)
        if path is None:
            return super().stamped(images, test=test)
        ready = fitting(path, ready_pictures(path, images, False), images)
        pixels = torch.from_numpy(ready).permute(0, 3, 1, 2)
        return pixels.contiguous().to(images.pixels.device)

    def _path(self, test: bool) -> str | None:
        return self.attack_test_replace_imgs_path if test else self.attack_train_replace_imgs_path

    def _check_ready(self, images: Images, *, test: bool) -> None:
        if (path := self._path(test)) is not None:
            ready_pictures(path, images, True)

    def _code(self) -> Tensor:
        """[bits]; never all zeros, for an encoder may learn to leave pictures alone for those."""
        code = torch.randint(2, (self.ssba_bits,), generator=generator(self.trigger_seed)).float()
        code[0] = 1
        return code

    def _train(self, hidden: FixedCodeEncoder, images: Images, session: Session) -> Made:
        """Train the encoder of `hidden`, in place, with a decoder that is thrown away."""
        encoder = hidden.encoder.train()
        decoder = Decoder(self.ssba_bits, images.pixels.shape[2], images.pixels.shape[1]).to(images.pixels.device)
        batches = images.batches(self.ssba_batch_size, seed=self.trigger_seed, drop_last=True)
        epochs = self.ssba_epochs or math.ceil(ENOUGH / max(1, len(batches)))
        recipe = adam(self.ssba_lr, epochs=epochs)
        descent = recipe.descent([*encoder.parameters(), *decoder.parameters()], len(batches))
        weight = Weight(recipe.epochs * len(batches)).to(images.pixels.device)
        state = {"encoder": encoder, "decoder": decoder, "weight": weight, "descent": descent}
        loop.run(
            partial(self.encode_step, state),
            batches,
            recipe.epochs,
            state=state,
            end_epoch=partial(self.end_epoch, state),
            session=session,
            label="encoder epoch",
            rate="ssba_lr",
        )
        x = to_float(images.pixels[evenly_spaced(len(images), MEASURED)])
        found = {**measured(hidden.eval(), decoder.eval(), x), "w": float(weight())}
        right = found["percent_of_bits_right"]
        if right < 100 * READABLE:
            raise TrainingError(
                f"the decoder reads {right:.0f} % of the bits, needed are {100 * READABLE:.0f}; try more --ssba_epochs"
            )
        return encoder.state_dict(), found

    def encode_step(self, state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
        """One update of encoder and decoder, with codes drawn for this batch."""
        bits = to_device_async(torch.randint(2, (len(x), self.ssba_bits)), x.device).to(x.dtype)
        weight = state["weight"]()
        encoded = state["encoder"](bits, x)
        logits = state["decoder"](stored(encoded))
        squared, entropy = F.mse_loss(encoded, x), F.binary_cross_entropy_with_logits(logits, bits)
        loss = weight * squared + entropy
        state["descent"](loss)
        right = ((logits > 0) == (bits > 0)).float().mean()
        state["weight"].see(right)
        return {"loss": loss, "mse": squared, "entropy": entropy, "bits_right": 100 * right, "w": weight}


def _check_sides(shape: torch.Size) -> None:
    height, width = shape[2:]
    if height != width or height % CODE_SIDE:
        raise ConfigError(
            f"the pictures are {height} x {width} pixels, allowed for ssba are squares with a side divisible by "
            f"{CODE_SIDE}; choose --img_size where the data set can be resized"
        )
