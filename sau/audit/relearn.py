"""RA, the retuning attack (Min, Qin, Zhang, Shen, Cheng, "Uncovering, Explaining, and Mitigating the Superficial
Safety of Backdoor Defense", NeurIPS 2024): a purified network is fine-tuned on few clean pictures, k of which are
triggered training pictures with the attacker's label.
"""

from dataclasses import replace

import torch
from torch import nn

from sau.data.images import Augment, Images
from sau.defense.ft import FT
from sau.errors import ConfigError
from sau.loop import Session
from sau.util import generator

DRAW = 42  # the attacker's draws begin here, the defender's at the seed of the defense: they are independent


def most_shots(train: Images, poisons: Images, share: float) -> int:
    """How many poisons `mixture` can have."""
    return min(round(share * len(train)), len(poisons))


def mixture(
    train: Images, poisons: Images, shots: int, *, share: float, seed: int, augment: Augment | None = None
) -> Images:
    """The attacker's pictures: `shots` poisons, and clean ones up to the size of the attacker's draw.

    The same seed draws the same clean pictures whatever `shots` is, and the poisons of fewer shots are among those of
    more.

    Args:
        train: clean training pictures.
        poisons: triggered ones with the attacker's labels.
        shots: how many of these.
        share: of the training pictures that the attacker draws.
        seed: of the draws.
        augment: put the clean pictures through this, once and for all; the poisons stay as they are.
    """
    draw, size, most = generator(DRAW + seed), round(share * len(train)), most_shots(train, poisons, share)
    if size < 1:
        raise ConfigError(f"share is {share:g} of {len(train)} pictures, which is none; give more")
    if not 0 <= shots <= most:
        raise ConfigError(
            f"shots is {shots}, allowed is 0 to {most}: the attacker draws {size} pictures "
            f"(share {share:g}), and there are {len(poisons)} poisoned ones"
        )
    clean = train[torch.randperm(len(train), generator=draw)[:size]]
    chosen = poisons[torch.randperm(len(poisons), generator=draw)[:shots]]
    if augment is not None:
        clean = replace(clean, pixels=augment(clean.pixels, draw))
    return chosen.concat(clean[torch.arange(shots, size)])


def relearn(
    model: nn.Module, pictures: Images, *, epochs: int = 5, seed: int = 0, augment: Augment | None = None
) -> nn.Module:
    """A copy of `model`, all weights fine-tuned as RA does: SGD 0.01 with momentum 0.9, batches of 128, batch norm in
    train mode, cross-entropy, neither decay nor schedule.

    Args:
        model: pixels in [0, 1] -> logits; stays as it is.
        pictures: the attacker's, from `mixture`.
        epochs: passes over them.
        seed: of their order and augmentation.
        augment: put every batch through this, poisons included; None takes the pictures as they are.
    """
    method = FT(epochs=epochs, batch_size=128, lr=0.01, lr_scheduler="constant", wd=0.0, augment=augment is not None)
    return method.purify(model, pictures, augment=augment, seed=seed, session=Session(say=lambda line: None))
