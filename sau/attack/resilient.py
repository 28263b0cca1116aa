"""Training that makes a network resist purification, on top of any attack that trains the network alone.

ABI (Xu, Liu, Koffas, Picek, "Towards Backdoor Stealthiness in Model Parameter Space", CCS 2025): after each epoch the
channels that CLP would find, sigma_c > mean(sigma) + u std(sigma), get the mean scale and shift of their batch norm.

SBL (Pham, Ta, Tran, Doan, "Flatness-aware Sequential Learning Generates Resilient Backdoors", ECCV 2024): after the
attack, clean images that it held back are learned near its weights v,

    min_w  CE(f_w(x), y) + sum_i F_i (w_i - v_i)^2,      F_i = mean of p(y|x) (d log p(y|x) / d v_i)^2

over the images x of the attack with their labels y (IMAGES of them here, all in the paper), so that fine-tuning on
clean images finds nothing left to change. SAM, which the paper adds in the attack, is `resilient_rho`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sau.data.batches import generator
from sau.data.images import CLEAN, Images
from sau.defense import pruning
from sau.defense.clp import lipschitz, traced
from sau.errors import ConfigError, require
from sau.evaluate import batch_accuracy
from sau.loop import RunContext
from sau.models.normalized import eval_mode
from sau.optim import Training
from sau.types import Labels, Loader, Pixels, Scalar

IMAGES = 1000  # of which F is the mean
LR, EPOCHS = 1e-3, 2 / 3  # of the clean images: learning rate, epochs beside the attack's


def normed_convolutions(model: nn.Module, x: Pixels) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | nn.SyncBatchNorm]]:
    """The convolutions with the batch norms that they feed (`traced` by `x`); ConfigError if there are none."""
    norms = pruning.affine_norms(model, running=True)
    with eval_mode(model):
        pairs = [(conv, norms[name]) for name, conv in traced(model, norms, x).items()]
    if not pairs:
        raise ConfigError("no batch norm of the network is fed by a convolution, as abi needs; leave it out")
    return pairs


@torch.no_grad()
def hide_outliers(model: nn.Module, x: Pixels, u: float) -> None:
    """Hide in place the channels that CLP would find at `u`; `x` [1, C, H, W] is an image that `model` takes."""
    for conv, norm in normed_convolutions(model, x):
        found = pruning.outliers(lipschitz(conv, norm), u)
        norm.weight[found], norm.bias[found] = norm.weight.mean(), norm.bias.mean()


class Anchor(nn.Module):
    """The weights v of a network and how much each of them matters, F."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList([weight.detach().clone() for weight in trainable(model)])
        self.importance = nn.ParameterList([torch.zeros_like(weight) for weight in self.weights])
        self.requires_grad_(False)

    def measure(self, model: nn.Module, images: Loader) -> None:
        """F over the first `IMAGES` of these batches, image by image, in eval mode."""
        weights, count = trainable(model), 0
        pairs = (pair for x, y in images for pair in zip(x[:, None], y, strict=True))
        with eval_mode(model), torch.compiler.set_stance("force_eager"):
            for one, label in islice(pairs, IMAGES):
                log_p = F.log_softmax(model(one).float(), 1)[0, label]
                gradients = torch.autograd.grad(log_p, weights, materialize_grads=True)
                for total, gradient in zip(self.importance, gradients, strict=True):
                    total += log_p.detach().exp() * gradient**2
                count += 1
        for total in self.importance:
            total /= count

    def forward(self, weights: Sequence[Tensor]) -> Scalar:
        """sum_i F_i (w_i - v_i)^2."""
        both = zip(self.importance, weights, self.weights, strict=True)
        return torch.stack([(f * (w - v) ** 2).sum() for f, w, v in both]).sum()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that are not frozen."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def hold_back(images: Images, share: float, seed: int) -> tuple[Images, Images | None]:
    """The images without this share of them, and these, which are clean and drawn; at 0 none (None). ConfigError if
    there are too few, or of a class none, as after SIG of all its images."""
    if share == 0:
        return images, None
    clean, count = (images.role == CLEAN).nonzero().flatten(), round(share * len(images))
    most = min(len(clean), len(images) - 1)
    require("sbl", share, 2 <= count <= most, f"the share of 2 to {most} of {len(images)} images")
    gone = sorted({*images.true_labels.tolist()} - {*images.true_labels[clean].tolist()})
    require("sbl", share, not gone, f"0, or a smaller pratio: every image of {gone} is poisoned")
    held = clean[torch.randperm(len(clean), generator=generator(seed)).to(clean.device)[:count]]
    rest = torch.ones_like(images.labels, dtype=torch.bool).index_fill(0, held, False)
    return images[rest], images[held]


def sbl_state(model: nn.Module, images: Loader, recipe: Training, steps: int, session: RunContext) -> dict[str, Any]:
    """What changes in SBL's second phase, and its number of `epochs`, of `steps` updates each; `images` are batches of
    the attack, whose `recipe` and `session` these are."""
    anchor = Anchor(model)
    if not session.restore_later_stage(anchor=anchor):
        session.say(f"measuring how much each weight matters, on {IMAGES} images")
        anchor.measure(model, images)
    epochs = math.ceil(EPOCHS * recipe.epochs)
    later = replace(recipe, epochs=epochs, lr=LR, lr_scheduler="CosineAnnealingLR", cos_t_max=None, min_lr=0.0)
    descent = later.descent(model.train().parameters(), steps)
    return {"model": model, "anchor": anchor, "descent": descent, "epochs": epochs}


def sbl_step(state: dict[str, Any], x: Pixels, y: Labels) -> dict[str, Tensor]:
    """One update near the anchor."""
    logits = state["model"](x)
    distance = state["anchor"](trainable(state["model"]))
    loss = F.cross_entropy(logits, y) + distance
    state["descent"](loss)
    return {"loss": loss, "distance": distance, "train_acc": batch_accuracy(logits, y)}
